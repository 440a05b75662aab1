"""The report is one file, and what it shows comes from the record."""

from __future__ import annotations

import base64
import dataclasses
import re
from pathlib import Path

import imageio_ffmpeg
import numpy as np
import pytest
from records import command, small_record
from typer.testing import CliRunner

from sim import episode, report, video


@pytest.fixture(scope="module")
def html(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Of a policy that says words and acts in chunks of four."""
    return report.render(small_record(chunk=4), tmp_path_factory.mktemp("report") / "report.html").read_text()


def _page(html: str) -> str:
    """The page without the inlined plotly.js, whose text names addresses it never fetches by itself."""
    return re.sub(r"<script>.*?plotly\.js v.*?</script>", "", html, count=1, flags=re.S)


def test_embedded_video_has_one_frame_an_inference(html: str, tmp_path: Path) -> None:
    data = re.search(r'src="data:video/mp4;base64,([^"]+)"', html)
    assert data is not None
    path = tmp_path / "episode.mp4"
    path.write_bytes(base64.b64decode(data[1]))
    reader = imageio_ffmpeg.read_frames(str(path))
    meta = next(reader)
    assert meta["codec"].startswith("h264")
    assert all(side % 2 == 0 for side in meta["size"])
    assert meta["fps"] == 5.0  # 4 control steps a picture at 20 Hz
    assert sum(1 for _ in reader) == small_record(chunk=4).inferences


def test_report_asks_the_network_for_nothing(html: str) -> None:
    page = _page(html)
    assert len(page) < len(html) - 1_000_000  # plotly.js itself is inside
    assert not re.findall(r'(?:src|href)="(?!data:)', page)
    assert "https://" not in page


@pytest.mark.parametrize("trained", [False, True])
def test_only_an_untrained_policy_is_called_so(tmp_path: Path, trained: bool) -> None:
    record = small_record()
    facts = dataclasses.replace(record.facts, trained=trained)
    page = _page(report.render(dataclasses.replace(record, facts=facts), tmp_path / "r.html").read_text())
    banner = page.find("Untrained policy.")
    assert (banner == -1) if trained else (0 < banner < page.find("Was every command applied?"))


def test_steps_and_inferences_are_counted_apart_and_words_shown(html: str) -> None:
    page = _page(html)
    assert "23 control steps in 6 inferences" in page
    assert "Off, it said: calmly 3; low 3." in page
    assert "<td>fast 4; low 4</td>" in page


def test_pace_between_commands_is_the_hands() -> None:
    start, fast = report.stretches(small_record(chunk=4))
    assert (start.since, start.first, start.last, start.said) == ("start", 1, 8, "calmly 2; low 2")
    assert (fast.since, fast.first, fast.last, fast.said) == ("fast 0.8", 9, 23, "fast 4; low 4")
    assert np.allclose([start.speed, fast.speed], [0.2, 0.4])


def test_command_whose_moment_did_not_come_is_a_fault(tmp_path: Path) -> None:
    record = small_record()
    late = dataclasses.replace(record, facts=dataclasses.replace(record.facts, unsent=("slow -1",)))
    assert late.faults == ("slow -1: it was not sent: the episode ended after 6 control steps",)


def test_episodes_side_by_side_are_as_long_as_the_longest(tmp_path: Path) -> None:
    images = np.zeros((5, 64, 64, 3), np.uint8)
    images[-1] = 200
    panels = [video.Panel("slow", images, [("a", "b")] * 5), video.Panel("fast", images[3:], [("c", "d")] * 2)]
    drawn = list(video.side_by_side("speed", panels))
    assert len(drawn) == 5
    assert all(side % 2 == 0 for side in drawn[0].shape[:2])
    # The shorter one keeps its last picture, the longer one is dark until its own last.
    right, left = drawn[2][90, 64 + video.GAP + 30], drawn[2][90, 30]
    assert (right == 200).all()
    assert (left == 0).all()
    assert len(video.mp4(iter(drawn), 10)) > 500


def test_text_of_the_record_is_escaped(html: str) -> None:
    assert "the &lt;alphabet&gt; soup &amp; place" in html


def test_failed_command_is_named(tmp_path: Path) -> None:
    record = small_record()
    failed = dataclasses.replace(record.facts, commands=(command("fast 0.8", 1, first_inference=None),))
    page = _page(report.render(dataclasses.replace(record, facts=failed), tmp_path / "r.html").read_text())
    assert "fast 0.8: no action carries its sequence" in page


def test_differences_are_against_the_first_condition() -> None:
    record = small_record()
    same = dataclasses.replace(
        record,
        actions=np.stack([record.actions[0], record.actions[0] + np.float32(0.25)]),
        tokens=np.stack([record.tokens[0]] * 2),
        bins=np.stack([record.bins[0]] * 2),
    )
    (row,) = report.differences(same)
    assert np.allclose(row.means, 0.25, atol=1e-6)
    assert (row.changed, row.variation) == (0.0, 0.0)


def test_condition_has_the_colour_of_its_direction() -> None:
    assert report.condition_colors(small_record()) == [report.OFF_COLOR, video.color_of(0)]


def test_grouped_bins_still_sum_to_one() -> None:
    figure = report.bin_figure(small_record())
    assert len(figure.data) == 2 * len(report.BIN_DIMS)
    assert all(abs(sum(trace.y) - 1.0) < 1e-4 for trace in figure.data)


def test_latencies_count_from_publishing() -> None:
    first, refused = report.latencies(small_record().facts.commands)
    assert (first.verdict, first.latched, first.action, first.executed) == (2.0, 40.0, 240.0, 400.0)
    assert refused.executed is None


def test_bar_of_a_direction_is_as_long_as_its_strength() -> None:
    record = small_record()
    drawn = list(video.frames(record))
    color = tuple(int(video.color_of(0)[i : i + 2], 16) for i in (1, 3, 5))
    row = video.BARS_TOP + 10
    lengths = [int((frame[row] == color).all(axis=-1).sum()) for frame in drawn]
    full = 2 * video.VIEW - 74 - 150
    assert lengths[:2] == [0, 0]
    assert abs(lengths[2] - 0.8 * full) < 3


def test_report_verb_draws_a_saved_record_again(tmp_path: Path) -> None:
    import typer

    from sim.cli import register

    app = typer.Typer()
    app.callback()(lambda: None)
    register(app)
    episode.save(small_record(), tmp_path / "episode")
    result = CliRunner().invoke(app, ["report", str(tmp_path / "episode")])
    assert result.exit_code == 0, result.output
    assert (tmp_path / "report.html").stat().st_size > 1_000_000


def test_actions_that_are_no_tokens_are_shown_without_bins_and_said_to_be_denoised(tmp_path: Path) -> None:
    record = small_record()
    shape = (*record.actions.shape, 0)
    flow = dataclasses.replace(
        record,
        tokens=np.zeros_like(record.tokens),
        bins=np.zeros(shape, np.float32),
        bin_values=np.zeros(0, np.float32),
    )
    page = _page(report.render(flow, tmp_path / "r.html").read_text())
    assert "This policy denoises its actions, from the same noise" in page
    assert 'id="actions"' in page
    for word in ('id="bins"', "Probability of each action bin", "tokens changed", "total variation"):
        assert word not in page
