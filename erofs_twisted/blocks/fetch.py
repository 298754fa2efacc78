"""Ranges on their way from a blob's origin: a transfer, cut into chunks, and the queue they wait in."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Protocol

import attrs
from twisted.internet.defer import CancelledError, Deferred
from twisted.internet.interfaces import IReactorTime
from twisted.logger import Logger

from erofs_twisted.blocks.chunks import Chunking
from erofs_twisted.errors import ReadError
from erofs_twisted.interfaces import IBlobReader


class FetchOwner(Protocol):
    """Whom a fetch reports to."""

    def chunk_fetched(self, chunk: int, pieces: Sequence[memoryview]) -> None:
        """A chunk has come whole."""

    def fetch_failed(self, fetch: Fetch, error: ReadError) -> None:
        """The chunks from ``fetch.first`` on do not come."""


@attrs.define(eq=False)
class Fetch:
    """The chunks [first, end) of a blob, in one request. ``first`` moves on as they come.

    It ends when the reader says that it is done, with a failure, or cancelled, which is not reported.
    """

    _log = Logger()

    first: int
    end: int
    ahead: bool
    """Is it a guess that a reader will want this, rather than what one waits for?"""
    _owner: FetchOwner
    _chunking: Chunking
    started: bool = attrs.field(default=False, init=False)
    ended: bool = attrs.field(default=False, init=False)
    _pieces: list[memoryview] = attrs.field(factory=list, init=False)
    """What has come of the chunk ``first``."""
    _received: int = attrs.field(default=0, init=False)
    """The length of that."""
    _transfer: Deferred[None] | None = attrs.field(default=None, init=False)

    @property
    def remaining(self) -> int:
        """Bytes still to come."""
        return self._chunking.start(self.end) - self._chunking.start(self.first) - self._received

    def start(self, reader: IBlobReader) -> Deferred[None]:
        """Begin. The Deferred fires with None when the fetch has ended, in whatever way."""
        self.started = True
        self._transfer = Deferred.fromCoroutine(self._transferred(reader))
        if self.ended:
            # It failed while the reader was being called: until now there was nothing to cancel.
            self._transfer.cancel()
        return self._transfer

    def cancel(self) -> None:
        """Let go of all that has not come yet."""
        self.ended = True
        self._pieces.clear()
        if self._transfer is not None:
            self._transfer.cancel()

    async def _transferred(self, reader: IBlobReader) -> None:
        offset, length = self._chunking.start(self.first), self.remaining
        what = f"{length} bytes at {offset} of {reader.digest}"
        try:
            await reader.read(offset, length, self._deliver)
        except ReadError as error:
            self._fail(error)
        except CancelledError:
            self._fail(ReadError(f"the transfer of {what} was cancelled at its origin"))
        except Exception as error:  # noqa: BLE001 - whatever it is, its readers must not wait for ever
            self._log.failure("the transfer of {what} broke", what=what)
            self._fail(ReadError(f"the transfer of {what} broke: {error!r}"))
        else:
            if self.remaining:
                self._fail(ReadError(f"the transfer of {what} ended {self.remaining} bytes too early"))
            self.ended = True

    def _deliver(self, data: bytes) -> None:
        if self.ended:
            return
        if len(data) > self.remaining:
            self._fail(ReadError(f"the origin sent more than the {self.remaining} bytes that were to come"))
            return
        view = memoryview(data)
        while view and not self.ended:
            wanted = self._chunking.length(self.first) - self._received
            piece, view = view[:wanted], view[wanted:]
            self._pieces.append(piece)
            self._received += len(piece)
            if len(piece) == wanted:
                chunk, pieces = self.first, self._pieces
                self.first, self._pieces, self._received = chunk + 1, [], 0
                self._owner.chunk_fetched(chunk, pieces)

    def _fail(self, error: ReadError) -> None:
        if self.ended:
            return
        self.cancel()
        self._owner.fetch_failed(self, error)


class FetchQueue:
    """Starts fetches: those that a reader waits for first, no more than ``limit`` at a time.

    Two places are kept from guesses, so that a reader need not wait for one to end.
    """

    _log = Logger()

    def __init__(self, reader: IBlobReader, clock: IReactorTime, limit: int = 8) -> None:
        self._running: set[Fetch] = set()
        self._guesses_running = 0
        self._reader = reader
        self._clock = clock
        self._limit = limit
        self._guess_limit = max(limit - 2, 1)
        self._wanted: deque[Fetch] = deque()
        self._guesses: deque[Fetch] = deque()
        self._starting = False

    def add(self, fetch: Fetch) -> None:
        """Queue a fetch, for the next `start`."""
        (self._guesses if fetch.ahead else self._wanted).append(fetch)

    def promote(self, fetch: Fetch) -> None:
        """A reader waits for a guess now. If it has not begun yet, it is a guess no more."""
        if fetch.ahead and not fetch.started:
            fetch.ahead = False
            self._wanted.append(fetch)

    def start(self) -> None:
        """Start what there is room for."""
        if self._starting:
            return
        self._starting = True
        try:
            while (fetch := self._next()) is not None:
                self._start(fetch)
        finally:
            self._starting = False

    @property
    def running(self) -> int:
        """How many have begun, and not ended."""
        return len(self._running)

    def cancel(self) -> None:
        """Forget what has not begun, and cancel the rest."""
        self._wanted.clear()
        self._guesses.clear()
        for fetch in list(self._running):
            fetch.cancel()

    def _next(self) -> Fetch | None:
        if len(self._running) >= self._limit:
            return None
        while self._wanted:
            fetch = self._wanted.popleft()
            if not fetch.ended:
                return fetch
        while self._guesses and self._guesses_running < self._guess_limit:
            fetch = self._guesses.popleft()
            if fetch.ahead and not fetch.ended:
                return fetch
        return None

    def _start(self, fetch: Fetch) -> None:
        ahead, length, began = fetch.ahead, fetch.remaining, self._clock.seconds()
        self._running.add(fetch)
        self._guesses_running += ahead

        def ended(_: None) -> None:
            self._running.remove(fetch)
            self._guesses_running -= ahead
            self._log.debug(
                "fetched {fetched} of {length} bytes in {seconds:.3f} s",
                fetched=length - fetch.remaining,
                length=length,
                seconds=self._clock.seconds() - began,
                ahead=ahead,
            )
            self.start()

        _ = fetch.start(self._reader).addCallback(ended)
