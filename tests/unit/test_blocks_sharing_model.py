"""Two processes, one file, and all that can happen to them: what the cache serves is right, or not there."""

from __future__ import annotations

import errno
import os
import random
import tempfile
from typing import Any
from unittest import mock

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from twisted.trial.unittest import SynchronousTestCase

from erofs_twisted.blocks import blobfile
from erofs_twisted.blocks.cached import FLUSH_SECONDS, CachedBlob
from tests.unit.blobs import ThreadlessReactor, open_cached
from tests.unit.test_blocks_crash import (
    CHUNK,
    COUNT,
    DATA,
    NAME,
    Recorder,
    Write,
    after_crash,
    put_file,
    store,
)

SLOTS = st.integers(0, 1)
CHUNKS = st.integers(0, COUNT - 1)
SPANS = st.tuples(CHUNKS, CHUNKS).map(lambda pair: (min(pair), max(pair) + 1))


class FailingDisk(Recorder):
    """A disk whose errors each open file hears of once, as the kernel has it (errseq); also one that is
    opened later, as long as none has."""

    def __init__(self) -> None:
        super().__init__()
        self.unheard: set[int] = set()
        self.nobody_has_heard = False

    def fdatasync(self, fd: int) -> None:
        if fd in self.unheard:
            self.unheard.discard(fd)
            self.nobody_has_heard = False
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        super().fdatasync(fd)


class SharingMachine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.directory = tempfile.TemporaryDirectory()
        os.chmod(self.directory.name, 0o700)
        self.disk = FailingDisk()
        self.boot = 0
        self.patches = [
            mock.patch.object(blobfile, "os", self.disk),
            mock.patch.object(blobfile, "boot_id", lambda: b"%036d" % self.boot),
        ]
        for patch in self.patches:
            patch.start()
        self.before = b""
        """The file at the last power cut; since then see the operations."""
        self.reactors = [ThreadlessReactor(), ThreadlessReactor()]
        self.processes: list[CachedBlob | None] = [None, None]
        self.claims: list[set[int]] = [set(), set()]
        self.stored: set[int] = set()
        """What must be there for every process of this boot."""

    def teardown(self) -> None:
        self.disk.unheard.clear()
        for slot in range(2):
            self.kill(slot)
        for patch in self.patches:
            patch.stop()
        self.directory.cleanup()

    def process(self, slot: int) -> CachedBlob:
        """A process, which is started if there is none."""
        cached = self.processes[slot]
        if cached is None:
            cached = open_cached(self.directory.name, DATA, chunk_size=CHUNK, reactor=self.reactors[slot])
            self.processes[slot] = cached
            if self.disk.nobody_has_heard:
                self.disk.unheard.add(cached.fd)
            if not self.disk.unheard:
                self.check_that_nothing_is_lost(cached)
        return cached

    def check_that_nothing_is_lost(self, cached: CachedBlob) -> None:
        cached.refresh(0, COUNT)
        missing = [chunk for chunk in self.stored if not cached.chunks.present(chunk, chunk + 1)]
        assert not missing, f"chunks {missing} were stored in this boot"

    @rule(slot=SLOTS, chunk=CHUNKS)
    def fetch(self, slot: int, chunk: int) -> None:
        store(self.process(slot), chunk)
        self.stored.add(chunk)

    @rule(slot=SLOTS)
    def refresh(self, slot: int) -> None:
        cached = self.process(slot)
        if not self.disk.unheard:
            self.check_that_nothing_is_lost(cached)

    @rule(slot=SLOTS, span=SPANS)
    def claim(self, slot: int, span: tuple[int, int]) -> None:
        wanted = set(range(*span))
        granted = self.process(slot).claim(*span)
        assert granted == (not wanted & self.claims[not slot])
        if granted:
            self.claims[slot] |= wanted

    @rule(slot=SLOTS, span=SPANS)
    def release(self, slot: int, span: tuple[int, int]) -> None:
        self.process(slot).release(*span)
        self.claims[slot] -= set(range(*span))

    @rule(slot=SLOTS)
    def flush(self, slot: int) -> None:
        self.process(slot)
        self.let_time_pass(slot)

    @rule(slot=SLOTS, chunk=CHUNKS)
    def flush_while_the_other_fetches(self, slot: int, chunk: int) -> None:
        other = self.process(1 - slot)
        self.process(slot)
        self.disk.during_sync = lambda: store(other, chunk)
        self.let_time_pass(slot)
        if self.disk.during_sync is None:
            self.stored.add(chunk)
        self.disk.during_sync = None

    def let_time_pass(self, slot: int) -> None:
        before = len(self.disk.unheard)
        self.reactors[slot].advance(FLUSH_SECONDS)
        if len(self.disk.unheard) < before:
            # What was fresh is gone, also what was written since.
            self.stored.clear()

    @rule(slot=SLOTS)
    def close(self, slot: int) -> None:
        cached = self.processes[slot]
        if cached is not None:
            heard = cached.fd in self.disk.unheard
            self.processes[slot] = None
            self.claims[slot] = set()
            self.reactors[slot] = ThreadlessReactor()
            cached.close()
            if heard:
                self.disk.unheard.discard(cached.fd)
                self.stored.clear()

    @rule(slot=SLOTS)
    def kill(self, slot: int) -> None:
        cached = self.processes[slot]
        if cached is not None and not (cached.fd in self.disk.unheard and len(self.disk.unheard) == 1):
            self.processes[slot] = None
            self.claims[slot] = set()
            self.reactors[slot] = ThreadlessReactor()
            self.disk.unheard.discard(cached.fd)
            os.close(cached.fd)

    @rule(chance=st.randoms(use_true_random=False), back=st.integers(0, 6))
    def cut_the_power(self, chance: random.Random, back: int) -> None:
        self.disk.unheard.clear()
        self.disk.nobody_has_heard = False
        for slot in range(2):
            self.kill(slot)
        done = self.disk.operations[: max(len(self.disk.operations) - back, 0)]
        self.before = after_crash(self.before, done, chance)
        self.disk.operations.clear()
        put_file(self.directory.name, self.before)
        self.boot += 1
        self.stored.clear()

    @precondition(lambda self: any(self.processes) and not self.disk.unheard)
    @rule(chance=st.randoms(use_true_random=False))
    def lose_what_is_not_written(self, chance: random.Random) -> None:
        """The disk fails to write; the page cache lets go of the pages, or of some."""
        operations = self.disk.operations
        syncs = [index for index, operation in enumerate(operations) if not isinstance(operation, Write)]
        safe = syncs[-1] + 1 if syncs else 0
        path = os.path.join(self.directory.name, "sha256", NAME)
        on_disk = after_crash(self.before, operations[:safe], random.Random(0))
        for operation in operations[safe:]:
            assert isinstance(operation, Write)
            if operation.offset < len(DATA) and chance.random() < 0.5:
                end = operation.offset + len(operation.data)
                with open(path, "r+b") as file:
                    file.seek(operation.offset)
                    file.write(on_disk[operation.offset : end])
                operations.remove(operation)
        self.disk.unheard = {cached.fd for cached in self.processes if cached is not None}
        self.disk.nobody_has_heard = True
        self.stored.clear()

    @invariant()
    def what_is_there_is_right(self) -> None:
        if self.disk.unheard:
            return  # until they hear of it, what they have may be gone
        for cached in self.processes:
            if cached is not None:
                assert cached.error is None
                for first, end in cached.chunks.runs_present(0, COUNT):
                    start, stop = first * CHUNK, min(end * CHUNK, len(DATA))
                    assert os.pread(cached.fd, stop - start, start) == DATA[start:stop]


class SharingTests(SynchronousTestCase):
    def test_no_wrong_byte_is_served_and_nothing_is_lost_that_need_not_be(self) -> None:
        run_state_machine_as_test(  # type: ignore[no-untyped-call]
            SharingMachine, settings=settings(max_examples=120, stateful_step_count=30, deadline=None)
        )

    def test_what_another_process_hears_of_the_disk_counts_for_all(self) -> None:
        machine: Any = SharingMachine()
        try:
            machine.fetch(0, 3)
            machine.refresh(1)
            machine.lose_what_is_not_written(random.Random(1))
            machine.flush(0)
            machine.flush(1)
            machine.what_is_there_is_right()
        finally:
            machine.teardown()
