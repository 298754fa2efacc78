"""Where a blob's bytes are: at its registry, or where that redirects to.

A registry in front of an object store answers each request by a redirect to a signed URL. That works for a
while, so it is kept, and used until its end is near or it is refused. Then one request asks the registry
again, and those that need the answer wait for that one.
"""

from __future__ import annotations

import attrs
from twisted.internet.defer import Deferred
from twisted.internet.defer import TimeoutError as TimedOut
from twisted.internet.interfaces import IReactorTime

from erofs_twisted.registry.signedurl import lifetime
from erofs_twisted.steadyclock import unix_time

RENEW_AT = 0.75
"""The part of a URL's life after which a new one is asked for, while the old one still serves."""
RENEW_BEFORE = 10.0
"""Seconds before its end at which that is soon enough."""
WHOLE_ANSWERS, FIRST_WHOLE_ANSWERS = 5, 2
"""In a row, to whatever reads of a range: then the whole blob is all that there is to be had. Fewer where
there never was anything else."""
PATIENCE = 2.0
"""Seconds that the one request which asks is waited for, before another one asks too."""


@attrs.frozen(eq=False)
class Way:
    """How one request is to go: to ``url``, or where that is None, to the registry.

    With ``asks`` it is the one that the others may be waiting for.
    """

    url: str | None = attrs.field(repr=False)
    asks: bool = False


@attrs.frozen
class _Redirect:
    url: str = attrs.field(repr=False)
    renew_at: float
    ends_at: float

    @classmethod
    def received(cls, url: str, clock: IReactorTime) -> _Redirect:
        life, now = lifetime(url, unix_time(clock)), clock.seconds()
        if life is None:
            return cls(url, float("inf"), float("inf"))
        return cls(url, now + max(life * RENEW_AT, life - RENEW_BEFORE), now + life)


@attrs.define(eq=False)
class BlobLocation:
    """What is known of where one blob is."""

    _clock: IReactorTime
    _redirect: _Redirect | None = attrs.field(init=False, default=None)
    _is_direct: bool = attrs.field(init=False, default=False)
    """Did the registry send the bytes itself, the last time?"""
    _whole_answers: int = attrs.field(init=False, default=0)
    _gave_ranges: bool = attrs.field(init=False, default=False)
    _asking: Way | None = attrs.field(init=False, default=None)
    _waiting: list[Deferred[None]] = attrs.field(init=False, factory=list)

    async def choose(self) -> Way:
        """How a request is to go now. `settle` it, whatever comes of it."""
        while True:
            way = self._choose()
            if way is not None:
                return way
            asking = self._asking
            try:
                await self._answer().addTimeout(PATIENCE, self._clock)
            except TimedOut:
                if self._asking is asking:
                    self._asking = None

    def gave_range(self) -> None:
        """A range was asked for, and answered as one."""
        self._gave_ranges, self._whole_answers = True, 0

    def gave_whole(self) -> bool:
        """A range was asked for, and answered with the whole blob. May the next one be answered better?"""
        self._whole_answers += 1
        return self._whole_answers < (WHOLE_ANSWERS if self._gave_ranges else FIRST_WHOLE_ANSWERS)

    def found(self, way: Way, url: str | None) -> None:
        """The bytes come from ``url``, where the registry sent us to; None: from the registry."""
        if way.url is None:
            self._is_direct = url is None
            self._redirect = None if url is None else _Redirect.received(url, self._clock)
            self._wake()
        self.settle(way)

    def lost(self, way: Way) -> bool:
        """No bytes come, that way. Is there another one?"""
        known = self._redirect
        if way.url is not None:
            if known is not None and known.url == way.url:
                self._redirect = None
            return True
        if self._asking is not way or known is None or self._clock.seconds() >= known.ends_at:
            return False
        # The registry was asked ahead of time. When the time has come is soon enough.
        self._redirect = attrs.evolve(known, renew_at=known.ends_at)
        self.settle(way)
        return True

    def settle(self, way: Way) -> None:
        """A request has had its answer, or will have none."""
        if self._asking is way:
            self._asking = None
            self._wake()

    def _wake(self) -> None:
        waiting, self._waiting = self._waiting, []
        for waiter in waiting:
            waiter.callback(None)

    def _choose(self) -> Way | None:
        now, known = self._clock.seconds(), self._redirect
        if known is not None and now < (known.ends_at if self._asking else known.renew_at):
            return Way(known.url)
        if known is None and self._is_direct:
            return Way(None)
        if self._asking is not None:
            return None
        self._asking = Way(None, asks=True)
        return self._asking

    def _answer(self) -> Deferred[None]:
        waiter: Deferred[None] = Deferred(self._waiting.remove)
        self._waiting.append(waiter)
        return waiter
