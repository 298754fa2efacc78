"""What of a blob is on its way: which fetch brings each chunk, and what to do when it doesn't.

Each chunk is asked for once: by this process, or by another one that has the same file of the cache open.
The exceptions are a chunk far into a guess under way that a reader cannot wait for, and a process that holds
chunks and does not bring them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence

from twisted.internet.interfaces import IReactorTime
from twisted.logger import Logger

from erofs_twisted.blocks.cached import CachedBlob
from erofs_twisted.blocks.fetch import Fetch, Priority
from erofs_twisted.blocks.link import KIB
from erofs_twisted.blocks.queue import FetchQueue
from erofs_twisted.blocks.readahead import ByteRange
from erofs_twisted.errors import RangesIgnored, ReadError
from erofs_twisted.interfaces import IBlobReader

ALMOST = 64 * KIB
"""Bytes that are waited for, though nobody wants them any more: to break off costs the connection."""
OTHERS_PATIENCE = 2.0
"""Seconds without a new chunk after which another process that is to fetch some is waited for no longer."""
FAR = 0.1
"""Seconds beyond those of a new request that a reader waits for what is on its way in a guess."""


class Requests:
    """The fetches of one blob.

    ``arrived`` is told of runs of chunks that are there now, and given their bytes if they could not be kept.
    ``failed`` is told of runs that do not come, and why, and if they were only a guess.
    """

    _log = Logger()

    def __init__(
        self,
        reader: IBlobReader,
        cached: CachedBlob,
        clock: IReactorTime,
        queue: FetchQueue,
        arrived: Callable[[int, int, Sequence[memoryview] | None], None],
        failed: Callable[[int, int, ReadError, bool], None],
    ) -> None:
        self.bytes_fetched = 0
        """From the origin, in whole chunks."""
        self.bytes_unkept = 0
        """Of those, what could not be stored."""
        self._reader = reader
        self._cached = cached
        self._clock = clock
        self._queue = queue
        self._arrived = arrived
        self._failed = failed
        self._chunks = cached.chunks
        self._chunking = cached.chunking
        self._fetches: dict[int, Fetch] = {}
        """By each chunk that is to come."""
        self._newest: Fetch | None = None
        self._whole: Fetch | None = None
        self._takes_ranges = True
        self._closed = False

    def request(self, advice: Iterable[ByteRange], first: int, end: int, priority: Priority) -> None:
        """Fetch what is neither there nor to come, of the advice and of the chunks [first, end)."""
        for start_byte, end_byte in advice:
            for start, stop in self._unclaimed(*self._chunking.span(start_byte, end_byte - start_byte)):
                is_wanted = start < end and first < stop
                self._fetch(start, stop, priority if is_wanted else max(priority, Priority.AHEAD))
        for start, stop in self._unclaimed(first, end):
            for cut in self.cuts(start, stop):
                self._fetch(*cut, priority)
        if priority is Priority.DEMAND:
            self._hurry(first, end)
        self._queue.start()

    def all_coming(self, first: int, end: int) -> bool:
        """Is everything that is missing of the chunks [first, end) on its way?"""
        return next(self._unclaimed(first, end), None) is None

    def withdraw(self, first: int, end: int, waiting: Callable[[int, int], Sequence[object]]) -> None:
        """A reader of these chunks left: what comes for it alone is cancelled, unless it is almost there.

        ``waiting`` says who else waits for any of some chunks.
        """
        fetches = dict.fromkeys(self._fetches[chunk] for chunk in range(first, end) if chunk in self._fetches)
        for fetch in fetches:
            if fetch.whole or (fetch.started and fetch.remaining <= ALMOST):
                continue
            # A guess needs nobody who waits for it, but the background that has not begun is somebody's.
            if fetch.is_guess and (fetch.started or fetch.priority is Priority.AHEAD):
                continue
            coming = self._runs_of(fetch)
            if not any(waiting(*run) for run in coming):
                for run in coming:
                    self._settle(*run)
                fetch.cancel()

    def close(self) -> None:
        """End all that is under way, and start nothing more."""
        self._closed = True
        self._fetches.clear()
        self._queue.cancel(self)

    def cuts(self, first: int, end: int) -> Iterator[tuple[int, int]]:
        """The chunks [first, end) as they are best cut in requests."""
        step = max(self._queue.link.longest >> self._chunking.bits, 1)
        for start in range(first, end, step):
            yield start, min(start + step, end)

    def are_short(self, first: int, end: int) -> bool:
        """Are the chunks [first, end) few enough for one request?"""
        return (end - first) << self._chunking.bits <= self._queue.link.longest

    def may_start(self, fetch: Fetch) -> bool:
        """See `erofs_twisted.blocks.fetch.FetchOwner`."""
        runs = self._runs_of(fetch)
        if not runs:
            fetch.cancel()
            return False
        span = runs[0][0], runs[-1][1]
        if self._cached.claim(*span):
            fetch.claim = span
        self._cached.refresh(*span)
        if any(list(self._chunks.runs_missing(*run)) != [run] for run in runs):
            self._take_found(fetch, runs)
            return False
        if fetch.claim is not None:
            return True
        now = self._clock.seconds()
        if fetch.refused_at is None:
            fetch.refused_at = now
        return now - fetch.refused_at >= OTHERS_PATIENCE

    def chunks_fetched(self, fetch: Fetch, first: int, end: int, pieces: Sequence[memoryview]) -> None:
        """See `erofs_twisted.blocks.fetch.FetchOwner`."""
        length = self._chunking.length(first, end)
        self.bytes_fetched += length
        if not self._settle(first, end):
            return  # another fetch was faster
        stored = self._cached.store(first, pieces)
        if not stored:
            self.bytes_unkept += length
        self._arrived(first, end, None if stored else pieces)

    def fetch_failed(self, fetch: Fetch, error: ReadError) -> None:
        """See `erofs_twisted.blocks.fetch.FetchOwner`."""
        lost = self._runs_of(fetch)
        for run in lost:
            self._settle(*run)
        if isinstance(error, RangesIgnored) and lost:
            self._fetch_whole(lost)
            self._queue.start()
            return
        self._log.warn(
            "{length} bytes of {digest} at {offset} could not be fetched: {error}",
            length=self._chunking.length(fetch.first, fetch.end),
            digest=self._cached.digest,
            offset=self._chunking.start(fetch.first),
            error=error,
            priority=fetch.priority.name,
        )
        for run in lost:
            self._failed(*run, error, fetch.is_guess)
        self._queue.start()

    def fetch_ended(self, fetch: Fetch) -> None:
        """See `erofs_twisted.blocks.fetch.FetchOwner`."""
        self._release(fetch)

    def _hurry(self, first: int, end: int) -> None:
        """A reader waits for these chunks: see to it that guesses don't make it wait."""
        chunk = first
        while chunk < end:
            fetch = self._fetches.get(chunk)
            if fetch is None:
                chunk += 1
                continue
            if fetch.is_guess:
                if not fetch.started:
                    self._queue.promote(fetch)
                elif self._is_far(fetch, chunk, end):
                    self._fetch(chunk, min(end, fetch.end), Priority.DEMAND)
            chunk = fetch.end

    def _is_far(self, fetch: Fetch, chunk: int, end: int) -> bool:
        """Are the chunks [chunk, end) better asked for once more than waited for in the middle of a guess?

        Of the background, a reader waits for no more than it would for a request of its own. Other guesses
        are likely to be wanted whole, so it takes more to add to what the link has to bring.
        """
        before = fetch.before(chunk)
        is_background = fetch.priority is Priority.BACKGROUND
        link, running = self._queue.link, self._queue.running
        wait, round_trip = link.seconds(before, running), link.round_trip
        again = link.seconds(self._chunking.length(chunk, end), running + 1)
        if wait is None or again is None or round_trip is None:
            return is_background and before > ALMOST
        return wait > round_trip + again + (0.0 if is_background else FAR)

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

    def _fetch(self, first: int, end: int, priority: Priority) -> None:
        if not self._takes_ranges:
            self._fetch_whole([(first, end)])
            return
        newest = self._newest
        if newest is not None and newest.can_grow(first, priority) and self.are_short(newest.first, end):
            # A neighbour that still waits for its turn: both are asked for in one.
            newest.end = end
            fetch = newest
        else:
            self._newest = fetch = Fetch(first, end, priority, self, self._reader, self._chunking)
            self._queue.add(fetch)
        self._fetches.update(dict.fromkeys(range(first, end), fetch))

    def _fetch_whole(self, wanted: Sequence[tuple[int, int]]) -> None:
        """From an origin that ignores ranges: all of the blob at once, for everything that is missing."""
        if self._takes_ranges:
            self._takes_ranges = False
            self._log.warn(
                "the origin of {digest} ignores ranges: the whole blob is fetched", digest=self._cached.digest
            )
        whole = self._whole
        if whole is None or whole.ended or whole.first > min(wanted)[0]:
            count = self._chunking.count
            whole = Fetch(0, count, Priority.DEMAND, self, self._reader, self._chunking, whole=True)
            self._whole = whole
            for start, stop in self._unclaimed(0, count):
                self._fetches.update(dict.fromkeys(range(start, stop), whole))
            self._queue.add(whole)
        for run in wanted:
            self._fetches.update(dict.fromkeys(range(*run), whole))

    def _take_found(self, fetch: Fetch, runs: Sequence[tuple[int, int]]) -> None:
        """Another process has brought some of the chunks that a fetch was for: the rest is fetched anew."""
        self._release(fetch)
        fetch.cancel()
        for run in runs:
            self._settle(*run)
        for run in runs:
            for missing in list(self._chunks.runs_missing(*run)):
                self._fetch(*missing, fetch.priority)
        for run in runs:
            for found in list(self._chunks.runs_present(*run)):
                self._arrived(*found, None)

    def _settle(self, first: int, end: int) -> bool:
        """The chunks [first, end) are to come no more; False if none was."""
        fetches = self._fetches
        coming = len(fetches)
        for chunk in range(first, end):
            fetches.pop(chunk, None)
        return len(fetches) < coming

    def _runs_of(self, fetch: Fetch) -> list[tuple[int, int]]:
        """What a fetch is still to bring; another one may have been started for a part of it."""
        return list(_runs(c for c in range(fetch.first, fetch.end) if self._fetches.get(c) is fetch))

    def _release(self, fetch: Fetch) -> None:
        if fetch.claim is not None:
            if not self._closed:
                self._cached.release(*fetch.claim)
            fetch.claim = None


def _runs(chunks: Iterable[int]) -> Iterator[tuple[int, int]]:
    """Ascending numbers as runs [from, to)."""
    start = stop = -1
    for chunk in chunks:
        if chunk != stop:
            if start < stop:
                yield start, stop
            start = chunk
        stop = chunk + 1
    if start < stop:
        yield start, stop
