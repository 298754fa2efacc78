"""Work that is done once for all who want it at the same time."""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from typing import Any, Generic, TypeVar

import attrs
from twisted.internet.defer import Deferred
from twisted.python.failure import Failure

Result = TypeVar("Result")


@attrs.define(eq=False)
class _Run(Generic[Result]):
    waiters: list[Deferred[Result]] = attrs.field(factory=list)
    work: Deferred[None] | None = None


@attrs.define(eq=False)
class Shared(Generic[Result]):
    """Runs ``work`` when somebody joins, unless it runs already; each who joins has a Deferred of their own.

    One who cancels only leaves; when the last has left, the work is cancelled.
    """

    _work: Callable[[], Coroutine[Deferred[Any], Any, Result]]
    _run: _Run[Result] | None = attrs.field(init=False, default=None)

    @property
    def is_running(self) -> bool:
        return self._run is not None

    def join(self) -> Deferred[Result]:
        """What the run under way, or a new one, comes to."""
        run = self._run
        if run is not None:
            return self._wait_for(run)
        run = self._run = _Run()
        waiter = self._wait_for(run)
        run.work = Deferred.fromCoroutine(self._work()).addBoth(self._finished, run)
        return waiter

    def _wait_for(self, run: _Run[Result]) -> Deferred[Result]:
        waiter: Deferred[Result] = Deferred(lambda leaving: self._leave(run, leaving))
        run.waiters.append(waiter)
        return waiter

    def _leave(self, run: _Run[Result], waiter: Deferred[Result]) -> None:
        run.waiters.remove(waiter)
        if not run.waiters and run.work is not None:
            if self._run is run:
                self._run = None
            run.work.cancel()

    def _finished(self, result: Result | Failure, run: _Run[Result]) -> None:
        if self._run is run:
            self._run = None
        waiters, run.waiters = run.waiters, []
        for waiter in waiters:
            waiter.callback(result)
