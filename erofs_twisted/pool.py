"""Threads for system calls that may block for long, such as mount(2) on a device whose registry is slow."""

from __future__ import annotations

from threading import Thread
from typing import Any

from twisted.internet.defer import Deferred, TimeoutError
from twisted.logger import Logger
from twisted.python.failure import Failure
from twisted.python.threadpool import ThreadPool


class DaemonThread(Thread):
    """A thread that the interpreter's exit does not wait for."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, daemon=True, **kwargs)


class SystemCallPool(ThreadPool):
    """A started pool of up to ``size`` daemon threads, apart from the reactor's own pool: a call that never
    returns takes neither DNS nor the process's exit with it. ``name`` is its threads'."""

    log = Logger()
    threadFactory = DaemonThread

    def __init__(
        self, reactor: Any, size: int = 4, patience: float = 10.0, name: str = "system-calls"
    ) -> None:
        super().__init__(0, size, name=name)
        self._reactor = reactor
        self._patience = patience
        self.start()

    def stop(self) -> Deferred[None]:  # type: ignore[override]
        """A Deferred that fires when every thread has ended, or ``patience`` seconds later: those that are
        stuck in the kernel are left to it."""
        ended: Deferred[None] = Deferred()

        def join() -> None:
            ThreadPool.stop(self)
            self._reactor.callFromThread(ended.callback, None)

        DaemonThread(target=join, name=f"{self.name}-end").start()
        return ended.addTimeout(self._patience, self._reactor).addErrback(self._abandon)

    def _abandon(self, failure: Failure) -> None:
        failure.trap(TimeoutError)
        stuck = [thread.name for thread in self.threads if thread.is_alive()]
        self.log.warn("system calls that do not end are left alone: {stuck}", stuck=stuck)
