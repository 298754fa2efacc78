"""Whether a registry answers: where it doesn't, one request tries, and all others wait for what it finds."""

from __future__ import annotations

from collections import deque

import attrs
from twisted.internet.defer import Deferred
from twisted.internet.interfaces import IDelayedCall, IReactorTime

from erofs_twisted.registry.errors import Busy, RegistryError, Unreachable
from erofs_twisted.registry.retry import Backoff
from erofs_twisted.registry.window import Window

SUSPICIOUS = 4
"""Failures in a row, of whatever requests, after which the registry is taken to be down."""
PATIENCE = 2.0
"""Seconds that a probe is waited for, before the next one is made beside it."""


@attrs.define(eq=False)
class Circuit:
    """The way to one registry. It is open, as an electrician says, while the registry is taken to be down.

    That is after one request that could not connect, or after a few failures of any other kind in a row. One
    answer closes it, and then all who wait go on at once.

    One that asks to come back later is not down, but has too many requests: there are fewer at a time from
    then on, until it has answered enough of them. If it refuses a few in a row the circuit opens too, and
    then only the answer to a request that was made since closes it.
    """

    _clock: IReactorTime
    _failures: int = attrs.field(init=False, default=0)
    _opens_at: float | None = attrs.field(init=False, default=None)
    """When the next request may try; None while the circuit is closed."""
    _probe: Turn | None = attrs.field(init=False, default=None)
    _waiting: deque[Deferred[Turn]] = attrs.field(init=False, factory=deque)
    _timer: IDelayedCall | None = attrs.field(init=False, default=None)
    _window: Window = attrs.field(init=False, factory=Window)
    _under_way: int = attrs.field(init=False, default=0)
    """Requests that were begun since it was open: older ones may be stuck."""
    _is_busy: bool = attrs.field(init=False, default=False)
    """Is it open because the registry asked to come back later?"""
    _openings: int = attrs.field(init=False, default=0)

    @property
    def is_open(self) -> bool:
        return self._opens_at is not None

    @property
    def is_due(self) -> bool:
        """Would a request be let in at once, as the one that tries?"""
        return self.is_open and not self._waiting and self._clock.seconds() >= (self._opens_at or 0.0)

    async def enter(self) -> Turn:
        """Wait until a request may be made. Who was let in says what came of it, and leaves."""
        if not self.is_open and self._window.has_room(self._under_way):
            return self._new_turn()
        if self.is_due:
            return self._new_probe()
        waiter: Deferred[Turn] = Deferred(self._leave)
        self._waiting.append(waiter)
        self._set_timer()
        return await waiter

    def heard(self) -> Turn:
        """For a request that was made without waiting for a turn; it need not be left."""
        return Turn(self, self._openings)

    def _answered(self, turn: Turn) -> None:
        if self.is_open and self._is_busy and turn.opening < self._openings:
            return
        self._failures = 0
        self._opens_at = self._probe = None
        self._window.answered()
        self._set_timer()
        self._let_all_in()

    def _failed(self, turn: Turn, error: RegistryError, remaining: float, backoff: Backoff) -> None:
        is_probe = turn is self._probe
        if self.is_open and not is_probe:
            return
        self._failures += 1
        is_busy = isinstance(error, Busy)
        if is_busy:
            self._window.refused(self._under_way)
        if not (is_probe or isinstance(error, Unreachable) or self._failures >= SUSPICIOUS):
            return
        if is_busy:
            self._window.close()
        self._is_busy = is_busy
        self._openings += 1
        self._under_way = 0
        if isinstance(error, Unreachable):
            delay = backoff.redial(remaining)
        else:
            # Others wait for what comes of the next attempt, and have no more time than this one.
            delay = backoff.delay(self._failures - 1, remaining / 2, error.retry_after)
        self._opens_at = self._clock.seconds() + delay
        self._probe = None
        self._set_timer()

    def _left(self, turn: Turn) -> None:
        if turn.opening == self._openings:
            self._under_way -= 1
        if turn is self._probe:
            self._probe = None
            self._opens_at = self._clock.seconds()
            self._set_timer()
        self._let_all_in()

    def _leave(self, waiter: Deferred[Turn]) -> None:
        self._waiting.remove(waiter)
        self._set_timer()

    def _set_timer(self) -> None:
        """See to it that the next who waits is let in when it is time."""
        timer, self._timer = self._timer, None
        if timer is not None and timer.active():
            timer.cancel()
        if self._opens_at is not None and self._waiting:
            delay = max(self._opens_at - self._clock.seconds(), 0.0)
            self._timer = self._clock.callLater(delay, self._let_in)

    def _let_in(self) -> None:
        self._timer = None
        self._waiting.popleft().callback(self._new_probe())

    def _let_all_in(self) -> None:
        """Those for whom there is room, where none needs to wait for a probe."""
        while self._waiting and not self.is_open and self._window.has_room(self._under_way):
            self._waiting.popleft().callback(self._new_turn())

    def _new_turn(self) -> Turn:
        self._under_way += 1
        return Turn(self, self._openings)

    def _new_probe(self) -> Turn:
        probe = self._probe = self._new_turn()
        self._opens_at = self._clock.seconds() + PATIENCE
        self._set_timer()
        return probe


@attrs.define(eq=False)
class Turn:
    """Leave to make one request. ``opening`` is how often the circuit had been open when it was given."""

    _circuit: Circuit
    opening: int = 0
    _has_left: bool = attrs.field(init=False, default=False)

    def answered(self) -> None:
        """The registry is there, whatever it said."""
        self._circuit._answered(self)

    def failed(self, error: RegistryError, remaining: float, backoff: Backoff) -> None:
        """A temporary failure; ``remaining`` are the seconds that there are for other attempts."""
        self._circuit._failed(self, error, remaining, backoff)

    def leave(self) -> None:
        """The request is over; if nothing was said of it, the next may try."""
        if not self._has_left:
            self._has_left = True
            self._circuit._left(self)
