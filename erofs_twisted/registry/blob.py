"""Ranges of a blob in a registry, checked, resumed and retried."""

from __future__ import annotations

from collections.abc import Callable

import attrs
from twisted.internet.defer import Deferred
from twisted.internet.defer import TimeoutError as TimedOut
from twisted.internet.interfaces import IReactorTime
from twisted.internet.task import deferLater
from twisted.logger import Logger
from twisted.web.iweb import UNKNOWN_LENGTH, IResponse
from zope.interface import implementer

from erofs_twisted.errors import RangesIgnored
from erofs_twisted.interfaces import Delivery, IBlobReader
from erofs_twisted.registry.answers import TEMPORARY
from erofs_twisted.registry.body import Taker, abandon, discard, receive
from erofs_twisted.registry.circuit import Turn
from erofs_twisted.registry.contentrange import check_partial
from erofs_twisted.registry.errors import (
    BlobUnreadable,
    NotInRegistry,
    RegistryError,
    TransferFailed,
    WrongAnswer,
)
from erofs_twisted.registry.location import BlobLocation, Way
from erofs_twisted.registry.manifest import Descriptor
from erofs_twisted.registry.retry import Backoff
from erofs_twisted.registry.session import Answer, Session
from erofs_twisted.registry.urls import redacted

MIN_STALL, MAX_STALL = 1.0, 15.0
"""Seconds without a byte after which a request is made again: a quarter of the time there is, within these.
(Twisted takes 0.3 s to say that a connection is refused.)"""

MAX_DETOURS = 3
"""URLs of a blob, one after the other, that may be refused before that is taken for an answer."""

MAX_MISTAKES = 8
"""`WrongAnswer`s to a read, without progress between them, before it fails."""

SLICED = 4 << 20
"""The largest blob of which a range is cut out as all of it goes by."""


@attrs.define(eq=False)
class _Transfer:
    """A range on its way: the bytes up to ``position`` are delivered, the last at ``progress_at``."""

    start: int
    position: int
    end: int
    deliver: Delivery
    clock: IReactorTime
    progress_at: float
    failures: int = 0
    """Since the last progress, and apart from those that the circuit has us wait after."""
    detours: int = 0
    """URLs that were refused, though the registry gave them out, one after the other."""
    mistakes: int = 0
    """`WrongAnswer`s since the last progress."""
    error: RegistryError | None = None
    """The last failure."""

    @property
    def is_complete(self) -> bool:
        return self.position == self.end

    def remaining(self, io_timeout: float) -> float:
        """The seconds that are left for progress."""
        return self.progress_at + io_timeout - self.clock.seconds()

    def may_pass(self, error: RegistryError) -> bool:
        """May the same request be answered otherwise?"""
        if isinstance(error, WrongAnswer):
            self.mistakes += 1
            return self.mistakes < MAX_MISTAKES
        return error.temporary

    def take(self, data: bytes) -> bool:
        """Of a body that is the rest of the range."""
        if len(data) > self.end - self.position:
            raise WrongAnswer("the body is longer than its Content-Range")
        self.position += len(data)
        self.progress_at = self.clock.seconds()
        self.deliver(data)
        return True

    def slice(self, deadline: float, size: int) -> Taker:
        """Of a body that is the whole blob of ``size``: skip what comes before the range, stop at its end.

        To skip is no progress: at ``deadline`` it ends.
        """
        start = 0

        def take(data: bytes) -> bool:
            nonlocal start
            skip = self.position - start
            start += len(data)
            if skip >= len(data):
                if self.clock.seconds() > deadline:
                    raise TransferFailed("skipping to the range takes too long", temporary=True)
                return True
            stop = len(data) if self.end == size else skip + self.end - self.position
            self.take(data[skip:stop])
            return self.end == size or not self.is_complete

        return take


@implementer(IBlobReader)
@attrs.define(eq=False)
class BlobReader:
    """The blob at ``url`` of a registry.

    A read fails at once where trying again is no use, soon where answers are not those to what was asked,
    else when it made no progress for ``io_timeout`` seconds. Where the registry redirects to (a CDN's signed
    URL, usually) is asked again directly, as long as that works.
    """

    _session: Session
    _url: str
    _descriptor: Descriptor
    _io_timeout: float
    _backoff: Backoff
    _with_tls: Callable[[], tuple[Session, str]] | None = None
    """Gives session and URL for when a registry that was asked without TLS turns out to want it."""
    _location: BlobLocation = attrs.field(init=False)
    _log = Logger()

    def __attrs_post_init__(self) -> None:
        self._location = BlobLocation(self._session.transport.clock)

    @property
    def digest(self) -> str:
        return self._descriptor.digest

    @property
    def size(self) -> int:
        return self._descriptor.size

    def read(self, offset: int, length: int, deliver: Delivery) -> Deferred[None]:
        """As `IBlobReader.read`; fails with `BlobUnreadable`, or with `RangesIgnored` where the registry
        would send all of a large blob for a part of it."""
        if not 0 <= offset <= offset + length <= self.size:
            raise ValueError(f"[{offset}, {offset + length}) is not within the blob's {self.size} bytes")
        return Deferred.fromCoroutine(self._read(offset, offset + length, deliver))

    async def _read(self, offset: int, end: int, deliver: Delivery) -> None:
        clock = self._session.transport.clock
        transfer = _Transfer(offset, offset, end, deliver, clock, clock.seconds())
        while not transfer.is_complete:
            turn = await self._turn(transfer)
            try:
                error = await self._try(transfer, turn)
            finally:
                turn.leave()
            if error is not None and not transfer.is_complete:
                await self._pause(transfer, error)

    async def _try(self, transfer: _Transfer, turn: Turn) -> RegistryError | None:
        """One attempt; why the next one is to wait a little, if it is. Raises `BlobUnreadable` if none is
        worth making."""
        before = transfer.position
        way = await self._location.choose()
        try:
            await self._attempt(transfer, way, turn)
            return None
        except RegistryError as error:
            if transfer.position > before:
                transfer.failures = transfer.mistakes = 0
            elif self._location.lost(way):
                # A signed URL may have expired, or its server be down: ask the registry for another. Or the
                # registry gives out no new one yet, and the old one still serves.
                transfer.detours += 1
                is_at_once = way.url is None or not error.temporary
                if is_at_once and transfer.detours <= MAX_DETOURS:
                    return None
            if not transfer.may_pass(error):
                turn.answered()
                raise BlobUnreadable(f"{self._rest(transfer)} cannot be read: {error}") from error
            remaining = transfer.remaining(self._io_timeout)
            if transfer.position == before:
                # A registry that sends something is not down, however many answers break off at a time.
                turn.failed(error, remaining, self._backoff)
            if remaining <= 0:
                raise self._given_up(transfer, error) from error
            return error
        finally:
            self._location.settle(way)

    async def _turn(self, transfer: _Transfer) -> Turn:
        """Wait until the registry may be asked. Raises `BlobUnreadable` if there is no time for that."""
        entering = Deferred.fromCoroutine(self._session.circuit.enter())
        if not entering.called:
            _ = entering.addTimeout(max(transfer.remaining(self._io_timeout), 0.0), transfer.clock)
        try:
            return await entering
        except TimedOut as error:
            raise self._given_up(transfer, transfer.error) from error

    async def _pause(self, transfer: _Transfer, error: RegistryError) -> None:
        """Wait before the next attempt, unless the registry is down for all: then a turn is waited for."""
        transfer.error = error
        where, reason = self._rest(transfer), str(error)
        if self._session.circuit.is_open:
            self._log.info("{where}: {reason}; waiting for the registry", where=where, reason=reason)
            return
        remaining = max(transfer.remaining(self._io_timeout), 0.0)
        delay = self._backoff.delay(transfer.failures, remaining, error.retry_after)
        transfer.failures += 1
        self._log.info(
            "{where}: {reason}; trying again in {delay:.1f} s", where=where, reason=reason, delay=delay
        )
        await deferLater(transfer.clock, delay)

    def _rest(self, transfer: _Transfer) -> str:
        return f"bytes {transfer.position} to {transfer.end} of {self.digest}"

    def _given_up(self, transfer: _Transfer, error: RegistryError | None) -> BlobUnreadable:
        reason = "the registry does not answer other reads" if error is None else str(error)
        where = self._rest(transfer)
        return BlobUnreadable(f"{where} could not be read within {self._io_timeout:g} seconds: {reason}")

    async def _attempt(self, transfer: _Transfer, way: Way, turn: Turn) -> None:
        """One request for what is left of the range. Raises `RegistryError` unless all of it came, or there
        is another place to ask."""
        patience = max(MIN_STALL, min(MAX_STALL, self._io_timeout / 4))
        headers = {"Range": f"bytes={transfer.position}-{transfer.end - 1}"}
        answer = await self._session.get(way.url or self._url, headers, patience)
        if answer.response.code not in TEMPORARY:
            turn.answered()
        if answer.response.code == 400 and self._with_tls is not None and answer.url.startswith("http:"):
            await discard(answer.response, transfer.clock, patience)
            self._session, self._url = self._with_tls()
            return
        if answer.response.code not in (200, 206):
            error = await self._refusal(answer, patience)
            if error.temporary or not (way.url or answer.redirected):
                raise error
            raise WrongAnswer(str(error)) from error
        try:
            take = self._taker(answer.response, transfer)
        except RegistryError as error:
            abandon(answer.response)
            raise WrongAnswer(f"{redacted(answer.url)}: {error}") from error
        except RangesIgnored as ignored:
            abandon(answer.response)
            if not self._location.gives_ranges(False) or transfer.mistakes + 1 == MAX_MISTAKES:
                raise
            raise WrongAnswer(f"{redacted(answer.url)}: the whole blob for a part of it") from ignored
        self._location.found(way, answer.url if answer.redirected else None)
        if answer.response.code == 206:
            self._location.gives_ranges(True)
        transfer.detours = 0
        await receive(answer.response, take, transfer.clock, patience)
        if not transfer.is_complete:
            missing = transfer.end - transfer.position
            raise TransferFailed(f"the body ended {missing} bytes too early", temporary=True)

    def _taker(self, response: IResponse, transfer: _Transfer) -> Taker:
        """Who takes the body, if the headers are those of what was asked for. Raises `RegistryError`."""
        if response.code == 206:
            lines = response.headers.getRawHeaders("Content-Range", [])
            check_partial(lines, response.length, transfer.position, transfer.end, self.size)
            return transfer.take
        if response.length not in (self.size, UNKNOWN_LENGTH):
            raise TransferFailed(f"the blob has {response.length} bytes there, the manifest says {self.size}")
        if self.size > SLICED and (transfer.start, transfer.end) != (0, self.size):
            raise RangesIgnored(f"{self.digest}: the registry answers a range with the whole blob")
        return transfer.slice(transfer.progress_at + self._io_timeout, self.size)

    async def _refusal(self, answer: Answer, patience: float) -> RegistryError:
        lines = answer.response.headers.getRawHeaders("Content-Range", [])
        error = await self._session.refusal(answer, patience)
        if isinstance(error, NotInRegistry):
            return NotInRegistry(
                f"{error} (the image's manifest names it, so it was deleted since: push the image again, or "
                "mount the one that the tag stands for now)"
            )
        if answer.response.code != 416 or not lines:
            return error
        return TransferFailed(f"{error} ({lines[0]:.60}, but the manifest says {self.size} bytes)")
