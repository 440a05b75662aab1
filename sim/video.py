"""Episodes as videos: one with what steered the arm and what it said, and several side by side.

Invariant: a recorded episode has one video frame an inference; H.264 with even sides, so that browsers play it.
"""

from __future__ import annotations

import io
import itertools
import tempfile
import textwrap
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import imageio_ffmpeg
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from sim.episode import RATE_HZ, EpisodeRecord

PALETTE = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#7f6000", "#000000")
"""Okabe and Ito's colours, told apart by colour-blind readers as well."""
VIEW = 384  # pixels of a camera's side in the video
ROW = 26  # pixels a bar takes
BARS_TOP = 106  # pixels of text above the bars
MOST_FPS = 10
GAP = 6  # pixels between episodes that are shown side by side
INK, FAINT, PAPER, AMBER = "#1f2933", "#7b8794", "#ffffff", "#b45309"


def color_of(index: int) -> str:
    """Colour of the index-th direction, the same in the video and in every figure."""
    return PALETTE[index % len(PALETTE)]


@dataclass(frozen=True)
class Panel:
    """One of several episodes shown side by side.

    label: what sets it apart. images: uint8 RGB [N, H, W, 3], the same H and W for all. captions: lines under each of the
    N images.
    """

    label: str
    images: np.ndarray
    captions: Sequence[Sequence[str]]


def frames(record: EpisodeRecord) -> Iterator[np.ndarray]:
    """Drawn frames, uint8 RGB [H, W, 3] with even H and W, one an inference."""
    strengths = record.strengths
    shown = [name for name in strengths if strengths[name].any()] or list(strengths)
    # Cameras at the bottom: a browser's controls lie over them, not over the bars.
    panel = BARS_TOP + ROW * max(1, len(shown)) + 8
    panel += panel % 2
    index_of = {name: i for i, name in enumerate(strengths)}
    for index in range(record.inferences):
        canvas = Image.new("RGB", (2 * VIEW, panel + VIEW), PAPER)
        for column, images in enumerate((record.agentview, record.wrist)):
            view = Image.fromarray(images[index]).resize((VIEW, VIEW), Image.Resampling.LANCZOS)
            canvas.paste(view, (column * VIEW, panel))
        draw = ImageDraw.Draw(canvas)
        _caption(draw, record, index)
        for column, camera in ((0, "agentview"), (VIEW, "wrist")):
            box = (column + 6, panel + 6, column + 16 + draw.textlength(camera, font=_font(13)), panel + 26)
            draw.rectangle(box, fill=INK)
            draw.text((column + 11, panel + 8), camera, fill=PAPER, font=_font(13))
        for row, name in enumerate(shown):
            _bar(draw, BARS_TOP + ROW * row, name, float(strengths[name][index]), color_of(index_of[name]))
        yield np.asarray(canvas)


def frame_rate(record: EpisodeRecord) -> float:
    """Frames a second: those of the robot's own pace, at most MOST_FPS."""
    return float(min(MOST_FPS, max(1, round(RATE_HZ * record.inferences / max(1, record.steps)))))


def encode(record: EpisodeRecord) -> bytes:
    """The video as the bytes of an MP4 file (H.264, yuv420p)."""
    return mp4(frames(record), frame_rate(record))


def mp4(pictures: Iterable[np.ndarray], fps: float, quality: int = 24) -> bytes:
    """uint8 RGB [H, W, 3] pictures of even and equal sides as an MP4 (H.264, yuv420p); no pictures: no bytes.

    quality: x264's constant rate factor, lower is better and larger.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "episode.mp4"
        writer = None
        for picture in pictures:
            if writer is None:
                size = (picture.shape[1], picture.shape[0])
                writer = imageio_ffmpeg.write_frames(
                    str(path), size, fps=fps, codec="libx264", quality=None, macro_block_size=2,
                    output_params=["-crf", str(quality), "-movflags", "+faststart"],
                )  # fmt: skip
                writer.send(None)
            writer.send(np.ascontiguousarray(picture))
        if writer is not None:
            writer.close()
        return path.read_bytes() if path.exists() else b""


def poster(record: EpisodeRecord) -> bytes:
    """JPEG of the frame with the most steering: what a page shows before the video is played."""
    total = sum(record.strengths.values(), np.zeros(record.inferences))
    best = int(np.argmax(total)) if record.inferences else 0
    frame = next(itertools.islice(frames(record), best, None))
    buffer = io.BytesIO()
    Image.fromarray(frame).save(buffer, "JPEG", quality=85)
    return buffer.getvalue()


def side_by_side(title: str, panels: Sequence[Panel]) -> Iterator[np.ndarray]:
    """Several episodes from a common start, uint8 RGB [H, W, 3] with even H and W; one that is over keeps its last picture."""
    size = panels[0].images.shape[1]
    lines = max(len(caption) for panel in panels for caption in panel.captions)
    top, foot = 62, 10 + 20 * lines
    height = top + size + foot
    width = len(panels) * (size + GAP) - GAP
    for index in range(max(len(panel.images) for panel in panels)):
        canvas = Image.new("RGB", (width + width % 2, height + height % 2), PAPER)
        draw = ImageDraw.Draw(canvas)
        draw.text((8, 6), textwrap.shorten(title, max(20, width // 9)), fill=INK, font=_font(17))
        for column, panel in enumerate(panels):
            left, at = column * (size + GAP), min(index, len(panel.images) - 1)
            draw.rectangle((left, 32, left + size - 1, 56), fill=color_of(column))
            draw.text((left + 8, 35), panel.label, fill=PAPER, font=_font(15))
            canvas.paste(Image.fromarray(panel.images[at]), (left, top))
            for line, text in enumerate(panel.captions[at]):
                draw.text((left + 4, top + size + 5 + 20 * line), text, fill=FAINT if line else INK, font=_font(15))
        yield np.asarray(canvas)


def says(words: Sequence[str]) -> str:
    """What a policy said, for people; empty for one that says nothing."""
    return f"says: {', '.join(words)}" if words else ""


def _caption(draw: ImageDraw.ImageDraw, record: EpisodeRecord, index: int) -> None:
    left, top, step = 14, 8, int(record.step[index])
    draw.text((left, top), textwrap.shorten(record.facts.instruction, 72), fill=INK, font=_font(18))
    counts = (
        f"control step {step + 1} of {record.steps}    inference {int(record.inference[index])}    "
        f"steering sequence {int(record.sequence[index])}"
    )
    draw.text((left, top + 26), counts, fill=FAINT, font=_font(14))
    if not record.facts.trained:
        label = "untrained policy"
        draw.text((2 * VIEW - 14 - draw.textlength(label, font=_font(14)), top + 26), label, fill=AMBER, font=_font(14))
    latest = [c for c in record.facts.commands if c.step <= step]
    if latest:
        outcome = "" if latest[-1].accepted else f" - refused: {latest[-1].code}"
        draw.text((left, top + 48), f"last command: {latest[-1].label}{outcome}", fill=INK, font=_font(14))
    if record.facts.said:
        draw.text((left, top + 70), says(record.facts.said[index]), fill=INK, font=_font(14))


def _bar(draw: ImageDraw.ImageDraw, top: int, name: str, strength: float, color: str) -> None:
    left, right = 150, 2 * VIEW - 74
    draw.text((14, top + 1), textwrap.shorten(name, 18), fill=INK if strength else FAINT, font=_font(14))
    draw.rectangle((left, top + 3, right, top + 17), fill="#edf0f3")
    if strength:
        draw.rectangle((left, top + 3, left + max(2, round((right - left) * min(strength, 1.0))), top + 17), fill=color)
    draw.text((right + 12, top + 1), f"{strength:.2f}", fill=INK if strength else FAINT, font=_font(14))


def _font(size: int) -> ImageFont.ImageFont | ImageFont.FreeTypeFont:
    return ImageFont.load_default(size)
