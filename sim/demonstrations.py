"""Demonstration files: HDF5 in the layout of LIBERO's own, one file an episode, and an index a task.

Invariant: a file either is complete or does not bear its name: it is built in memory, written beside its place, flushed
to the disk and then renamed. A file torn by other means is found by its marks and refused in a sentence.

`<task>_demo.hdf5` is what LIBERO's users know: data/demo_N with actions, states, robot_states, rewards, dones and
obs/{agentview_rgb, eye_in_hand_rgb, ee_pos, ee_ori, ee_states, gripper_states, joint_states}. It holds external links to
the episodes' files beside it, so any HDF5 reader sees one file; move the folder as a whole.

What differs from LIBERO's files: each demo has its own instruction (attribute `language_instruction`); `actions` are
those executed, noise included, and replay to `states`; `expert_actions` are the clean labels to train on; with an image
stride above 1, `obs/image_index` says to which step an image belongs. Recordings without images have the same index and
no `*_rgb`. Extras live in `privileged/`, labels for other targets and manners in `counterfactual/` (see `sim.record`).
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from steer_runtime.errors import SteerError

SCHEMA = "steer-demonstration/1"
LEAST_FREE_BYTES = 300_000_000
"""Recording stops before the disk is so full that other programs fail."""
_COMPRESSED = {"compression": "gzip", "compression_opts": 4}

Value = str | int | float | bool | np.ndarray
Arrays = Mapping[str, np.ndarray]


@dataclass(frozen=True)
class Demonstration:
    """One episode read back. arrays: path below the demo ('obs/agentview_rgb') -> array. attributes: of the demo."""

    path: Path
    name: str
    arrays: Arrays
    attributes: Mapping[str, Any]


def build(name: str, arrays: Arrays, attributes: Mapping[str, Value], file_attributes: Mapping[str, Value]) -> bytes:
    """The bytes of one episode's file: data/<name>/... with images compressed."""
    import h5py

    with h5py.File("episode.hdf5", "w", driver="core", backing_store=False) as file:
        data = file.create_group("data")
        data.attrs.update(file_attributes)
        demo = data.create_group(name)
        for path, array in arrays.items():
            images = array.dtype == np.uint8 and array.ndim == 4
            # A frame a chunk: training reads frames at random.
            options = {"chunks": (1, *array.shape[1:]), **_COMPRESSED} if images else {}
            demo.create_dataset(path, data=array, **options)
        demo.attrs.update(attributes)
        # Written last: a copy that breaks off has no such mark, or other bytes under it.
        demo.attrs["checksum"] = _checksum(arrays)
        file.attrs["schema"] = SCHEMA
        file.flush()
        return bytes(file.id.get_file_image())


def write_atomically(path: Path, content: bytes) -> None:
    """Write beside, flush, rename. Raises SteerError('disk_full', 'not_writable'); then nothing bears the name."""
    part = path.with_name(path.name + ".part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with part.open("wb") as file:
            file.write(content)
            file.flush()
            # A device that cannot be synced has nothing to lose.
            if os.path.isfile(part):
                os.fsync(file.fileno())
        os.replace(part, path)
    except OSError as e:
        with contextlib.suppress(OSError):
            part.unlink(missing_ok=True)
        if e.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise SteerError(
                "disk_full",
                f"no room for {path.name} ({len(content) / 1e6:.1f} MB) in {path.parent}; every finished file is safe: "
                "free some space and run the same command again",
            ) from None
        raise SteerError(
            "not_writable", f"{path} cannot be written ({e.strerror}); choose another folder or mend its permissions"
        ) from None


def read(path: Path, *, only: frozenset[str] | None = None, verify: bool = True) -> Demonstration:
    """Read one episode's file; `only` names the arrays wanted. verify: check the bytes against their checksum.

    Raises SteerError: 'no_demonstration' (missing), 'torn_file' (unreadable, incomplete or changed), 'not_a_demonstration'
    (HDF5 of another kind).
    """
    import h5py

    if not path.is_file():
        raise SteerError(
            "no_demonstration",
            f"there is no demonstration {path}; record it with `steer data record`, or mend the path",
        )
    try:
        with h5py.File(path, "r") as file:
            if file.attrs.get("schema") != SCHEMA:
                raise SteerError(
                    "not_a_demonstration",
                    f"{path} is HDF5 but not of schema {SCHEMA}: found {str(file.attrs.get('schema'))[:60]!r}; "
                    "give a file that `steer data record` wrote",
                )
            (name,) = file["data"].keys()
            demo = file["data"][name]
            found: dict[str, np.ndarray] = {}

            def visit(key: str, node: Any) -> None:
                if isinstance(node, h5py.Dataset) and (only is None or key in only):
                    found[key] = node[()]

            demo.visititems(visit)
            attributes = {k: _plain(v) for k, v in demo.attrs.items()}
            missing = (only or frozenset()) - found.keys()
            if missing:
                raise SteerError("not_a_demonstration", f"{path} holds no {', '.join(sorted(missing))}")
    except (OSError, KeyError, ValueError, RuntimeError) as e:
        raise SteerError(
            "torn_file",
            f"{path} is torn or damaged ({type(e).__name__}: {str(e)[:80]}); delete it and run `steer data record` again, "
            "which records only what is missing",
        ) from None
    # A checksum needs all arrays.
    if verify and only is None and attributes.get("checksum") != _checksum(found):
        raise SteerError(
            "torn_file",
            f"{path} has changed since it was recorded: its checksum does not fit; delete it and run `steer data record` "
            "again, which records only what is missing",
        )
    return Demonstration(path, name, found, attributes)


def episodes_in(folder: Path) -> list[Path]:
    """Files of all episodes below a recording folder, in order of their numbers. Raises SteerError('no_recording')."""
    files = sorted((folder / "episodes").glob("*/demo_*.hdf5"), key=lambda p: (p.parent.name, number(p)))
    if not files:
        raise SteerError("no_recording", f"{folder} holds no recorded episodes; record some with `steer data record`")
    return files


def number(path: Path) -> int:
    """12 of '.../demo_12.hdf5'."""
    return int(path.name.removeprefix("demo_").split(".")[0])


def iterate(folder: Path, *, only: frozenset[str] | None = None) -> Iterator[Demonstration]:
    """All episodes of a recording, one after the other."""
    for path in episodes_in(folder):
        yield read(path, only=only)


def write_indices(folder: Path) -> list[Path]:
    """(Re)write `<task>_demo.hdf5` of each task: external links to its episodes, and LIBERO's attributes of the file."""
    import h5py

    out = []
    for task in sorted(p for p in (folder / "episodes").glob("*") if p.is_dir()):
        files = sorted(task.glob("demo_*.hdf5"), key=number)
        if not files:
            continue
        with h5py.File("index.hdf5", "w", driver="core", backing_store=False) as file:
            data = file.create_group("data")
            total = 0
            for path in files:
                with h5py.File(path, "r") as episode:
                    (name,) = episode["data"].keys()
                    total += int(episode["data"][name].attrs["num_samples"])
                    if not data.attrs:
                        data.attrs.update(episode["data"].attrs)
                data[name] = h5py.ExternalLink(f"episodes/{task.name}/{path.name}", f"/data/{name}")
            data.attrs["num_demos"], data.attrs["total"] = len(files), total
            file.flush()
            content = bytes(file.id.get_file_image())
        index = folder / f"{task.name}_demo.hdf5"
        write_atomically(index, content)
        out.append(index)
    return out


def as_seen(images: np.ndarray) -> np.ndarray:
    """Recorded images [..., H, W, 3] turned by 180 degrees: what policies see."""
    return images[..., ::-1, ::-1, :]


def _checksum(arrays: Arrays) -> str:
    total = 0
    for path in sorted(arrays):
        array = np.ascontiguousarray(arrays[path])
        total = zlib.crc32(f"{path}{array.dtype.str}{array.shape}".encode(), total)
        total = zlib.crc32(array.tobytes(), total)
    return f"{total:08x}"


def _plain(value: Any) -> Any:
    if isinstance(value, bytes):
        return value.decode()
    return value.item() if isinstance(value, np.generic) else value


def dump(value: object) -> str:
    """JSON of an attribute, keys sorted."""
    return json.dumps(value, sort_keys=True)
