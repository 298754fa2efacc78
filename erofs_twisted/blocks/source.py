"""One blob, read through the cache: what is there at once, the rest as it comes, each byte fetched once."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import attrs
from twisted.internet.defer import Deferred, FirstError, fail, gatherResults, succeed
from twisted.internet.interfaces import IReactorTime
from twisted.logger import Logger

from erofs_twisted.blocks.cache import CachedBlob
from erofs_twisted.blocks.fetch import Fetch, FetchQueue
from erofs_twisted.blocks.readahead import MIB, ByteRange, Readahead, ReadaheadPolicy
from erofs_twisted.errors import ReadError
from erofs_twisted.interfaces import FileSpan, IBlobReader, Segment

REQUEST = 1 * MIB
"""The most that one request asks for where readahead has no say."""
PREFETCHES = 4
"""Requests that one prefetch has in flight at a time."""


@attrs.frozen
class BlobStats:
    """What a `BlobSource` has done so far."""

    bytes_fetched: int
    """From the origin, in whole chunks."""
    bytes_from_cache: int
    """Read without a wait."""
    fetches_running: int
    reads_failed: int


@attrs.define(eq=False)
class Waiter:
    """A read that waits for ``missing`` of the chunks [first, end), which it touches."""

    offset: int
    length: int
    first: int
    end: int
    wants_bytes: bool
    """A prefetch does not; it only waits."""
    done: Deferred[list[Segment]] = attrs.field(factory=Deferred)
    missing: int = 0
    unkept: dict[int, bytes] = attrs.field(factory=dict)
    """Chunks that came, but could not be stored in the cache."""


class BlobSource:
    """The bytes of a blob: from the cache, else from a fetch under way, else from one that it starts.

    ``readahead`` says what is fetched beside what is asked for. It owns ``cached``, and closes it.
    """

    _log = Logger()

    def __init__(
        self,
        reader: IBlobReader,
        cached: CachedBlob,
        clock: IReactorTime,
        readahead: ReadaheadPolicy | None = None,
    ) -> None:
        self.size = cached.size
        self._cached = cached
        self._chunking = cached.chunking
        self._readahead = readahead or Readahead(cached.size)
        self._queue = FetchQueue(reader, clock)
        self._fetches: dict[int, Fetch] = {}
        """By each chunk that is to come."""
        self._waiters: dict[int, list[Waiter]] = {}
        """By each chunk that is waited for; all of these are to come."""
        self._closed = False
        self._bytes_fetched = self._bytes_from_cache = self._reads_failed = 0
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
            advice = self._readahead.advise(offset, length, missing)
            if missing:
                return self._wait(offset, length, wants_bytes=True, advice=advice)
            if advice:
                self._request(advice, first, first, ahead=True)
                self._queue.start()
        self._bytes_from_cache += length
        return [FileSpan(self._fd, offset, length)]

    def prefetch(self, offset: int, length: int) -> Deferred[None]:
        """Bring a range within the blob into the cache; it may be empty, or all of it.

        The Deferred fires when all of it was fetched, and fails with `ReadError` if a part could not be.
        Reads go first.
        """
        if length <= 0:
            return succeed(None)
        return Deferred.fromCoroutine(self._prefetch(*self._chunking.span(offset, length)))

    def close(self) -> Deferred[None]:
        """End every fetch, fail every read that waits, flush and close the cached blob. Call it once."""
        self._closed = True
        closed = self._cached.close()
        self._fetches.clear()
        self._queue.cancel()
        waiters, self._waiters = dict.fromkeys(w for ws in self._waiters.values() for w in ws), {}
        for waiter in waiters:
            if not waiter.done.called:
                self._give_up(waiter, ReadError(f"the blob {self._cached.digest} is being closed"))
        return closed

    @property
    def stats(self) -> BlobStats:
        """The counts so far."""
        return BlobStats(
            bytes_fetched=self._bytes_fetched,
            bytes_from_cache=self._bytes_from_cache,
            fetches_running=self._queue.running,
            reads_failed=self._reads_failed,
        )

    def chunk_fetched(self, chunk: int, pieces: Sequence[memoryview]) -> None:
        """See `erofs_twisted.blocks.fetch.FetchOwner`."""
        del self._fetches[chunk]
        self._bytes_fetched += self._chunking.length(chunk)
        stored = self._cached.store(chunk, pieces)
        waiters = self._waiters.pop(chunk, ())
        unkept = None if stored or not waiters else b"".join(pieces)
        for waiter in waiters:
            waiter.missing -= 1
            if unkept is not None and waiter.wants_bytes:
                waiter.unkept[chunk] = unkept
            # A reader that was called back may have cancelled this one, or closed the source.
            if waiter.missing or waiter.done.called:
                continue
            error = self._error()
            if error is None:
                waiter.done.callback(self._segments(waiter))
            else:
                self._give_up(waiter, error)

    def fetch_failed(self, fetch: Fetch, error: ReadError) -> None:
        """See `erofs_twisted.blocks.fetch.FetchOwner`."""
        self._log.warn(
            "{count} chunks of {digest} at byte {offset} could not be fetched: {error}",
            count=fetch.end - fetch.first,
            digest=self._cached.digest,
            offset=self._chunking.start(fetch.first),
            error=error,
            ahead=fetch.ahead,
        )
        for chunk in range(fetch.first, fetch.end):
            del self._fetches[chunk]
        for waiter in self._waiting_for(fetch):
            if waiter.done.called:
                continue
            if fetch.ahead and waiter.wants_bytes and not self._closed:
                # The guess had its tries before this reader came; the reader gets tries of its own.
                self._request((), waiter.first, waiter.end)
            else:
                self._withdraw(waiter)
                self._give_up(waiter, error)
        self._queue.start()

    def _wait(
        self, offset: int, length: int, *, wants_bytes: bool, advice: Iterable[ByteRange]
    ) -> Deferred[list[Segment]]:
        """Wait for a range of which something is missing, and see to it that it comes."""
        error = self._error()
        if error is not None:
            self._reads_failed += 1
            return fail(error)
        first, end = self._chunking.span(offset, length)
        waiter = Waiter(offset, length, first, end, wants_bytes, Deferred(lambda _: self._withdraw(waiter)))
        for start, stop in self._chunks.runs_missing(first, end):
            waiter.missing += stop - start
            for chunk in range(start, stop):
                self._waiters.setdefault(chunk, []).append(waiter)
        self._request(advice, first, end, ahead=not wants_bytes)
        self._queue.start()
        return waiter.done

    def _request(self, advice: Iterable[ByteRange], first: int, end: int, ahead: bool = False) -> None:
        """Fetch what is neither there nor to come, of the advice and of the chunks [first, end)."""
        for start_byte, end_byte in advice:
            for start, stop in self._unclaimed(*self._chunking.span(start_byte, end_byte - start_byte)):
                self._claim(start, stop, ahead or stop <= first or end <= start)
        step = max(REQUEST >> self._bits, 1)
        for start, stop in self._unclaimed(first, end):
            for cut in range(start, stop, step):
                self._claim(cut, min(cut + step, stop), ahead)
        if not ahead:
            for chunk in range(first, end):
                fetch = self._fetches.get(chunk)
                if fetch is not None:
                    self._queue.promote(fetch)

    def _unclaimed(self, first: int, end: int) -> Iterator[tuple[int, int]]:
        """The runs in [first, end) that are neither there nor to come. They may be claimed as they appear."""
        for start, stop in self._chunks.runs_missing(first, end):
            run = start
            for chunk in range(start, stop):
                if chunk in self._fetches:
                    if run < chunk:
                        yield run, chunk
                    run = chunk + 1
            if run < stop:
                yield run, stop

    def _claim(self, first: int, end: int, ahead: bool) -> None:
        fetch = Fetch(first, end, ahead, self, self._chunking)
        self._fetches.update(dict.fromkeys(range(first, end), fetch))
        self._queue.add(fetch)

    def _withdraw(self, waiter: Waiter) -> None:
        """A reader leaves; what was to come for it alone is cancelled, unless it is almost there."""
        fetches: dict[Fetch, None] = {}
        for chunk in range(waiter.first, waiter.end):
            waiters = self._waiters.get(chunk)
            if waiters and waiter in waiters:
                waiters.remove(waiter)
                if not waiters:
                    del self._waiters[chunk]
                if chunk in self._fetches:
                    fetches[self._fetches[chunk]] = None
        for fetch in fetches:
            almost_there = fetch.started and fetch.remaining <= self._chunking.chunk_size
            if not fetch.ahead and not almost_there and not self._waiting_for(fetch):
                for chunk in range(fetch.first, fetch.end):
                    del self._fetches[chunk]
                fetch.cancel()

    def _waiting_for(self, fetch: Fetch) -> dict[Waiter, None]:
        """Who waits for what the fetch has not brought yet, in the order in which they came."""
        chunks = range(fetch.first, fetch.end)
        return dict.fromkeys(waiter for chunk in chunks for waiter in self._waiters.get(chunk, ()))

    def _segments(self, waiter: Waiter) -> list[Segment]:
        if not waiter.unkept:
            return [FileSpan(self._fd, waiter.offset, waiter.length)]
        segments: list[Segment] = []
        position, end = waiter.offset, waiter.offset + waiter.length
        for chunk in range(waiter.first, waiter.end):
            start, stop = self._chunking.start(chunk), min(self._chunking.start(chunk + 1), end)
            data = waiter.unkept.get(chunk)
            if data is None:
                segments.append(FileSpan(self._fd, position, stop - position))
            else:
                segments.append(data[position - start : stop - start])
            position = stop
        return segments

    async def _prefetch(self, first: int, end: int) -> None:
        step = max(REQUEST >> self._bits, 1)
        starts = iter(range(first, end, step))

        async def fetch_in_turn() -> None:
            for start in starts:
                stop = min(start + step, end)
                if not self._chunks.present(start, stop):
                    offset = self._chunking.start(start)
                    length = self._chunking.start(stop) - offset
                    await self._wait(offset, length, wants_bytes=False, advice=())

        lanes = [Deferred.fromCoroutine(fetch_in_turn()) for _ in range(PREFETCHES)]
        try:
            await gatherResults(lanes, consumeErrors=True)
        except FirstError as first_error:
            for lane in lanes:
                lane.cancel()
            first_error.subFailure.raiseException()

    def _give_up(self, waiter: Waiter, error: ReadError) -> None:
        self._reads_failed += 1
        waiter.done.errback(error)

    def _error(self) -> ReadError | None:
        """Why nothing can be read any more."""
        if self._closed:
            return ReadError(f"the blob {self._cached.digest} is closed")
        return self._cached.error
