"""`steer demo`: one real LIBERO episode, steered over ROS 2 while it runs, and the evidence of it as one HTML file.

Invariant: it fails when a command did not reach an action or wrote nothing, and its processes never outlive it.
"""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import os
import platform
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from ros_nodes.demo_config import CommandSpec, DemoConfig, Ur5DemoConfig, choose, config_named, read_config
from ros_nodes.domain import free_domain
from steer_runtime.errors import SteerError

if TYPE_CHECKING:  # ROS, torch and the simulator take seconds to import and are loaded when the demo runs
    from ros_nodes.children import Children
    from ros_nodes.client import SteeringClient
    from ros_nodes.recorder import Recorder
    from sim.before_after import BeforeAfter
    from sim.episode import EpisodeRecord
    from sim.outcomes import SentCommand
    from steer_runtime.directions.direction import Axis, Direction

START_S = 480.0
"""Limit for building a scene, loading a policy and discovery, all at once on two busy cores."""
STEP_S = 60.0
"""Limit for one inference and the control steps of its chunk, which take about a second."""
EXIT_NOT_APPLIED = 1
ROBOTS = ("libero", "ur5")


def demo(
    config: Annotated[
        Path | None,
        typer.Option(help="Demo file; default: configs/demo.yaml, of untrained policies demo-untrained.yaml."),
    ] = None,
    policy: Annotated[
        str | None,
        typer.Option(
            help="openvla or pi0 (the pocket policy of that kind), a name of configs/policies, or a YAML file."
        ),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Folder for the report, the record and the logs.")] = None,
    steps: Annotated[int | None, typer.Option(help="Control steps of the episode.", min=2, max=1000)] = None,
    robot: Annotated[
        str, typer.Option(help="libero (its Panda), or ur5: a simulated UR5e behind its driver's topics.")
    ] = "libero",
) -> None:
    """Steer one real LIBERO episode over ROS 2 and write the evidence to report.html; exit code 1 if a command failed.

    With --robot ur5 a simulated UR5e stands in the scene, and exceeding one of its limits is a failure as well.

    Examples:  steer demo  ·  steer demo --policy pi0  ·  steer demo --robot ur5  ·
    steer demo --config configs/demo-untrained.yaml --out /tmp/demo
    """
    if robot not in ROBOTS:
        raise SteerError("unknown_robot", f"robot {robot!r} is not known: expected one of {', '.join(ROBOTS)}")
    on_ur5 = robot == "ur5"
    kind = Ur5DemoConfig if on_ur5 else DemoConfig
    file, name = choose(config or (config_named("demo-ur5") if on_ur5 else None), policy, kind)
    given = (("out", out), ("steps", steps), ("policy", name))
    changes = {key: value for key, value in given if value is not None}
    print(f"demo of {name} on {robot} ({file})", file=sys.stderr)
    chosen = read_config(file, kind).changed(changes)
    report, faults = run_ur5_demo(chosen) if isinstance(chosen, Ur5DemoConfig) else run_demo(chosen)
    print(f"report: {report}")
    if faults:
        print(f"the demo failed: {'; '.join(faults)}", file=sys.stderr)
        raise typer.Exit(EXIT_NOT_APPLIED)


def run_demo(config: DemoConfig) -> tuple[Path, tuple[str, ...]]:
    """Run it. Returns the report's path and a sentence for each command that did not do what it should.

    Raises SteerError when the robot, the policy or the answer to a command does not come.
    """
    gl = _prepare(config)
    with demo_progress() as progress:
        return DemoRun(config, gl, progress).run()


def run_ur5_demo(config: Ur5DemoConfig) -> tuple[Path, tuple[str, ...]]:
    """The same on the simulated UR5e; a limit that was exceeded has a sentence, too."""
    gl = _prepare(config)
    from ros_nodes.demo_ur5 import Ur5DemoRun

    with demo_progress() as progress:
        return Ur5DemoRun(config, gl, progress).run()


def _prepare(config: DemoConfig) -> str:
    """Refuse what cannot run before anything starts. Returns how pictures are drawn."""
    # Discovery stays on this machine; set before ROS is loaded, which may start the interpreter anew.
    os.environ["ROS_AUTOMATIC_DISCOVERY_RANGE"] = "LOCALHOST"
    try:
        import ros_nodes.client  # noqa: F401
    except ImportError as error:
        raise SteerError(
            "no_ros",
            f"the demo needs ROS 2 ({error}); install `pip install 'steer-runtime[ros]'` and run "
            "ros_nodes/steer_msgs/build.sh, or source your ROS distribution",
        ) from error
    from sim.libero_robot import LiberoRobot, use_software_rendering

    gl = use_software_rendering()
    # Refuses a wrong task before anything starts.
    LiberoRobot(config.suite, config.task_id, config.init_state_index)
    return gl


class Stages:
    """One line of progress a stage, and how long each took (s)."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self.seconds: dict[str, float] = {}

    @contextmanager
    def stage(self, name: str, total: int | None = None) -> Iterator[Any]:
        """Yields a function to call with how much is done."""
        task = self._progress.add_task(name, total=total)
        begun = time.monotonic()
        yield lambda done: self._progress.update(task, completed=done)
        self.seconds[name] = time.monotonic() - begun
        self._progress.update(task, total=total or 1, completed=total or 1)


@contextmanager
def demo_progress() -> Iterator[Stages]:
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=Console(stderr=True)) as bar:
        yield Stages(bar)


class DemoRun:
    """The parts of one run, in the order in which they happen."""

    def __init__(self, config: DemoConfig, gl: str, stages: Stages) -> None:
        self.config, self.gl, self.stages = config, gl, stages
        self.out = config.out.resolve()
        self.store = self.out / "directions"
        self.trace_path = self.out / "trace.jsonl"
        # A domain of this process's own, so that two runs and other robots on this machine do not meet.
        self.domain_id = free_domain()

    def run(self) -> tuple[Path, tuple[str, ...]]:
        from ros_nodes.children import Children
        from ros_nodes.client import SteeringClient
        from ros_nodes.recorder import Recorder
        from sim import episode, report

        self.out.mkdir(parents=True, exist_ok=True)
        self.trace_path.unlink(missing_ok=True)
        environment = {"ROS_DOMAIN_ID": str(self.domain_id)}
        with Children(self.out / "logs", environment) as children:
            self._start_robot(children)
            with self.stages.stage("loading policy, finding directions"):
                policy = self._load_policy()
                directions, axes = self._make_directions(policy)
            self._start_policy(children, directions)
            with (
                Recorder(domain_id=self.domain_id) as recorder,
                SteeringClient(source="steer-demo", domain_id=self.domain_id) as client,
            ):
                with self.stages.stage("starting robot and policy node"):
                    self._wait_until_acting(children, client, recorder)
                with self.stages.stage("episode", self.config.steps) as advance:
                    sent, unsent = self._run_episode(children, client, recorder, directions, axes, advance)
            children.stop("policy")
            children.stop("robot")
        shown = self._shown(recorder)
        conditions = _conditions(sent)
        count = min(self.config.observations, len(shown)) * (1 + len(conditions))
        with self.stages.stage("replaying without and with steering", count) as advance:
            replay = self._replay(policy, directions, axes, recorder, shown, conditions, advance)
        with self.stages.stage("drawing the report"):
            record = self._record(policy, directions, recorder, shown, sent, unsent, replay)
            episode.save(record, self.out / "episode")
            path = report.render(record, self.out / "report.html")
        return path, record.faults

    # -- before the episode -------------------------------------------------------------------------------------------

    def _start_robot(self, children: Children) -> None:
        config = self.config
        task = {"suite": config.suite, "task_id": config.task_id, "init_state_index": config.init_state_index}
        running = {"mode": "lockstep", "action_timeout_s": STEP_S, "after_success": config.after_success}
        children.start("robot", "ros_nodes.libero_robot_node", {**task, **running})

    def _load_policy(self) -> Any:
        import torch

        from steer_runtime.policies import load_policy

        # More threads than free cores make every operation wait for the slowest; the simulator needs one as well.
        torch.set_num_threads(self.config.torch_threads)
        return load_policy(self.config.policy)

    def _make_directions(self, policy: Any) -> tuple[tuple[Direction, ...], tuple[Axis, ...]]:
        from ros_nodes.demo_directions import demo_directions, save_afresh
        from steer_runtime.policies.registry import checkpoint_of

        shipped = checkpoint_of(self.config.policy) / "directions"
        directions, axes = demo_directions(self.config, policy, shipped)
        save_afresh(self.store, directions, axes)
        return directions, axes

    def _start_policy(self, children: Children, directions: Sequence[Direction]) -> None:
        parameters = {
            "policy": self.config.policy,
            "direction_store": str(self.store),
            "directions": [direction.id for direction in directions],
            "torch_threads": self.config.torch_threads,
            "autostart": True,
            "trace_path": str(self.trace_path),
            # One inference after another is waited for; on a busy machine it may be late without being lost.
            "observation_timeout_s": STEP_S,
        }
        children.start("policy", "ros_nodes.policy_node", parameters)

    def _wait_until_acting(self, children: Children, client: SteeringClient, recorder: Recorder) -> None:
        deadline = time.monotonic() + START_S
        while not recorder.wait(lambda: len(recorder.actions) > 0, 1.0):
            children.check()
            if time.monotonic() > deadline:
                raise SteerError(
                    "no_action",
                    f"no action was published within {START_S:g} s ({len(recorder.observations)} frames were recorded, "
                    f"refused: {dict(recorder.problems)}); see the logs in {self.out / 'logs'}",
                )
        client.connect(STEP_S)

    # -- the episode --------------------------------------------------------------------------------------------------

    def _run_episode(
        self,
        children: Children,
        client: SteeringClient,
        recorder: Recorder,
        directions: Sequence[Direction],
        axes: Sequence[Axis],
        advance: Any,
    ) -> tuple[list[SentCommand], list[CommandSpec]]:
        """Send each command at its moment until the episode is over; those whose moment did not come are second."""
        pending = list(self.config.commands)
        sent: list[SentCommand] = []
        while recorder.commanded < self.config.steps and recorder.end is None:
            inferences = len(recorder.actions)
            if not recorder.wait(lambda n=inferences: len(recorder.actions) > n or recorder.end is not None, STEP_S):  # type: ignore[misc]
                children.check()
                raise SteerError(
                    "no_action",
                    f"no action came for {STEP_S:g} s after {recorder.commanded} control steps; see {self.out / 'logs'}",
                )
            advance(min(recorder.commanded, self.config.steps))
            for spec in [spec for spec in pending if recorder.end is None and is_due(spec, recorder)]:
                pending.remove(spec)
                sent.append(send_command(client, spec, recorder.commanded, directions, axes))
        last = recorder.actions[self._inferences(recorder) - 1].observation_ns
        recorder.wait(lambda: recorder.end is not None or max(recorder.observations, default=0) > last, STEP_S)
        return sent, pending

    def _inferences(self, recorder: Recorder) -> int:
        """How many of the recorded inferences belong to the demo: those that begin before its last control step."""
        return sum(action.step < self.config.steps for action in recorder.actions)

    def _shown(self, recorder: Recorder) -> list[int]:
        """Indices of the inferences whose observation was recorded in full: those that the record shows."""
        actions = recorder.actions[: self._inferences(recorder)]
        shown = [i for i, action in enumerate(actions) if action.observation_ns in recorder.observations]
        if len(shown) < 0.9 * len(actions):
            raise SteerError(
                "frames_lost",
                f"{len(actions) - len(shown)} of {len(actions)} frames did not reach the recorder "
                f"({dict(recorder.problems)}); run the demo on a less busy machine",
            )
        return shown

    # -- after the episode --------------------------------------------------------------------------------------------

    def _replay(
        self,
        policy: Any,
        directions: Sequence[Direction],
        axes: Sequence[Axis],
        recorder: Recorder,
        shown: Sequence[int],
        conditions: Mapping[str, Mapping[str, float]],
        advance: Any,
    ) -> tuple[list[int], BeforeAfter]:
        from sim.before_after import before_after

        chosen = _spread(len(shown), self.config.observations)
        observations = [recorder.observations[recorder.actions[shown[i]].observation_ns] for i in chosen]
        return chosen, before_after(policy, directions, axes, observations, conditions, advance)

    def _record(
        self,
        policy: Any,
        directions: Sequence[Direction],
        recorder: Recorder,
        shown: Sequence[int],
        sent: Sequence[SentCommand],
        unsent: Sequence[CommandSpec],
        replay: tuple[list[int], BeforeAfter],
    ) -> EpisodeRecord:
        import numpy as np

        from sim.episode import EpisodeFacts, EpisodeRecord
        from sim.outcomes import outcomes

        chosen, table = replay
        # The last inference may be under way when the nodes are ended; what comes after the episode is not part of it.
        count = self._inferences(recorder)
        actions = recorder.actions[:count]
        inferences = {action.inference for action in actions}
        trace = tuple(r for r in read_trace(self.trace_path) if r["inference_id"] in inferences)
        observations = [recorder.observations[recorder.actions[i].observation_ns] for i in shown]
        executed = np.concatenate(recorder.chunks[:count])
        if recorder.end is not None:
            # The last chunk may be longer than the episode; held steps are no actions.
            executed = executed[: max(1, recorder.end[1] - recorder.hold_steps)]
        said = tuple(recorder.said[i] for i in shown)
        facts = EpisodeFacts(
            policy=policy.name,
            trained=policy.trained,
            model_hash=policy.model_hash,
            suite=self.config.suite,
            task_id=self.config.task_id,
            init_state_index=self.config.init_state_index,
            instruction=observations[0].instruction,
            created=datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
            success=recorder.success,
            hold_steps=recorder.hold_steps,
            missing_frames=count - len(shown),
            versions=demo_versions(self.gl),
            directions=tuple(_steered_by(direction) for direction in directions),
            commands=outcomes(sent, actions, sorted(recorder.observations), trace),
            unsent=tuple(f"{spec.label} ({spec.moment})" for spec in unsent),
            trace=trace,
            conditions=table.conditions,
            said=said if any(said) else (),
            condition_said=table.said if any(said) else (),
            timings=dict(self.stages.seconds),
        )
        return EpisodeRecord(
            facts=facts,
            agentview=np.stack([o.images["agentview"] for o in observations]),
            wrist=np.stack([o.images["wrist"] for o in observations]),
            state=np.stack([o.state for o in observations]),
            step=np.array([actions[i].step for i in shown], np.int64),
            inference=np.array([actions[i].inference for i in shown], np.int64),
            sequence=np.array([actions[i].sequence for i in shown], np.int64),
            age_s=np.array([recorder.ages_s[i] for i in shown], np.float64),
            action=executed,
            replayed=np.array(chosen, np.int64),
            actions=table.actions,
            tokens=table.tokens,
            bins=table.bins,
            bin_values=table.bin_values,
        )


def is_due(spec: CommandSpec, recorder: Recorder) -> bool:
    begin = 0 if spec.since == "start" else recorder.grasped_at
    return begin is not None and recorder.commanded >= begin + spec.at


def send_command(
    client: SteeringClient, spec: CommandSpec, step: int, directions: Sequence[Direction], axes: Sequence[Axis]
) -> SentCommand:
    from sim.outcomes import SentCommand

    if spec.set_ is not None:
        command = client.publish(spec.set_, spec.strength, ramp_s=spec.ramp_s)
    else:
        command = client.clear(spec.clear, ramp_s=spec.ramp_s)
    verdict = client.wait_verdict(command, STEP_S)
    arrived_ns = time.time_ns()
    return SentCommand(
        label=spec.label,
        command=command,
        expected=spec.expect,
        writes_of=_concerned(spec, directions, axes),
        step=step,
        verdict=verdict,
        verdict_ns=arrived_ns,
    )


def _concerned(spec: CommandSpec, directions: Sequence[Direction], axes: Sequence[Axis]) -> tuple[Direction, ...]:
    """Directions whose writes a command starts or ends; none stands for all of them."""
    target = spec.set_ or spec.clear
    names = {target}
    for axis in axes:
        if axis.name == target and spec.set_ is not None:
            names = {axis.negative if spec.strength < 0 else axis.positive}
        elif axis.name == target:
            names = {axis.negative, axis.positive}
    return tuple(direction for direction in directions if direction.name in names)


def _conditions(sent: Sequence[SentCommand]) -> dict[str, dict[str, float]]:
    """Each strength that was accepted, alone: the label of a replayed condition -> target -> strength."""
    taken = [(one.command.target, one.verdict) for one in sent if one.command.op == "set" and one.verdict.accepted]
    strengths = [(target, verdict.applied_strength) for target, verdict in taken if verdict.applied_strength]
    return {f"{target} {strength:+g}": {target: strength} for target, strength in strengths}


def _spread(count: int, wanted: int) -> list[int]:
    """`wanted` indices over range(count), evenly, without repeats."""
    wanted = min(wanted, count)
    return [(2 * i + 1) * count // (2 * wanted) for i in range(wanted)]


def read_trace(path: Path) -> list[Mapping[str, Any]]:
    if not path.is_file():
        raise SteerError("no_trace", f"the policy node wrote no trace to {path}; see its log")
    lines = path.read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines if line.endswith("}")]


def _steered_by(direction: Direction) -> Any:
    from sim.episode import SteeredBy

    found = direction.provenance
    options = {**found, **found.get("options", {})}
    words = [*options.get("words", ()), *options.get("positive", ())]
    unwanted = [*options.get("against", ()), *options.get("negative", ())]
    return SteeredBy(
        name=direction.name,
        id=direction.id,
        form="dense" if direction.neurons is None else "neurons",
        op=direction.op,
        span=tuple(sorted(direction.span)),
        sites=len(direction.dense or {}) if direction.neurons is None else len(direction.neurons),
        words=(*words, *(f"not {word}" for word in unwanted)),
        tower=direction.tower,
        finder=str(found.get("finder", "")),
    )


def demo_versions(gl: str) -> dict[str, str]:
    from sim.libero_robot import versions

    packages = ("steer-runtime", "torch", "transformers", "ros-rclpy")
    found = {name: importlib.metadata.version(name) for name in packages if _installed(name)}
    return {**found, **versions(), "gl_backend": gl, "python": platform.python_version(), "machine": platform.machine()}


def _installed(package: str) -> bool:
    try:
        importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True
