"""Any readers, any origin, in any order: out come the right bytes or an error, and each reader hears it."""

from __future__ import annotations

import os
import tempfile
from typing import Any

import attrs
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    consumes,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from twisted.internet.defer import CancelledError, Deferred
from twisted.python.failure import Failure
from twisted.trial.unittest import SynchronousTestCase

from erofs_twisted.blocks.queue import LIMIT
from erofs_twisted.blocks.readahead import ByteRange
from erofs_twisted.blocks.source import BlobSource
from erofs_twisted.errors import ReadError
from erofs_twisted.interfaces import FileSpan
from tests.unit.blobs import ScriptedOrigin, ThreadlessReactor, Transfer, blob, open_cached

CHUNK = 16
DATA = blob(20 * CHUNK + 5)


@attrs.define(eq=False)
class Reader:
    """A read that was not answered at once."""

    offset: int
    length: int
    answer: Deferred[Any]
    outcome: Any = None


class Advice:
    """Advice that the machine makes up."""

    def __init__(self) -> None:
        self.next: list[ByteRange] = []

    def advise(self, offset: int, length: int, missing: bool) -> list[ByteRange]:
        advice, self.next = self.next, []
        return advice


def ranges() -> st.SearchStrategy[tuple[int, int]]:
    return st.integers(0, len(DATA) - 1).flatmap(
        lambda offset: st.tuples(st.just(offset), st.integers(1, min(len(DATA) - offset, 6 * CHUNK)))
    )


class BlobSourceMachine(RuleBasedStateMachine):
    readers: Bundle[Reader] = Bundle("readers")

    def __init__(self) -> None:
        super().__init__()
        self.directory = tempfile.TemporaryDirectory()
        self.origin = ScriptedOrigin(DATA)
        self.advice = Advice()
        self.cached = open_cached(self.directory.name, DATA, chunk_size=CHUNK)
        self.source = BlobSource(self.origin, self.cached, ThreadlessReactor(), self.advice)
        self.waiting: list[Reader] = []
        self.delivered: dict[int, int] = {}
        self.excused: set[int] = set()
        """Bytes that a failed or cancelled transfer had brought of a chunk that it did not complete."""

    def teardown(self) -> None:
        for transfer in list(self.origin.transfers):
            self.note_loss(transfer)
        closed: list[None] = []
        self.source.close().addCallback(closed.append)
        assert closed == [None]
        for reader in self.waiting:
            assert isinstance(reader.outcome, ReadError), "close left a reader waiting"
        assert not self.origin.live, "close left a transfer running"
        for byte, times in self.delivered.items():
            assert times == 1 or byte in self.excused, f"byte {byte} was fetched {times} times"
        self.directory.cleanup()

    @rule(target=readers, span=ranges(), advice=st.lists(ranges(), max_size=3))
    def read(self, span: tuple[int, int], advice: list[tuple[int, int]]) -> Reader:
        offset, length = span
        self.advice.next = [(start, start + size) for start, size in advice]
        answer = self.source.read(offset, length)
        reader = Reader(offset, length, answer if isinstance(answer, Deferred) else Deferred())
        if isinstance(answer, Deferred):
            self.waiting.append(reader)
            reader.answer.addCallbacks(lambda segments: self.answered(reader, segments), self.failed(reader))
        else:
            self.answered(reader, answer)
        return reader

    @rule(target=readers, span=ranges())
    def prefetch(self, span: tuple[int, int]) -> Reader:
        reader = Reader(*span, self.source.prefetch(*span))
        self.waiting.append(reader)
        reader.answer.addCallbacks(lambda _: self.prefetched(reader), self.failed(reader))
        return reader

    @rule(reader=consumes(readers))
    def cancel(self, reader: Reader) -> None:
        before = set(self.origin.live)
        if reader in self.waiting:
            reader.answer.cancel()
            assert isinstance(reader.outcome, CancelledError)
        for transfer in before - set(self.origin.live):
            self.note_loss(transfer)

    @precondition(lambda self: self.origin.live)
    @rule(data=st.data())
    def send(self, data: st.DataObject) -> None:
        transfer = data.draw(st.sampled_from(self.origin.live))
        left = transfer.length - transfer.position
        if left:
            self.deliver(transfer, data.draw(st.integers(1, left)))

    @precondition(lambda self: self.origin.live)
    @rule(data=st.data())
    def finish(self, data: st.DataObject) -> None:
        transfer = data.draw(st.sampled_from(self.origin.live))
        if transfer.position < transfer.length:
            self.deliver(transfer, transfer.length - transfer.position)
        if transfer.live:
            transfer.done.callback(None)

    @precondition(lambda self: self.origin.live)
    @rule(data=st.data(), error=st.sampled_from((ReadError("down"), None, "too much")))
    def break_off(self, data: st.DataObject, error: Any) -> None:
        transfer = data.draw(st.sampled_from(self.origin.live))
        self.note_loss(transfer)
        if error == "too much":
            transfer.deliver(bytes(transfer.length - transfer.position + 1))
        elif error is None:
            transfer.done.callback(None)
        else:
            transfer.done.errback(error)

    @invariant()
    def what_is_marked_is_right(self) -> None:
        chunks = self.cached.chunks
        for first, end in chunks.runs_present(0, len(chunks)):
            start, stop = first * CHUNK, min(end * CHUNK, len(DATA))
            assert os.pread(self.cached.fd, stop - start, start) == DATA[start:stop]

    @invariant()
    def whoever_waits_waits_for_a_transfer(self) -> None:
        if self.waiting:
            assert self.origin.live, "a reader was forgotten"

    @invariant()
    def no_two_transfers_carry_the_same_byte(self) -> None:
        coming = [
            chunk
            for transfer in self.origin.live
            for chunk in range(
                (transfer.offset + transfer.position) // CHUNK,
                -(-(transfer.offset + transfer.length) // CHUNK),
            )
            if transfer.position < transfer.length
        ]
        assert len(coming) == len(set(coming))

    @invariant()
    def no_more_transfers_run_than_allowed(self) -> None:
        assert len(self.origin.live) <= LIMIT

    def deliver(self, transfer: Transfer, length: int) -> None:
        start = transfer.offset + transfer.position
        for byte in range(start, start + length):
            self.delivered[byte] = self.delivered.get(byte, 0) + 1
        transfer.send(length)

    def note_loss(self, transfer: Transfer) -> None:
        """The start of a chunk came, the rest will not."""
        at = transfer.offset + transfer.position
        self.excused.update(range(at // CHUNK * CHUNK, at))

    def answered(self, reader: Reader, segments: list[Any]) -> None:
        found = b"".join(
            os.pread(part.fd, part.length, part.offset) if isinstance(part, FileSpan) else part
            for part in segments
        )
        assert found == DATA[reader.offset : reader.offset + reader.length], "wrong bytes"
        self.settle(reader, found)

    def prefetched(self, reader: Reader) -> None:
        first, end = self.cached.chunking.span(reader.offset, reader.length)
        assert self.cached.chunks.present(first, end)
        self.settle(reader, None)

    def failed(self, reader: Reader) -> Any:
        def note(failure: Failure) -> None:
            assert failure.check(ReadError, CancelledError), failure
            self.settle(reader, failure.value)

        return note

    def settle(self, reader: Reader, outcome: Any) -> None:
        reader.outcome = outcome
        if reader in self.waiting:
            self.waiting.remove(reader)


class BlobSourceModelTests(SynchronousTestCase):
    def test_no_order_of_events_gives_a_wrong_byte_or_forgets_a_reader(self) -> None:
        run_state_machine_as_test(
            BlobSourceMachine, settings=settings(max_examples=100, stateful_step_count=40, deadline=None)
        )
