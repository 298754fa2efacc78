"""Whether a registry answers: where it doesn't, one request tries, and all others wait for what it finds."""

from __future__ import annotations

from collections import deque

import attrs
from twisted.internet.defer import Deferred
from twisted.internet.interfaces import IDelayedCall, IReactorTime

from erofs_twisted.registry.errors import Busy, RegistryError, Unreachable
from erofs_twisted.registry.pace import Pace
from erofs_twisted.registry.retry import Backoff

SUSPICIOUS = 4
"""Failures in a row, of whatever requests, after which the registry is taken to be down."""
PATIENCE = 2.0
"""Seconds that a probe is waited for, before the next one is made beside it."""


@attrs.define(eq=False)
class Circuit:
    """The way to one registry. It is open, as an electrician says, while the registry is taken to be down.

    That is after one request that could not connect, or after a few failures of any other kind in a row. One
    answer closes it, and then all who wait go on at once.

    One that asks to come back later is not down, but has too many requests: from then on they are made at the
    `Pace` that it takes. If it goes on to refuse them the circuit opens too, and then only the answer to a
    request that was made since closes it.
    """

    _clock: IReactorTime
    _failures: int = attrs.field(init=False, default=0)
    _opens_at: float | None = attrs.field(init=False, default=None)
    """When the next request may try; None while the circuit is closed."""
    _probe: Turn | None = attrs.field(init=False, default=None)
    _waiting: deque[Deferred[Turn]] = attrs.field(init=False, factory=deque)
    _timer: IDelayedCall | None = attrs.field(init=False, default=None)
    _pace: Pace = attrs.field(init=False, factory=Pace)
    _is_busy: bool = attrs.field(init=False, default=False)
    """Is it open because the registry asked to come back later?"""
    _opened_at: float = attrs.field(init=False, default=float("-inf"))

    @property
    def is_open(self) -> bool:
        return self._opens_at is not None

    @property
    def is_due(self) -> bool:
        """Would a request be let in at once, as the one that tries?"""
        return self.is_open and not self._waiting and self._clock.seconds() >= (self._opens_at or 0.0)

    @property
    def is_paced(self) -> bool:
        """Are requests made to wait, so that the registry has no more of them than it takes?"""
        return self._pace.rate is not None

    async def enter(self) -> Turn:
        """Wait until a request may be made. Who was let in says what came of it, and leaves."""
        if not self.is_open and not self._waiting and self._clock.seconds() >= self._pace.next_at:
            return self._new_turn()
        if self.is_due:
            return self._new_probe()
        waiter: Deferred[Turn] = Deferred(self._leave)
        self._waiting.append(waiter)
        self._set_timer()
        return await waiter

    def heard(self) -> Turn:
        """For a request that was made without waiting for a turn; it need not be left."""
        return Turn(self, self._clock.seconds())

    def _answered(self, turn: Turn) -> None:
        if self.is_open and self._is_busy and turn.begun_at < self._opened_at:
            return
        self._failures = 0
        self._opens_at = self._probe = None
        self._pace.answered(self._clock.seconds())
        self._let_all_in()

    def _failed(self, turn: Turn, error: RegistryError, remaining: float, backoff: Backoff) -> None:
        is_probe = turn is self._probe
        if self.is_open and not is_probe:
            return
        now = self._clock.seconds()
        is_busy = isinstance(error, Busy)
        if is_busy and not self._pace.refused(turn.begun_at, now) and not is_probe:
            return
        self._failures += 1
        if not (is_probe or isinstance(error, Unreachable) or self._failures >= SUSPICIOUS):
            return
        self._is_busy = is_busy
        self._opened_at = now
        self._pace = Pace()
        if isinstance(error, Unreachable):
            delay = backoff.redial(remaining)
        else:
            # Others wait for what comes of the next attempt, and have no more time than this one.
            delay = backoff.delay(self._failures - 1, remaining / 2, error.retry_after)
        self._opens_at = now + delay
        self._probe = None
        self._set_timer()

    def _left(self, turn: Turn) -> None:
        if turn is self._probe:
            self._probe = None
            self._opens_at = self._clock.seconds()
            self._set_timer()

    def _leave(self, waiter: Deferred[Turn]) -> None:
        self._waiting.remove(waiter)
        self._set_timer()

    def _set_timer(self) -> None:
        """See to it that the next who waits is let in when it is time."""
        timer, self._timer = self._timer, None
        if timer is not None and timer.active():
            timer.cancel()
        if self._waiting:
            when = self._pace.next_at if self._opens_at is None else self._opens_at
            delay = max(when - self._clock.seconds(), 0.0)
            self._timer = self._clock.callLater(delay, self._let_in)

    def _let_in(self) -> None:
        self._timer = None
        if self.is_open:
            self._waiting.popleft().callback(self._new_probe())
        else:
            self._let_all_in()

    def _let_all_in(self) -> None:
        """Those whose time has come, where none needs to wait for a probe."""
        while self._waiting and not self.is_open and self._clock.seconds() >= self._pace.next_at:
            self._waiting.popleft().callback(self._new_turn())
        self._set_timer()

    def _new_turn(self) -> Turn:
        now = self._clock.seconds()
        self._pace.begun(now)
        return Turn(self, now)

    def _new_probe(self) -> Turn:
        probe = self._probe = self._new_turn()
        self._opens_at = self._clock.seconds() + PATIENCE
        self._set_timer()
        return probe


@attrs.define(eq=False)
class Turn:
    """Leave to make one request, given at ``begun_at``."""

    _circuit: Circuit
    begun_at: float

    def answered(self) -> None:
        """The registry is there, whatever it said."""
        self._circuit._answered(self)

    def failed(self, error: RegistryError, remaining: float, backoff: Backoff) -> None:
        """A temporary failure; ``remaining`` are the seconds that there are for other attempts."""
        self._circuit._failed(self, error, remaining, backoff)

    def leave(self) -> None:
        """The request is over; if nothing was said of it, the next may try."""
        self._circuit._left(self)
