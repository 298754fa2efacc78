"""Fills a file of the cache with chunks that can be told from their numbers, for as long as it lives."""

from __future__ import annotations

import ctypes
import hashlib
import os
import time
from threading import Thread

from erofs_twisted.blocks.blobfile import BlobFile
from erofs_twisted.blocks.chunks import Chunking, ChunkMap
from erofs_twisted.blocks.header import BlobIdentity
from erofs_twisted.registry.digest import Digest

COUNT = 2048
CHUNK = 4096
IDENTITY = BlobIdentity(Digest.of(b"its bytes are not compared with it"), Chunking(COUNT * CHUNK, CHUNK))
RUN = 16
"""Chunks that are written at a time."""
WRITE_AND_WAIT = 7
"""SYNC_FILE_RANGE_WAIT_BEFORE, _WRITE and _WAIT_AFTER, of linux/fs.h."""
LIBC = ctypes.CDLL(None, use_errno=True)
PAUSE = 0.005
"""Seconds from one run to the next, and half of those from one sync to the next."""


def chunk(number: int) -> bytes:
    """What a chunk holds; none is zeros."""
    return hashlib.sha256(b"%d" % number).digest() * (CHUNK // 32)


def fill(path: str) -> None:
    """Go on where it was left, or make it; and sync it all the while, in threads."""
    if os.path.exists(path):
        file, there = BlobFile.open(path, IDENTITY)
    else:
        file, there = BlobFile.create(path, IDENTITY), ChunkMap(COUNT)

    def write() -> None:
        for start, stop in list(there.runs_missing(0, COUNT)):
            for first in range(start, stop, RUN):
                end = min(first + RUN, stop)
                file.write(first, end, [chunk(number) for number in range(first, end)])
                there.set(first, end)
                # The kernel may bring pages on disk in any order. Here the marks come before their bytes.
                offset, length = ctypes.c_int64(IDENTITY.marks_offset), ctypes.c_int64(COUNT)
                if LIBC.sync_file_range(file.fd, offset, length, WRITE_AND_WAIT):
                    raise OSError(ctypes.get_errno(), "sync_file_range")
                time.sleep(PAUSE)

    def sync() -> None:
        while True:
            file.sync(there.copy())
            time.sleep(2 * PAUSE)

    for each in (write, sync):
        Thread(target=each, daemon=True).start()
