"""The order in which ranges are asked for, and how many at a time: one queue for all blobs of an origin."""

from __future__ import annotations

from collections import deque

from twisted.internet.interfaces import IDelayedCall, IReactorTime

from erofs_twisted.blocks.fetch import Fetch, FetchOwner, Priority
from erofs_twisted.blocks.link import Link
from erofs_twisted.interfaces import Tell, silent

LIMIT = 32
"""Fetches at a time, for whatever purpose."""
RESERVED = 4
"""Places of those which guesses leave to readers."""
BACKGROUND_LIMIT = 2
"""Background fetches at a time: while the one's request is on its way, the other's bytes come."""
QUIET = 0.25
"""Seconds since the last other fetch ended, after which the link is idle: a program that starts pauses for
less between its reads."""
ELSEWHERE_POLL = 0.01
"""Seconds between two looks at what another process fetches."""


class FetchQueue:
    """Starts fetches: what readers wait for before guesses, and these before the background.

    Guesses are kept to what the `Link` holds, and leave places free, so that a reader need not wait for one
    to end. The background goes on only while nothing else does; or, with `hurries`, also beside others as
    long as they leave room on the link.
    """

    def __init__(self, clock: IReactorTime, link: Link | None = None, tell: Tell = silent) -> None:
        self._tell = tell
        self.link = link or Link()
        self.hurries = False
        """Is the background soon done, so that it is worth a little delay for readers?"""
        self._clock = clock
        self._running: set[Fetch] = set()
        self._unanswered: dict[Fetch, float] = {}
        """When those of them began of which no byte has come yet."""
        self._queues: tuple[deque[Fetch], ...] = tuple(deque() for _ in Priority)
        self._elsewhere: list[Fetch] = []
        """Those that another process is at."""
        self._starting = False
        self._busy_at = float("-inf")
        """When the last fetch that was not of the background ended."""
        self._timer: IDelayedCall | None = None

    def add(self, fetch: Fetch) -> None:
        """Queue a fetch, for the next `start`."""
        self._queues[fetch.priority].append(fetch)

    def promote(self, fetch: Fetch) -> None:
        """A reader waits for a guess now. If it has not begun yet, it is a guess no more."""
        if fetch.is_guess and not fetch.started:
            fetch.priority = Priority.DEMAND
            self.add(fetch)

    def start(self) -> None:
        """Start what there is room for."""
        if self._starting:
            return
        self._starting = True
        try:
            while (fetch := self._next()) is not None:
                if fetch.owner.may_start(fetch):
                    self._start(fetch)
                elif not fetch.ended and fetch not in self._elsewhere:
                    self._elsewhere.append(fetch)
        finally:
            self._starting = False
        self._set_timer()

    @property
    def running(self) -> int:
        """How many have begun, and not ended."""
        return len(self._running)

    def cancel(self, owner: FetchOwner) -> None:
        """Forget what has not begun of an owner's fetches, and cancel the rest."""
        for waiting in (*self._queues, self._elsewhere):
            for fetch in waiting:
                if fetch.owner is owner:
                    fetch.cancel()
        self._elsewhere = [fetch for fetch in self._elsewhere if not fetch.ended]
        for fetch in list(self._running):
            if fetch.owner is owner:
                fetch.cancel()
        self._set_timer()

    def _next(self) -> Fetch | None:
        for priority in Priority:
            queue = self._queues[priority]
            # Promoted fetches are still in the queue that they were in first.
            while queue and (queue[0].ended or queue[0].started or queue[0].priority is not priority):
                queue.popleft()
            if queue:
                return queue.popleft() if self._has_room(priority) else None
        return None

    def _has_room(self, priority: Priority) -> bool:
        running = len(self._running)
        if priority is Priority.DEMAND:
            return running < LIMIT
        if priority is Priority.AHEAD:
            in_flight = sum(fetch.remaining for fetch in self._running if fetch.is_guess)
            return running < LIMIT - RESERVED and (not in_flight or in_flight < self.link.window)
        others = sum(fetch.priority is not Priority.BACKGROUND for fetch in self._running)
        if running - others >= BACKGROUND_LIMIT:
            return False
        if not others and (self.hurries or not self._until_quiet()):
            return True
        return self.hurries and sum(fetch.remaining for fetch in self._running) < (self.link.product or 0)

    def _until_quiet(self) -> float:
        return max(0.0, self._busy_at + QUIET - self._clock.seconds())

    def _start(self, fetch: Fetch) -> None:
        length, began = fetch.remaining, self._clock.seconds()
        self._running.add(fetch)
        self._unanswered[fetch] = began

        def ended(_: None) -> None:
            self._running.remove(fetch)
            self._unanswered.pop(fetch, None)
            now = self._clock.seconds()
            if fetch.priority is not Priority.BACKGROUND:
                self._busy_at = now
            if self._tell is not silent:
                fetched, name = length - fetch.remaining, fetch.priority.name.lower()
                self._tell(f"{name}: fetched {fetched} of {length} bytes in {1000 * (now - began):.1f} ms")
            fetch.owner.fetch_ended(fetch)
            self.start()

        _ = fetch.start(self._arrived).addCallback(ended)

    def _arrived(self, fetch: Fetch, length: int) -> None:
        now = self._clock.seconds()
        began = self._unanswered.pop(fetch, None)
        if began is not None:
            self.link.answered(now - began)
        self.link.received(now, length)

    def _set_timer(self) -> None:
        """See to it that what cannot start now is looked at again."""
        if self._elsewhere:
            delay = ELSEWHERE_POLL
        elif self._queues[Priority.BACKGROUND] and not self._running:
            delay = self._until_quiet()
        else:
            if self._timer is not None:
                self._timer.cancel()
                self._timer = None
            return
        if self._timer is not None and self._timer.getTime() > self._clock.seconds() + delay:
            self._timer.cancel()
            self._timer = None
        if self._timer is None:
            self._timer = self._clock.callLater(delay, self._look_again)

    def _look_again(self) -> None:
        self._timer = None
        elsewhere, self._elsewhere = self._elsewhere, []
        for fetch in elsewhere:
            if not fetch.ended:
                self._queues[fetch.priority].appendleft(fetch)
        self.start()
