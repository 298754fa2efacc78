"""Ranges of a blob in a registry, checked, resumed and retried."""

from __future__ import annotations

from collections.abc import Sequence

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
    Busy,
    NotInRegistry,
    RegistryError,
    TransferFailed,
    WrongAnswer,
)
from erofs_twisted.registry.host import RegistryHost
from erofs_twisted.registry.location import Way
from erofs_twisted.registry.manifest import Descriptor
from erofs_twisted.registry.replicas import COLD, REST, Replica, Replicas
from erofs_twisted.registry.retry import Backoff
from erofs_twisted.registry.session import Answer, Session
from erofs_twisted.registry.urls import redacted

STALL_TIMEOUT = 15.0
"""Seconds without a byte after which a request is given up and made again."""
MIN_PATIENCE = 1.0
"""It is at most a quarter of the time that there is in all, but no less than this. (Twisted takes 0.3 s to
say that a connection is refused.)"""
ELSEWHERE_TIMEOUT = 5.0
"""At most so many, where there is another server to ask."""

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
    tried: set[Replica] = attrs.field(factory=set)
    """Those that have failed for the moment, since the last pause."""
    refused: dict[Replica, RegistryError | RangesIgnored] = attrs.field(factory=dict)
    """Those that there is no use to ask again, and why."""

    @property
    def is_complete(self) -> bool:
        return self.position == self.end

    def remaining(self, io_timeout: float) -> float:
        """The seconds that are left for progress."""
        return self.progress_at + io_timeout - self.clock.seconds()

    def may_pass(self, error: RegistryError) -> bool:
        """May the same request be answered otherwise, by the same server?"""
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
    """The blob of ``descriptor`` at the first of ``hosts`` that brings it.

    A read fails at once where no host is worth trying again, soon where answers are not those to what was
    asked, else when it made no progress for ``io_timeout`` seconds. A request that brings nothing for
    ``stall_timeout`` seconds is made again. Where a host redirects to (a CDN's signed URL, usually) is asked
    again directly, as long as that works.
    """

    _hosts: Sequence[RegistryHost]
    _descriptor: Descriptor
    _io_timeout: float
    _backoff: Backoff
    _stall_timeout: float = STALL_TIMEOUT
    _replicas: Replicas = attrs.field(init=False)
    _clock: IReactorTime = attrs.field(init=False)
    _log = Logger()

    def __attrs_post_init__(self) -> None:
        path = f"blobs/{self._descriptor.digest}"
        self._replicas = Replicas(tuple(Replica(host, path) for host in self._hosts), self._probe)
        self._clock = self._hosts[0].transport.clock

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
        transfer = self._transfer(offset, end, deliver)
        while not transfer.is_complete:
            replica, turn = await self._turn(transfer)
            try:
                error = await self._try(transfer, replica, turn)
            finally:
                turn.leave()
            if error is not None and not transfer.is_complete:
                await self._pause(transfer, replica, error)

    def _transfer(self, offset: int, end: int, deliver: Delivery) -> _Transfer:
        return _Transfer(offset, offset, end, deliver, self._clock, self._clock.seconds())

    async def _try(self, transfer: _Transfer, replica: Replica, turn: Turn) -> RegistryError | None:
        """One attempt; why the next one is to wait a little, if it is. Raises `BlobUnreadable` or
        `RangesIgnored` if none is worth making."""
        before, location = transfer.position, replica.location
        way = await location.choose()
        try:
            await self._attempt(transfer, replica, way, turn)
            return None
        except RangesIgnored as error:
            replica.rest(COLD)
            self._refuse(transfer, replica, error)
            return None
        except RegistryError as error:
            if transfer.position > before:
                transfer.failures = transfer.mistakes = 0
            elif location.lost(way):
                # A signed URL may have expired, or its server be down: ask the registry for another. Or the
                # registry gives out no new one yet, and the old one still serves.
                transfer.detours += 1
                is_at_once = way.url is None or not error.temporary
                if is_at_once and transfer.detours <= MAX_DETOURS:
                    return None
            has_other = isinstance(error, WrongAnswer) and self._another(transfer, replica) is not None
            if has_other or not transfer.may_pass(error):
                turn.answered()
                replica.rest(REST)
                self._refuse(transfer, replica, error)
                return None
            remaining = transfer.remaining(self._io_timeout)
            if transfer.position == before:
                # A registry that sends something is not down, however many answers break off at a time.
                turn.failed(error, remaining, self._backoff)
            if remaining <= 0:
                raise self._given_up(transfer, error) from error
            return error
        finally:
            location.settle(way)

    def _refuse(self, transfer: _Transfer, replica: Replica, error: RegistryError | RangesIgnored) -> None:
        """Ask the others. Raises `BlobUnreadable`, `RangesIgnored` if there are none left."""
        transfer.refused[replica] = error
        transfer.detours = transfer.mistakes = 0
        if len(transfer.refused) < len(self._replicas):
            self._log.info(
                "{where}: {reason}; asking another server than {host}",
                where=self._rest(transfer),
                reason=str(error),
                host=replica.host,
            )
            return
        for each in transfer.refused.values():
            if isinstance(each, RangesIgnored):
                raise each
        raise BlobUnreadable(f"{self._rest(transfer)} cannot be read: {error}") from error

    async def _turn(self, transfer: _Transfer) -> tuple[Replica, Turn]:
        """Wait until a server may be asked. Raises `BlobUnreadable` if there is no time for that."""
        entering = Deferred.fromCoroutine(self._replicas.turn(transfer.refused, transfer.tried))
        if not entering.called:
            _ = entering.addTimeout(max(transfer.remaining(self._io_timeout), 0.0), self._clock)
        try:
            return await entering
        except TimedOut as error:
            raise self._given_up(transfer, transfer.error) from error

    async def _pause(self, transfer: _Transfer, replica: Replica, error: RegistryError) -> None:
        """Wait before the next attempt, unless there is another server to ask, or all are down: then a turn
        is waited for."""
        transfer.error = error
        transfer.tried.add(replica)
        where, reason = self._rest(transfer), str(error)
        other = self._replicas.awake((*transfer.refused, *transfer.tried))
        if other is not None:
            self._log.info("{where}: {reason}; asking {host}", where=where, reason=reason, host=other.host)
            return
        transfer.tried.clear()
        if self._replicas.are_down(transfer.refused):
            self._log.info("{where}: {reason}; waiting for the registry", where=where, reason=reason)
            return
        if isinstance(error, Busy) and error.retry_after is None and replica.host.session.circuit.is_paced:
            self._log.info("{where}: {reason}; waiting for its turn", where=where, reason=reason)
            return
        remaining = max(transfer.remaining(self._io_timeout), 0.0)
        delay = self._backoff.delay(transfer.failures, remaining, error.retry_after)
        transfer.failures += 1
        self._log.info(
            "{where}: {reason}; trying again in {delay:.1f} s", where=where, reason=reason, delay=delay
        )
        await deferLater(self._clock, delay)

    async def _probe(self, replica: Replica, turn: Turn) -> None:
        """Does a server that was passed over have the blob now?"""
        transfer = self._transfer(0, min(1, self.size), lambda data: None)
        way = await replica.location.choose()
        try:
            await self._attempt(transfer, replica, way, turn)
        except RangesIgnored:
            turn.answered()
        except RegistryError as error:
            replica.location.lost(way)
            if error.temporary:
                turn.failed(error, self._io_timeout, self._backoff)
            else:
                turn.answered()
                replica.rest(REST)
        else:
            replica.wake()
            self._log.info("{host} has {digest} again", host=replica.host, digest=self.digest)
        finally:
            replica.location.settle(way)

    def _rest(self, transfer: _Transfer) -> str:
        return f"bytes {transfer.position} to {transfer.end} of {self.digest}"

    def _given_up(self, transfer: _Transfer, error: RegistryError | None) -> BlobUnreadable:
        reason = "the registry does not answer other reads" if error is None else str(error)
        where = self._rest(transfer)
        return BlobUnreadable(f"{where} could not be read within {self._io_timeout:g} seconds: {reason}")

    async def _attempt(self, transfer: _Transfer, replica: Replica, way: Way, turn: Turn) -> None:
        """One request for what is left of the range. Raises `RegistryError`, `RangesIgnored` unless all of it
        came, or the same server is to be asked in another way."""
        session, patience = replica.host.session, self._patience(transfer, replica)
        headers = {"Range": f"bytes={transfer.position}-{transfer.end - 1}"}
        answer = await session.get(way.url or replica.url, headers, patience)
        if answer.response.code not in TEMPORARY:
            turn.answered()
        if replica.host.wants_tls(answer):
            await discard(answer.response, self._clock, patience)
            return
        if answer.response.code not in (200, 206):
            error = await self._refusal(session, answer, patience)
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
            may_pass = replica.location.gave_whole() and transfer.mistakes + 1 < MAX_MISTAKES
            if not may_pass or self._another(transfer, replica) is not None:
                raise
            raise WrongAnswer(f"{redacted(answer.url)}: the whole blob for a part of it") from ignored
        replica.location.found(way, answer.url if answer.redirected else None)
        if answer.response.code == 206:
            replica.location.gave_range()
        transfer.detours = 0
        await receive(answer.response, take, self._clock, patience)
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

    def _patience(self, transfer: _Transfer, replica: Replica) -> float:
        """The seconds without a byte after which a request is given up."""
        patience = min(self._stall_timeout, max(MIN_PATIENCE, self._io_timeout / 4))
        return patience if self._another(transfer, replica) is None else min(patience, ELSEWHERE_TIMEOUT)

    def _another(self, transfer: _Transfer, replica: Replica) -> Replica | None:
        """Who would be asked if this one failed."""
        return self._replicas.awake((replica, *transfer.refused, *transfer.tried))

    async def _refusal(self, session: Session, answer: Answer, patience: float) -> RegistryError:
        lines = answer.response.headers.getRawHeaders("Content-Range", [])
        error = await session.refusal(answer, patience)
        if isinstance(error, NotInRegistry):
            return NotInRegistry(
                f"{error} (the image's manifest names it, so it was deleted since: push the image again, or "
                "mount the one that the tag stands for now)"
            )
        if answer.response.code != 416 or not lines:
            return error
        return TransferFailed(f"{error} ({lines[0]:.60}, but the manifest says {self.size} bytes)")
