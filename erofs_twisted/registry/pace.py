"""How many requests a second a server takes that refuses some for being too many.

As many as it has just answered, and then a few more each second, until it refuses too large a part again: so
it is asked for about as much as it gives. One that refuses now and then for reasons of its own is asked as
fast as ever.
"""

from __future__ import annotations

from collections import deque

import attrs

WINDOW = 1.0
"""Seconds that are looked back upon."""
FEW, MUCH = 3, 0.2
"""So many refusals in a row, or that part of as many requests, are a sign that there are too many."""
SLOWEST, FASTEST = 2.0, 1000.0
"""Requests a second: no fewer than the one, and no limit above the other."""
HEADROOM = 1.05
"""Times what was answered, after a refusal."""
CAREFULLY, BOLDLY = 1.1, 2.0
"""Times what it was, each second: where it may be too much again, and where not."""
MEMORY = 30.0
"""Seconds after which what was too much may be too much no longer."""


@attrs.define
class Pace:
    """``rate`` is in requests a second, None: there is no limit. Times are those of one clock, in seconds."""

    rate: float | None = attrs.field(init=False, default=None)
    next_at: float = attrs.field(init=False, default=0.0)
    """When the next request may begin."""
    _too_fast: float = attrs.field(init=False, default=float("inf"))
    """The rate at which it was last slowed down."""
    _changed_at: float = attrs.field(init=False, default=float("-inf"))
    _slowed_at: float = attrs.field(init=False, default=float("-inf"))
    _answers: deque[float] = attrs.field(init=False, factory=deque)
    _refusals: deque[float] = attrs.field(init=False, factory=deque)
    _in_a_row: int = attrs.field(init=False, default=0)

    def begun(self, now: float) -> None:
        """A request was made."""
        if self.rate is not None:
            self.next_at = max(self.next_at, now) + 1 / self.rate

    def answered(self, now: float) -> None:
        """There was an answer to one."""
        self._in_a_row = 0
        self._answers.append(now)
        self._look_back(now)
        if self.rate is not None and now >= self._changed_at + WINDOW:
            is_known = self.rate * BOLDLY >= self._too_fast and now < self._slowed_at + MEMORY
            faster = self.rate * (CAREFULLY if self._refusals or is_known else BOLDLY)
            self._set(faster if faster <= FASTEST else None, now)

    def refused(self, begun_at: float, now: float) -> bool:
        """One that had begun then was refused. Does that say anything of the present pace?"""
        if begun_at < self._slowed_at:
            return False
        self._in_a_row += 1
        self._refusals.append(now)
        self._look_back(now)
        refused, answered = len(self._refusals), len(self._answers)
        asked = refused + answered
        if self._in_a_row >= FEW or (asked >= FEW and refused > MUCH * asked):
            self._too_fast = float("inf") if self.rate is None else self.rate
            self._set(max(HEADROOM * answered / WINDOW, SLOWEST), now)
            self._slowed_at = now
            self._in_a_row = 0
            self._refusals.clear()
        return True

    def _set(self, rate: float | None, now: float) -> None:
        self.rate = rate
        self._changed_at = now
        self.next_at = 0.0 if rate is None else now + 1 / rate

    def _look_back(self, now: float) -> None:
        for times in (self._answers, self._refusals):
            while times and times[0] <= now - WINDOW:
                times.popleft()
