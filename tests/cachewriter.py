"""Fills a file of the cache with chunks that can be told from their numbers, until the process is killed."""

from __future__ import annotations

import ctypes
import hashlib
import time
from collections.abc import Callable
from pathlib import Path
from threading import Thread

from erofs_twisted.blocks.blobfile import BlobFile
from erofs_twisted.blocks.chunks import Chunking, ChunkMap
from erofs_twisted.blocks.header import BlobIdentity
from erofs_twisted.registry.digest import Digest

COUNT = 8192
CHUNK = 4096
IDENTITY = BlobIdentity(Digest.of(b"its bytes are not compared with it"), Chunking(COUNT * CHUNK, CHUNK))
RUN = 16
"""Chunks that are written at a time."""
WRITE_AND_WAIT = 7
"""SYNC_FILE_RANGE_WAIT_BEFORE, _WRITE and _WAIT_AFTER, of linux/fs.h."""
LIBC = ctypes.CDLL(None, use_errno=True)
PAUSE = 0.005
"""Seconds from one run to the next."""


def chunk(number: int) -> bytes:
    """What a chunk holds; none is zeros."""
    return hashlib.sha256(b"%d" % number).digest() * (CHUNK // 32)


def main(path: Path, say: Callable[[str], object]) -> None:
    """Say how many chunks are missing, for each sync that is done."""
    file, there = BlobFile.create(str(path), IDENTITY), ChunkMap(COUNT)

    def write() -> None:
        for first in range(0, COUNT, RUN):
            file.write(first, first + RUN, [chunk(number) for number in range(first, first + RUN)])
            there.set(first, first + RUN)
            # The kernel may bring pages on disk in any order. Here the marks come before their bytes.
            offset, length = ctypes.c_int64(IDENTITY.marks_offset), ctypes.c_int64(COUNT)
            if LIBC.sync_file_range(file.fd, offset, length, WRITE_AND_WAIT):
                raise OSError(ctypes.get_errno(), "sync_file_range")
            time.sleep(PAUSE)

    Thread(target=write, daemon=True).start()
    while True:
        file.sync(there.copy())
        say(str(there.missing))
        time.sleep(10 * PAUSE)
