"""Pull the plug after any write: what the cache then says is there, is there.

A disk may have done any of the writes since the last sync, and left out others.
"""

from __future__ import annotations

import os
import random
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import attrs
from hypothesis import given, settings
from hypothesis import strategies as st
from twisted.trial.unittest import SynchronousTestCase

from erofs_twisted.blocks import blobfile
from erofs_twisted.blocks.blobfile import BlobFile
from erofs_twisted.blocks.cached import CachedBlob
from erofs_twisted.blocks.chunks import Chunking, ChunkMap
from erofs_twisted.blocks.header import BlobIdentity, DamagedFile
from erofs_twisted.registry.digest import Digest
from tests.unit.blobs import blob, digest_of, open_cached

CHUNK = 512
DATA = blob(11 * CHUNK + 7)
WRONG = blob(len(DATA), seed=1)
COUNT = 12
NAME = digest_of(DATA).partition(":")[2]


@attrs.frozen
class Write:
    offset: int
    data: bytes


@attrs.frozen
class Truncate:
    """Done to a new file only."""

    size: int


class Sync:
    """All that came before is safe."""


Operation = Write | Truncate | Sync


class Recorder:
    """The module os, keeping what is done to the one file that changes."""

    def __init__(self) -> None:
        self.operations: list[Operation] = []
        self.during_sync: Callable[[], None] | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(os, name)

    def pwritev(self, fd: int, pieces: Sequence[bytes | memoryview], offset: int) -> int:
        self.operations.append(Write(offset, b"".join(pieces)))
        return os.pwritev(fd, pieces, offset)

    def ftruncate(self, fd: int, size: int) -> None:
        self.operations.append(Truncate(size))
        os.ftruncate(fd, size)

    def fdatasync(self, fd: int) -> None:
        os.fdatasync(fd)
        self.operations.append(Sync())
        if self.during_sync is not None:
            # What another thread or process does before the marks are written.
            during_sync, self.during_sync = self.during_sync, None
            during_sync()


def after_crash(before: bytes, operations: list[Operation], chance: random.Random) -> bytes:
    """A file's bytes after a crash: what was synced, and most of the rest, as chance has it."""
    syncs = [index for index, operation in enumerate(operations) if isinstance(operation, Sync)]
    safe = syncs[-1] if syncs else 0
    disk = bytearray(before)
    for index, operation in enumerate(operations):
        if isinstance(operation, Sync) or (index >= safe and chance.random() < 0.25):
            continue
        if isinstance(operation, Truncate):
            disk[:] = bytes(operation.size)
        else:
            end = operation.offset + len(operation.data)
            disk.extend(bytes(max(end - len(disk), 0)))
            disk[operation.offset : end] = operation.data
    return bytes(disk)


@contextmanager
def recorded() -> Iterator[tuple[str, Recorder]]:
    recorder = Recorder()
    with tempfile.TemporaryDirectory() as directory, mock.patch.object(blobfile, "os", recorder):
        os.chmod(directory, 0o700)
        yield directory, recorder


def put_file(directory: str, data: bytes) -> None:
    (Path(directory) / "sha256").mkdir(exist_ok=True)
    (Path(directory) / "sha256" / NAME).write_bytes(data)


def reopen(directory: str) -> tuple[BlobFile, ChunkMap] | None:
    """The file as the next process finds it after the crash, if it is not too damaged to be used."""
    path = Path(directory) / "sha256" / NAME
    identity = BlobIdentity(Digest(digest_of(DATA)), Chunking(len(DATA), CHUNK))
    with mock.patch.object(blobfile, "boot_id", lambda: b"the next".ljust(36)):
        try:
            return BlobFile.open(str(path), identity)
        except DamagedFile:
            return None


def store(cached: CachedBlob, chunk: int, data: bytes = DATA) -> None:
    start, end = cached.chunking.start(chunk), cached.chunking.start(chunk + 1)
    cached.store(chunk, [data[start:end]])


ACTIONS = st.lists(
    st.tuples(
        st.sampled_from(("store", "flush", "flush and store")), st.booleans(), st.integers(0, COUNT - 1)
    ),
    max_size=20,
)


class CrashTests(SynchronousTestCase):
    @settings(max_examples=40, deadline=None)
    @given(ACTIONS, st.randoms(use_true_random=False))
    def test_what_two_processes_marked_is_there_after_a_crash_at_any_write(
        self, actions: list[tuple[str, bool, int]], chance: random.Random
    ) -> None:
        with recorded() as (directory, recorder):
            processes = [open_cached(directory, DATA, chunk_size=CHUNK) for _ in range(2)]
            for action, which, chunk in actions:
                if action == "flush and store":
                    recorder.during_sync = partial(store, processes[not which], chunk)
                if action == "store":
                    store(processes[which], chunk)
                else:
                    processes[which].flush()
            for process in processes:
                process.close()
            for cut in range(len(recorder.operations) + 1):
                for _ in range(4):
                    put_file(directory, after_crash(b"", recorder.operations[:cut], chance))
                    found = reopen(directory)
                    if found is None:
                        continue
                    file, chunks = found
                    for first, end in chunks.runs_present(0, COUNT):
                        start, stop = first * CHUNK, min(end * CHUNK, len(DATA))
                        self.assertEqual(DATA[start:stop], os.pread(file.fd, stop - start, start))
                    file.close()

    @settings(max_examples=300, deadline=None)
    @given(st.randoms(use_true_random=False))
    def test_a_blob_passes_for_verified_only_if_its_bytes_are_right(self, chance: random.Random) -> None:
        with recorded() as (directory, recorder):
            disk = b""
            # The first time all goes well until the crash. Then the origin serves other bytes, and the plug
            # is pulled before the hash is done.
            for origin, hashed in ((DATA, True), (WRONG, False)):
                with nullcontext() if hashed else mock.patch.object(BlobFile, "verify", return_value=False):
                    cached = open_cached(directory, DATA, chunk_size=CHUNK)
                    for first, end in list(cached.chunks.runs_missing(0, COUNT)):
                        for chunk in range(first, end):
                            store(cached, chunk, origin)
                    cached.close()
                cut = len(recorder.operations) - chance.randrange(4)
                disk = after_crash(disk, recorder.operations[: max(cut, 0)], chance)
                recorder.operations.clear()
                put_file(directory, disk)
            found = reopen(directory)
            if found is None:
                return
            file, chunks = found
            if file.verified:
                self.assertTrue(chunks.complete)
                self.assertEqual(DATA, os.pread(file.fd, len(DATA), 0))
            file.close()
