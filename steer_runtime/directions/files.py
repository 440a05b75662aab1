"""Files of strangers read, and files of ours written.

Invariant: a read is of a regular file, of bounded size, once, into memory; a write is whole or absent.
"""

from __future__ import annotations

import errno
import os
import stat
import tempfile
from pathlib import Path

from steer_runtime.errors import SteerError


def read_file(path: Path, limit: int, *, follow: bool = False) -> bytes:
    """All bytes of a regular file. Blocks on no pipe and reads no more than `limit`; follows a link only when told to.

    Raises SteerError('bad_file').
    """
    nofollow = 0 if follow else os.O_NOFOLLOW
    try:
        descriptor = os.open(path, os.O_RDONLY | nofollow | os.O_NONBLOCK | os.O_CLOEXEC)
    except (OSError, ValueError) as why:  # ValueError: a path with a null byte
        if isinstance(why, OSError) and why.errno == errno.ELOOP:
            raise SteerError(
                "bad_file", f"{path.name!r} is a symbolic link, which may lead out of the store: copy the file itself"
            ) from why
        reason = why.strerror if isinstance(why, OSError) else str(why)
        raise SteerError("bad_file", f"{path.name!r} cannot be read ({reason})") from why
    with os.fdopen(descriptor, "rb") as file:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise SteerError(
                "bad_file", f"{path.name!r} is not a regular file: expected a file with a direction's data"
            )
        content = file.read(limit + 1)
    if len(content) > limit:
        raise SteerError(
            "bad_file", f"{path.name!r} is larger than {limit} bytes, more than any direction needs; refused unread"
        )
    return content


def write_atomically(path: Path, content: bytes) -> None:
    """Put `content` at `path` so that a reader sees all of it or none. Raises SteerError('not_written')."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=".", suffix=".part")
        try:
            with os.fdopen(descriptor, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            # mkstemp makes files private; a direction is shared like any other file of the project.
            os.chmod(temporary, 0o644)
            os.replace(temporary, path)
        except BaseException:
            os.unlink(temporary)
            raise
    except OSError as why:
        raise SteerError(
            "not_written", f"{path.name!r} could not be written to {path.parent} ({why.strerror})"
        ) from why
