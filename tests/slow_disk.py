"""A disk that takes its time: a file, in a file system of user space, each read of which waits a while.

nbdkit holds every read back, nbdfuse shows it as a file; between the two and whoever reads there is the
kernel's page cache, as over any disk.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
import time
from pathlib import Path
from types import TracebackType
from typing import Self

from tests.nbd_tools import READY_SECONDS, tool


class SlowDisk:
    """Holds ``content`` as the file `path` for as long as a ``with`` block lasts, none of it in memory;
    each read of it from the disk takes ``seconds``."""

    def __init__(self, content: bytes, seconds: float) -> None:
        self._content = content
        self._delay = f"{seconds * 1000:.0f}ms"

    def __enter__(self) -> Self:
        self._directory = Path(tempfile.mkdtemp(prefix="erofs-twisted-test-"))
        backing, mounted = self._directory / "backing", self._directory / "file"
        backing.write_bytes(self._content)
        mounted.touch()
        self.path = str(mounted)
        nbdkit = [tool("nbdkit"), "-s", "--exit-with-parent", "--readonly", "--filter=delay", "file"]
        self._process = subprocess.Popen(
            [tool("nbdfuse"), "-r", self.path, "--command", *nbdkit, str(backing), f"rdelay={self._delay}"],
            stdin=subprocess.DEVNULL,
        )
        deadline = time.monotonic() + READY_SECONDS
        while mounted.stat().st_size != len(self._content):
            if self._process.poll() is not None or time.monotonic() > deadline:
                self.__exit__(None, None, None)
                raise RuntimeError("nbdfuse does not mount a file")
            time.sleep(0.02)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._process.poll() is None:
            subprocess.run([tool("fusermount3"), "-u", "-z", self.path], check=True)
        try:
            self._process.wait(10)
        finally:
            self._process.kill()
            self._process.wait()
            shutil.rmtree(self._directory)


def drop(path: str) -> None:
    """Have nothing of a file in memory that has not been changed lately."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(descriptor)
