"""The episode as a video: what steered the arm at each step, and under it both cameras.

Invariant: one video frame a control step, H.264 with even sides, so that browsers play it.
"""

from __future__ import annotations

import io
import itertools
import tempfile
import textwrap
from collections.abc import Iterator
from pathlib import Path

import imageio_ffmpeg
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from sim.episode import EpisodeRecord

PALETTE = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#7f6000", "#000000")
"""Okabe and Ito's colours, told apart by colour-blind readers as well."""
VIEW = 384  # pixels of a camera's side in the video
ROW = 26  # pixels a bar takes
BARS_TOP = 84  # pixels of text above the bars
INK, FAINT, PAPER, AMBER = "#1f2933", "#7b8794", "#ffffff", "#b45309"


def color_of(index: int) -> str:
    """Colour of the index-th direction, the same in the video and in every figure."""
    return PALETTE[index % len(PALETTE)]


def frames(record: EpisodeRecord) -> Iterator[np.ndarray]:
    """Drawn frames, uint8 RGB [H, W, 3] with even H and W, one a control step."""
    strengths = record.strengths
    shown = [name for name in strengths if strengths[name].any()] or list(strengths)
    # Cameras at the bottom: a browser's controls lie over them, not over the bars.
    panel = BARS_TOP + ROW * max(1, len(shown)) + 8
    panel += panel % 2
    index_of = {name: i for i, name in enumerate(strengths)}
    for step in range(record.steps):
        canvas = Image.new("RGB", (2 * VIEW, panel + VIEW), PAPER)
        for column, images in enumerate((record.agentview, record.wrist)):
            view = Image.fromarray(images[step]).resize((VIEW, VIEW), Image.Resampling.LANCZOS)
            canvas.paste(view, (column * VIEW, panel))
        draw = ImageDraw.Draw(canvas)
        _caption(draw, record, step)
        for column, camera in ((0, "agentview"), (VIEW, "wrist")):
            box = (column + 6, panel + 6, column + 16 + draw.textlength(camera, font=_font(13)), panel + 26)
            draw.rectangle(box, fill=INK)
            draw.text((column + 11, panel + 8), camera, fill=PAPER, font=_font(13))
        for row, name in enumerate(shown):
            _bar(draw, BARS_TOP + ROW * row, name, float(strengths[name][step]), color_of(index_of[name]))
        yield np.asarray(canvas)


def encode(record: EpisodeRecord, fps: int = 10) -> bytes:
    """The video as the bytes of an MP4 file (H.264, yuv420p)."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "episode.mp4"
        writer = None
        for frame in frames(record):
            if writer is None:
                size = (frame.shape[1], frame.shape[0])
                writer = imageio_ffmpeg.write_frames(
                    str(path), size, fps=fps, codec="libx264", quality=None, macro_block_size=2,
                    output_params=["-crf", "24", "-movflags", "+faststart"],
                )  # fmt: skip
                writer.send(None)
            writer.send(np.ascontiguousarray(frame))
        if writer is not None:
            writer.close()
        return path.read_bytes() if path.exists() else b""


def poster(record: EpisodeRecord) -> bytes:
    """JPEG of the frame with the most steering: what a page shows before the video is played."""
    total = sum(record.strengths.values(), np.zeros(record.steps))
    best = int(np.argmax(total)) if record.steps else 0
    frame = next(itertools.islice(frames(record), best, None))
    buffer = io.BytesIO()
    Image.fromarray(frame).save(buffer, "JPEG", quality=85)
    return buffer.getvalue()


def _caption(draw: ImageDraw.ImageDraw, record: EpisodeRecord, step: int) -> None:
    left, top = 14, 8
    draw.text((left, top), textwrap.shorten(record.facts.instruction, 72), fill=INK, font=_font(18))
    counts = (
        f"step {step + 1} of {record.steps}    inference {int(record.inference[step])}    "
        f"steering sequence {int(record.sequence[step])}"
    )
    draw.text((left, top + 26), counts, fill=FAINT, font=_font(14))
    if not record.facts.trained:
        label = "untrained policy"
        draw.text((2 * VIEW - 14 - draw.textlength(label, font=_font(14)), top + 26), label, fill=AMBER, font=_font(14))
    latest = [c for c in record.facts.commands if c.step <= step]
    if latest:
        outcome = "" if latest[-1].accepted else f" - refused: {latest[-1].code}"
        draw.text((left, top + 48), f"last command: {latest[-1].label}{outcome}", fill=INK, font=_font(14))


def _bar(draw: ImageDraw.ImageDraw, top: int, name: str, strength: float, color: str) -> None:
    left, right = 150, 2 * VIEW - 74
    draw.text((14, top + 1), textwrap.shorten(name, 18), fill=INK if strength else FAINT, font=_font(14))
    draw.rectangle((left, top + 3, right, top + 17), fill="#edf0f3")
    if strength:
        draw.rectangle((left, top + 3, left + max(2, round((right - left) * min(strength, 1.0))), top + 17), fill=color)
    draw.text((right + 12, top + 1), f"{strength:.2f}", fill=INK if strength else FAINT, font=_font(14))


def _font(size: int) -> ImageFont.ImageFont | ImageFont.FreeTypeFont:
    return ImageFont.load_default(size)
