"""One range on its way from a blob's origin: a transfer, cut into chunks as it comes."""

from __future__ import annotations

import enum
from collections.abc import Callable, Sequence
from typing import Protocol

import attrs
from twisted.internet.defer import CancelledError, Deferred
from twisted.logger import Logger

from erofs_twisted.blocks.chunks import Chunking
from erofs_twisted.errors import ReadError
from erofs_twisted.interfaces import IBlobReader


class Priority(enum.IntEnum):
    """What a fetch is for; the lower goes first."""

    DEMAND = 0
    """A reader waits for it."""
    AHEAD = 1
    """A guess that a reader will."""
    BACKGROUND = 2
    """Whatever is left of the blob, when there is nothing else to do."""


class FetchOwner(Protocol):
    """Whom a fetch reports to."""

    def may_start(self, fetch: Fetch) -> bool:
        """Its turn has come: is it this process that is to transfer it? If not, it may have been cancelled
        since it is needed no more; else it is asked for again a little later."""

    def chunks_fetched(self, fetch: Fetch, first: int, end: int, pieces: Sequence[memoryview]) -> None:
        """The chunks [first, end) have come whole."""

    def fetch_failed(self, fetch: Fetch, error: ReadError) -> None:
        """The chunks from ``fetch.first`` on do not come."""

    def fetch_ended(self, fetch: Fetch) -> None:
        """A fetch that had started runs no more, for whatever reason."""


Watch = Callable[["Fetch", int], None]
"""Is told that so many bytes of a fetch came."""


@attrs.define(eq=False)
class Fetch:
    """The chunks [first, end) of a blob, in one request. ``first`` moves on as they come.

    It ends when the reader says that it is done, with a failure, or cancelled, which is not reported.
    """

    _log = Logger()

    first: int
    end: int
    priority: Priority
    owner: FetchOwner
    reader: IBlobReader
    _chunking: Chunking
    whole: bool = False
    """Is it the blob as a whole, from an origin that gives nothing less?"""
    claim: tuple[int, int] | None = attrs.field(default=None, init=False)
    """What its owner holds of the file that processes share, until it ends."""
    refused_at: float | None = attrs.field(default=None, init=False)
    """When another process was first found to be at these chunks."""
    started: bool = attrs.field(default=False, init=False)
    ended: bool = attrs.field(default=False, init=False)
    _pieces: list[memoryview] = attrs.field(factory=list, init=False)
    """What has come of the chunk ``first``."""
    _received: int = attrs.field(default=0, init=False)
    """The length of that."""
    _transfer: Deferred[None] | None = attrs.field(default=None, init=False)
    _watch: Watch | None = attrs.field(default=None, init=False)

    @property
    def is_guess(self) -> bool:
        """Does it run without anybody who waits for it?"""
        return self.priority > Priority.DEMAND

    @property
    def remaining(self) -> int:
        """Bytes still to come."""
        return self.before(self.end)

    def before(self, chunk: int) -> int:
        """Bytes still to come until ``chunk`` does, one of [first, end]."""
        return self._chunking.length(self.first, chunk) - self._received

    def can_grow(self, end: int, priority: Priority) -> bool:
        """Can more chunks be added at ``end``, which are as urgent?"""
        return (
            self.end == end and self.priority is priority and not (self.started or self.ended or self.whole)
        )

    def start(self, watch: Watch) -> Deferred[None]:
        """Begin; ``watch`` is told of each piece. The Deferred fires with None when the fetch has ended, in
        whatever way."""
        self.started = True
        self._watch = watch
        self._transfer = Deferred.fromCoroutine(self._transferred())
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

    async def _transferred(self) -> None:
        offset, length = self._chunking.start(self.first), self.remaining
        what = f"{length} bytes at {offset} of {self.reader.digest}"
        try:
            await self.reader.read(offset, length, self._deliver)
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
        if self._watch is not None:
            self._watch(self, len(data))
        self._pieces.append(memoryview(data))
        self._received += len(data)
        first, end = self.first, self._chunking.whole(self.first, self._received)
        if first == end:
            return
        pieces, rest = self._pieces, self._received - self._chunking.length(first, end)
        self.first, self._pieces, self._received = end, [], rest
        if rest:
            # All of them were one chunk's before the last piece came.
            last = pieces[-1]
            pieces[-1], self._pieces = last[:-rest], [last[-rest:]]
        self.owner.chunks_fetched(self, first, end, pieces)

    def _fail(self, error: ReadError) -> None:
        if self.ended:
            return
        self.cancel()
        self.owner.fetch_failed(self, error)
