"""A reader of its own process, that reads a file here and there past the page cache, and compares."""

from __future__ import annotations

import errno
import json
import mmap
import os
import random
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

PIECE = 128 * 1024
PATIENCE = 60.0
REST = 0.01
"""Seconds between two reads, where much else is to be done meanwhile by a single processor."""


class Reader:
    """Reads ``path`` until `end`, and compares with ``original``; what is wrong ends it, with a status. It
    rests for so many seconds after each read: without, it takes all of a processor."""

    def __init__(self, path: Path, original: Path, seed: int, rest: float = 0.0) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-S", __file__, str(path), str(original), str(seed), str(rest)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self._process.stdout is not None
        self._process.stdout.readline()

    @property
    def runs(self) -> bool:
        return self._process.poll() is None

    def end(self, error: str = "") -> dict[str, Any]:
        """``reads``, and the ``pauses``: how long each took, in seconds, the longest first. With ``error``,
        as EIO, it must have ended by that; without, it is told to end."""
        if error:
            self._process.wait()
        said, _ = self._process.communicate()
        if self._process.returncode != 0:
            raise AssertionError(f"a reader ended with status {self._process.returncode}: {said}")
        found = dict(json.loads(said))
        if found["error"] != error:
            raise AssertionError(f"a reader ended with {found['error'] or 'no error'}, not {error or 'none'}")
        return found

    def kill(self) -> None:
        self._process.kill()
        # It cannot end while it waits for a daemon that is not there.
        self._process.communicate(timeout=PATIENCE)


def main(path: str, original: str, seed: str, rest: str) -> None:
    chosen = random.Random(int(seed))
    expected = Path(original).read_bytes()
    fd = os.open(path, os.O_RDONLY | os.O_DIRECT)
    buffer = mmap.mmap(-1, PIECE)
    os.set_blocking(0, False)
    print(flush=True)
    pauses: list[float] = []
    error = ""
    while not _has_ended():
        offset = 4096 * chosen.randrange((len(expected) - PIECE) // 4096)
        began = time.monotonic()
        try:
            read = os.preadv(fd, [buffer], offset)
        except OSError as failed:
            error = errno.errorcode[failed.errno or 0]
            break
        pauses.append(time.monotonic() - began)
        if read != PIECE or buffer[:] != expected[offset : offset + PIECE]:
            sys.exit(f"wrong at {offset}")
        time.sleep(float(rest))
    pauses.sort(reverse=True)
    print(json.dumps({"reads": len(pauses), "pauses": pauses[:1000], "error": error}))


def _has_ended() -> bool:
    """Has our standard input?"""
    try:
        return os.read(0, 1) == b""
    except BlockingIOError:
        return False


if __name__ == "__main__":
    main(*sys.argv[1:])
