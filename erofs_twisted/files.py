"""Files that are replaced in one step, and what of it is on disk. All of it blocks."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

UNFINISHED = ".new-"
"""How the name of a file begins that is about to get another one."""


def replace_file(path: str, content: bytes, *, durable: bool) -> None:
    """Put ``content`` at ``path``, in the place of what was there and for this user alone: all, or nothing.

    The directory is made where it is missing. With ``durable`` the content is on disk before it has the
    name, and has it for good when this returns; without, a crash of the system may leave less of it. Raises
    OSError.
    """
    directory = os.path.dirname(path)
    os.makedirs(directory, 0o700, exist_ok=True)
    fd, temporary = tempfile.mkstemp(prefix=UNFINISHED, dir=directory)
    try:
        with open(fd, "wb") as file:
            file.write(content)
            file.flush()
            if durable:
                os.fsync(file.fileno())
        os.rename(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise
    if durable:
        sync_directory(directory)


def remove_unfinished(directory: Path) -> None:
    """What a kill or a crash has left of `replace_file`, which nobody may be at there. Raises OSError."""
    for path in directory.glob(f"{UNFINISHED}*"):
        path.unlink(missing_ok=True)


def make_directory(path: Path) -> None:
    """Make a directory for this user alone, and those above it, as far as they are missing: they are there
    for good when this returns. Raises OSError."""
    missing = [each for each in path.parents if not each.exists()]
    path.mkdir(mode=0o700, parents=True, exist_ok=True)
    # One that was there may not be for good: who made it may have been killed.
    for each in (path, *missing):
        sync_directory(each.parent)


def sync_directory(path: str | Path) -> None:
    """Have what came to a directory, and what left it, on disk when this returns. Raises OSError."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
