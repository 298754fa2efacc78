"""Files that are replaced in one step. All of it blocks."""

from __future__ import annotations

import os
import tempfile


def replace_file(path: str, content: bytes, *, durable: bool) -> None:
    """Put ``content`` at ``path``, in the place of what was there and for this user alone: all, or nothing.

    The directory is made where it is missing. With ``durable`` the content is on disk before it has the
    name, and has it for good when this returns; without, a crash of the system may leave less of it. Raises
    OSError.
    """
    directory = os.path.dirname(path)
    os.makedirs(directory, 0o700, exist_ok=True)
    fd, temporary = tempfile.mkstemp(prefix=".", dir=directory)
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


def sync_directory(path: str) -> None:
    """Have the names in a directory on disk for good. Raises OSError."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
