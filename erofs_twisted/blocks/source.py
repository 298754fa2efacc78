"""One blob, read through the cache: what is there at once, the rest as it comes, each byte fetched once."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence

import attrs
from twisted.internet.defer import Deferred, fail, succeed
from twisted.internet.interfaces import IReactorTime

from erofs_twisted.blocks.cached import CachedBlob
from erofs_twisted.blocks.chunks import ChunkMap
from erofs_twisted.blocks.fetch import Priority
from erofs_twisted.blocks.lanes import in_lanes
from erofs_twisted.blocks.link import Link
from erofs_twisted.blocks.queue import FetchQueue
from erofs_twisted.blocks.readahead import ByteRange, Readahead, ReadaheadPolicy
from erofs_twisted.blocks.requests import Requests
from erofs_twisted.blocks.waiting import Waiter, Waiters
from erofs_twisted.errors import ReadError
from erofs_twisted.interfaces import FileSpan, IBlobReader, Segment

PREFETCHES = 4
"""Requests that the prefetch of a range has in flight or queued at a time."""


@attrs.frozen
class BlobStats:
    """What a `BlobSource` has done so far."""

    bytes_fetched: int
    """From the origin, in whole chunks."""
    bytes_from_cache: int
    """Read without a wait."""
    bytes_unkept: int
    """Fetched, and not stored: the disk or the cache was full."""
    fetches_running: int
    reads_failed: int
    poisoned: bool
    """Does the blob have another digest than it should? Then no read succeeds."""


class BlobSource:
    """The bytes of a blob: from the cache, else from a fetch under way, else from one that it starts.

    ``readahead`` says what is fetched beside what is asked for; ``queue`` is that of all blobs with the same
    origin. It owns ``cached``, and closes it.
    """

    def __init__(
        self,
        reader: IBlobReader,
        cached: CachedBlob,
        clock: IReactorTime,
        readahead: ReadaheadPolicy | None = None,
        queue: FetchQueue | None = None,
    ) -> None:
        self.size = cached.size
        self.digest = cached.digest
        self._cached = cached
        self._chunking = cached.chunking
        self._queue = queue or FetchQueue(clock)
        self._readahead = readahead or Readahead(cached.size, link=self._queue.link)
        self._requests = Requests(reader, cached, clock, self._queue, self._arrived, self._lost)
        self._waiters = Waiters()
        self._closed = False
        self._foreseen: ChunkMap | None = None
        """What is known to be read."""
        self._bytes_from_cache = self._reads_failed = 0
        # What every read looks at.
        self._chunks = cached.chunks
        self._fd = cached.fd
        self._bits = cached.chunking.bits

    def read(self, offset: int, length: int) -> list[Segment] | Deferred[list[Segment]]:
        """The bytes at [offset, offset + length), which lie within the blob; length > 0.

        Returns them where they are at hand, otherwise a Deferred, which fails with `ReadError`. Cancelling
        it withdraws this reader; what nobody else wants is then not fetched. A `FileSpan` is valid until
        `close`.
        """
        chunks = self._chunks
        if not chunks.complete:
            first, end = offset >> self._bits, ((offset + length - 1) >> self._bits) + 1
            missing = not chunks.present(first, end)
            if missing and not self._closed and self._cached.refresh(first, end):
                missing = not chunks.present(first, end)
            # What is on its way costs no request of its own, so there is none to make more of.
            costs = missing and not self._requests.all_coming(first, end)
            foreseen = self._foreseen is not None and self._foreseen.present(first, end)
            advice = () if foreseen else self._readahead.advise(offset, length, costs)
            if missing:
                return self._wait(offset, length, Priority.DEMAND, advice)
            if advice:
                self._requests.request(advice, first, first, Priority.AHEAD)
        self._bytes_from_cache += length
        return [FileSpan(self._fd, offset, length)]

    def peek(self, offset: int, length: int) -> bytes | None:
        """The bytes of a range if all of it is in the cache, else None. It counts as no reader's: nothing is
        fetched for it, and nothing read ahead."""
        first, end = self._chunking.span(offset, length)
        if self._closed or not self._chunks.present(first, end):
            return None
        return os.pread(self._fd, length, offset)

    def prefetch(self, offset: int, length: int, priority: Priority = Priority.AHEAD) -> Deferred[None]:
        """Bring a range within the blob into the cache; it may be empty, or all of it.

        The Deferred fires when all of it was fetched, and fails with `ReadError` if a part could not be.
        """
        if length <= 0:
            return succeed(None)
        first, end = self._chunking.span(offset, length)
        if self._requests.are_short(first, end):
            if self._chunks.present(first, end):
                return succeed(None)
            return self._wait(offset, length, priority, ()).addCallback(lambda _: None)
        return Deferred.fromCoroutine(self._prefetch(self._requests.cuts(first, end), priority, PREFETCHES))

    def prefetch_ranges(self, ranges: Iterable[ByteRange]) -> Deferred[None]:
        """Likewise for many ranges, in this order, as many at a time as the link takes.

        They are known to be read: so a read of them is no reason to guess what is read next.
        """
        foreseen = self._foreseen = self._foreseen or ChunkMap(len(self._chunks))
        cuts: list[tuple[int, int]] = []
        for first, end in (self._chunking.span(start, end - start) for start, end in ranges if start < end):
            foreseen.set(first, end)
            cuts += self._requests.cuts(first, end)
        return Deferred.fromCoroutine(self._prefetch(iter(cuts), Priority.AHEAD, max(len(cuts), 1)))

    def next_missing(self, offset: int, most: int) -> ByteRange | None:
        """The first bytes from ``offset`` on that are not in the cache, in whole chunks, at most ``most``."""
        first, count = offset >> self._bits, len(self._chunks)
        for start, stop in self._chunks.runs_missing(first, count):
            stop = min(stop, start + max(most >> self._bits, 1))
            return self._chunking.start(start), self._chunking.start(stop)
        return None

    @property
    def chunk_size(self) -> int:
        """Bytes that are the least to be fetched."""
        return self._chunking.chunk_size

    @property
    def link(self) -> Link:
        """What is known of the way to the blob's origin."""
        return self._queue.link

    @property
    def bytes_missing(self) -> int:
        """Of the blob, in whole chunks."""
        return min(self._chunks.missing << self._bits, self.size)

    def close(self) -> Deferred[None]:
        """End every fetch, fail every read that waits, flush and close the cached blob. Call it once."""
        self._closed = True
        closed = self._cached.close()
        self._requests.close()
        for waiter in self._waiters.pop_all():
            if not waiter.done.called:
                self._give_up(waiter, ReadError(f"the blob {self._cached.digest} is being closed"))
        return closed

    @property
    def stats(self) -> BlobStats:
        """The counts so far."""
        return BlobStats(
            bytes_fetched=self._requests.bytes_fetched,
            bytes_from_cache=self._bytes_from_cache,
            bytes_unkept=self._requests.bytes_unkept,
            fetches_running=self._queue.running,
            reads_failed=self._reads_failed,
            poisoned=self._cached.error is not None,
        )

    def verify(self) -> Deferred[None]:
        """Compare the whole blob, which must be there, with its digest: see `CachedBlob.verify`."""
        return self._cached.verify()

    def _wait(
        self, offset: int, length: int, priority: Priority, advice: Iterable[ByteRange]
    ) -> Deferred[list[Segment]]:
        """Wait for a range of which something is missing, and see to it that it comes."""
        error = self._error()
        if error is not None:
            self._reads_failed += 1
            return fail(error)
        first, end = self._chunking.span(offset, length)
        done: Deferred[list[Segment]] = Deferred(lambda _: self._withdraw(waiter))
        waiter = Waiter(offset, length, first, end, priority is Priority.DEMAND, done)
        self._waiters.add(waiter, self._chunks.runs_missing(first, end))
        self._requests.request(advice, first, end, priority)
        return waiter.done

    def _arrived(self, first: int, end: int, unkept: Sequence[memoryview] | None) -> None:
        """The chunks [first, end) are there; or, if they could not be kept, these are their bytes."""
        waiters = self._waiters.arrived(first, end)
        if unkept is not None and waiters:
            start, data = self._chunking.start(first), b"".join(unkept)
            for waiter in waiters:
                if waiter.wants_bytes:
                    waiter.unkept.append((start, data))
        for waiter in waiters:
            # A reader that was called back may have cancelled this one, or closed the source.
            if waiter.missing or waiter.done.called:
                continue
            error = self._error()
            if error is None:
                waiter.done.callback(self._segments(waiter))
            else:
                self._give_up(waiter, error)

    def _lost(self, first: int, end: int, error: ReadError, was_guess: bool) -> None:
        """The chunks [first, end) do not come."""
        for waiter in self._waiters.of(first, end):
            if waiter.done.called:
                continue
            if was_guess and waiter.wants_bytes and not self._closed:
                # The guess had its tries before this reader came; the reader gets tries of its own.
                self._requests.request((), waiter.first, waiter.end, Priority.DEMAND)
            else:
                self._withdraw(waiter)
                self._give_up(waiter, error)

    def _withdraw(self, waiter: Waiter) -> None:
        """A reader leaves."""
        self._waiters.remove(waiter)
        self._requests.withdraw(waiter.first, waiter.end, self._waiters.of)

    def _segments(self, waiter: Waiter) -> list[Segment]:
        position, end = waiter.offset, waiter.offset + waiter.length
        segments: list[Segment] = []
        for begin, data in sorted(waiter.unkept):
            start, stop = max(begin, position), min(begin + len(data), end)
            if start >= stop:
                continue
            if position < start:
                segments.append(FileSpan(self._fd, position, start - position))
            segments.append(data[start - begin : stop - begin])
            position = stop
        if position < end:
            segments.append(FileSpan(self._fd, position, end - position))
        return segments

    async def _prefetch(self, cuts: Iterator[tuple[int, int]], priority: Priority, lanes: int) -> None:
        async def fetch_in_turn() -> None:
            for start, stop in cuts:
                if not self._chunks.present(start, stop):
                    offset, length = self._chunking.start(start), self._chunking.length(start, stop)
                    await self._wait(offset, length, priority, advice=())

        await in_lanes(lanes, fetch_in_turn)

    def _give_up(self, waiter: Waiter, error: ReadError) -> None:
        self._reads_failed += 1
        waiter.done.errback(error)

    def _error(self) -> ReadError | None:
        """Why nothing can be read any more."""
        if self._closed:
            return ReadError(f"the blob {self._cached.digest} is closed")
        return self._cached.error
