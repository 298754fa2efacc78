"""Threads for tests without threads: work runs when a test says so."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from twisted.internet.task import Clock
from twisted.python.failure import Failure
from twisted.python.threadpool import ThreadPool


class ThreadlessReactor(Clock):
    """A clock, to which other threads would hand their results."""

    def callFromThread(self, call: Callable[..., object], *args: object) -> None:
        call(*args)


class HeldPool(ThreadPool):
    """Keeps its work until `run` is called. With ``held`` false, work runs at once."""

    def __init__(self, held: bool = True) -> None:
        super().__init__(0, 1)
        self.held = held
        self.work: list[Callable[[], None]] = []

    def callInThreadWithCallback(
        self, onResult: Any, func: Callable[..., Any], *args: Any, **kw: Any
    ) -> None:
        def work() -> None:
            try:
                result = func(*args, **kw)
            except Exception:  # noqa: BLE001 - as a thread pool does
                onResult(False, Failure())
            else:
                onResult(True, result)

        self.work.append(work)
        if not self.held:
            self.run()

    def run(self) -> None:
        """All that was given to it so far, and all that follows from that."""
        while self.work:
            self.work.pop(0)()
