"""What messages look like, as text: a recording carries it, so that it can be read without ROS and by later versions.

Invariant: nothing here imports ROS.
"""

from __future__ import annotations

import os
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rosbags.typesys import Stores, TypesysError, get_types_from_msg, get_typestore

from steer_runtime.errors import SteerError

OWN = "steer_msgs"


def message_store() -> Any:
    """Definitions of ROS's own messages and of ours. Raises SteerError('no_messages') where ours are not installed."""
    store = get_typestore(Stores.LATEST)
    for folder in _folders():
        files = sorted(folder.glob("*.msg"))
        for file in files:
            store.register(get_types_from_msg(file.read_text(encoding="utf-8"), f"{OWN}/msg/{file.stem}"))
        if files:
            return store
    raise SteerError("no_messages", f"the definitions of {OWN} are not found: build it, with colcon or its build.sh")


def definition_of(store: Any, kind: str) -> str | None:
    """Definition of a message type ("std_msgs/msg/String") and of all that it contains; None where it is unknown."""
    try:
        return str(store.generate_msgdef(kind, ros_version=2)[0])
    except (KeyError, TypesysError):
        return None


def store_of(definitions: dict[str, str]) -> Any:
    """A store that knows the types of a recording by the recording's own definitions.

    Raises SteerError('bad_recording').
    """
    store = get_typestore(Stores.EMPTY)
    for kind, text in definitions.items():
        try:
            store.register(get_types_from_msg(text, kind))
        except TypesysError as error:
            raise SteerError(
                "bad_recording", f"the recording defines {kind} in a way that cannot be read: {error}"
            ) from (None)
    return store


def _folders() -> Iterator[Path]:
    """Where our definitions may be: beside what is imported first, then the source tree."""
    roots = [*os.environ.get("AMENT_PREFIX_PATH", "").split(os.pathsep), sysconfig.get_path("data")]
    for root in filter(None, roots):
        yield Path(root) / "share" / OWN / "msg"
    yield Path(__file__).parents[1] / OWN / "msg"
