"""Ranges of a blob in a registry, checked, resumed and retried."""

from __future__ import annotations

from collections.abc import Callable

import attrs
from twisted.internet.defer import Deferred
from twisted.internet.interfaces import IReactorTime
from twisted.internet.task import deferLater
from twisted.logger import Logger
from twisted.web.iweb import UNKNOWN_LENGTH, IResponse
from zope.interface import implementer

from erofs_twisted.errors import RangesIgnored
from erofs_twisted.interfaces import Delivery, IBlobReader
from erofs_twisted.registry.body import Taker, abandon, discard, receive
from erofs_twisted.registry.contentrange import check_partial
from erofs_twisted.registry.errors import BlobUnreadable, RegistryError, TransferFailed
from erofs_twisted.registry.manifest import Descriptor
from erofs_twisted.registry.retry import Backoff
from erofs_twisted.registry.session import Answer, Session
from erofs_twisted.registry.urls import redacted

MIN_STALL, MAX_STALL = 1.0, 15.0
"""Seconds without a byte after which a request is made again: a quarter of the time there is, within these.
(Twisted takes 0.3 s to say that a connection is refused.)"""

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

    @property
    def is_complete(self) -> bool:
        return self.position == self.end

    def take(self, data: bytes) -> bool:
        """Of a body that is the rest of the range."""
        if len(data) > self.end - self.position:
            raise TransferFailed("the body is longer than its Content-Range")
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

    A read fails at once where trying again is no use, else when it made no progress for ``io_timeout``
    seconds. Where the registry redirects to (a CDN's signed URL, usually) is asked again directly, as long as
    that works.
    """

    _session: Session
    _url: str
    _descriptor: Descriptor
    _io_timeout: float
    _backoff: Backoff
    _with_tls: Callable[[], tuple[Session, str]] | None = None
    """Gives session and URL for when a registry that was asked without TLS turns out to want it."""
    _location: str | None = attrs.field(init=False, default=None)
    _log = Logger()

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
        attempt = 0
        while not transfer.is_complete:
            before = transfer.position
            location = self._location
            try:
                await self._attempt(transfer, location or self._url)
            except RegistryError as error:
                if transfer.position > before:
                    attempt = 0
                if location is not None:
                    # The signed URL may have expired, or its server be down: ask the registry for another.
                    self._location = None
                if location is None or error.temporary:
                    await self._pause(transfer, attempt, error)
                    attempt += 1

    async def _pause(self, transfer: _Transfer, attempt: int, error: RegistryError) -> None:
        """Wait before the next attempt. Raises `BlobUnreadable` if none is worth making."""
        clock = transfer.clock
        remaining = transfer.progress_at + self._io_timeout - clock.seconds()
        where = f"bytes {transfer.position} to {transfer.end} of {self.digest}"
        if not error.temporary:
            raise BlobUnreadable(f"{where} cannot be read: {error}") from error
        if remaining <= 0:
            raise BlobUnreadable(
                f"{where} could not be read within {self._io_timeout:g} seconds: {error}"
            ) from error
        delay = self._backoff.delay(attempt, remaining, error.retry_after)
        self._log.info(
            "{where}: {reason}; trying again in {delay:.1f} s", where=where, reason=str(error), delay=delay
        )
        await deferLater(clock, delay)

    async def _attempt(self, transfer: _Transfer, url: str) -> None:
        """One request for what is left of the range. Raises `RegistryError` unless all of it came, or there
        is another place to ask."""
        patience = max(MIN_STALL, min(MAX_STALL, self._io_timeout / 4))
        headers = {"Range": f"bytes={transfer.position}-{transfer.end - 1}"}
        answer = await self._session.get(url, headers, patience)
        if answer.response.code == 400 and self._with_tls is not None and answer.url.startswith("http:"):
            await discard(answer.response, transfer.clock, patience)
            self._session, self._url = self._with_tls()
            return
        if answer.response.code not in (200, 206):
            raise await self._refusal(answer, patience)
        try:
            take = self._taker(answer.response, transfer)
        except RegistryError as error:
            abandon(answer.response)
            raise TransferFailed(f"{redacted(answer.url)}: {error}") from error
        except RangesIgnored:
            abandon(answer.response)
            raise
        if answer.redirected:
            self._location = answer.url
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
        if answer.response.code != 416 or not lines:
            return error
        return TransferFailed(f"{error} ({lines[0]:.60}, but the manifest says {self.size} bytes)")
