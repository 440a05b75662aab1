"""A run of the UR5e as files: report.html with plot and video inside, and both beside it.

Invariant: the HTML needs nothing else, and everything in it is computed from the run.
"""

from __future__ import annotations

import base64
import json
from pathlib import Path

import jinja2

from sim.ur5.run import ArmRun, speed_plot, video_frames, video_rate
from sim.video import mp4


def write(run: ArmRun, folder: Path) -> Path:
    """Write tcp_speed.png, demo.mp4, summary.json and report.html; returns the path of the last."""
    plot, video = speed_plot(run), mp4(video_frames(run), video_rate(run))
    (folder / "tcp_speed.png").write_bytes(plot)
    (folder / "demo.mp4").write_bytes(video)
    (folder / "summary.json").write_text(json.dumps(run.summary(), indent=2) + "\n", encoding="utf-8")
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("sim"), autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True
    )
    page = environment.get_template("ur5.html.j2").render(
        run=run,
        plot=base64.b64encode(plot).decode(),
        video=base64.b64encode(video).decode(),
    )
    path = folder / "report.html"
    path.write_text(page, encoding="utf-8")
    return path
