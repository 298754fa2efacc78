"""Notices when a mount has gone, whoever unmounted it."""

from __future__ import annotations

import os
import select
from collections.abc import Callable
from typing import Any

from twisted.internet.defer import Deferred
from twisted.internet.interfaces import IReadDescriptor
from zope.interface import implementer

from erofs_twisted.mount.mountinfo import Mount, mount_at, parse_mountinfo


@implementer(IReadDescriptor)
class MountTable:
    """The mounts of this process's mount namespace; once added to a reactor, it calls ``changed`` after each
    change.

    The kernel reports a change as EPOLLPRI | EPOLLERR on an open mountinfo file (proc_pid_mounts(5)). As that
    is readable at all times, a reactor would spin on it. So an epoll of our own waits for the change alone,
    and the reactor for that epoll to become readable.
    """

    def __init__(self, changed: Callable[[], None], path: str = "/proc/self/mountinfo") -> None:
        self._changed = changed
        self._file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        self._epoll = select.epoll()
        self._epoll.register(self._file, select.EPOLLPRI | select.EPOLLERR)

    def mounts(self) -> list[Mount]:
        """What is mounted now. procfs answers from memory: this never waits for a file system."""
        content = bytearray()
        os.lseek(self._file, 0, os.SEEK_SET)
        while piece := os.read(self._file, 1 << 16):
            content += piece
        return parse_mountinfo(bytes(content))

    def close(self) -> None:
        self._epoll.close()
        os.close(self._file)

    def fileno(self) -> int:
        return self._epoll.fileno()

    def doRead(self) -> None:
        self._epoll.poll(0)  # takes the event: the epoll is readable again at the next change
        self._changed()

    def connectionLost(self, reason: Any) -> None:
        """Nothing to do: `close` is the end."""

    def logPrefix(self) -> str:
        return "mount watch"


class MountWatch:
    """Watches mounts from the reactor's thread, without touching a mounted file system."""

    def __init__(
        self, reactor: Any, open_table: Callable[[Callable[[], None]], MountTable] = MountTable
    ) -> None:
        self._reactor = reactor
        self._open_table = open_table
        self._table: MountTable | None = None
        self._waiting: dict[Deferred[None], tuple[int, str]] = {}

    def gone(self, path: str) -> Deferred[None]:
        """A Deferred that fires with None when the mount that is now on top at ``path`` is there no more: at
        once where nothing is. ``path`` is one without symbolic links, as `Mountpoint.path`. Cancellable."""
        table = self._open()
        there = mount_at(table.mounts(), path)
        waiter: Deferred[None] = Deferred(self._forget)
        self._waiting[waiter] = (0 if there is None else there.mount_id, path)
        self._look()
        return waiter

    def close(self) -> None:
        """Stop watching. Deferreds that have not fired never will."""
        self._waiting.clear()
        if self._table is not None:
            self._reactor.removeReader(self._table)
            self._table.close()
            self._table = None

    def _open(self) -> MountTable:
        if self._table is None:
            self._table = self._open_table(self._look)
            self._reactor.addReader(self._table)
        return self._table

    def _look(self) -> None:
        if self._table is None:
            return
        present = {(mount.mount_id, mount.path) for mount in self._table.mounts()}
        for waiter in [waiter for waiter, watched in self._waiting.items() if watched not in present]:
            self._forget(waiter)
            waiter.callback(None)

    def _forget(self, waiter: Deferred[None]) -> None:
        self._waiting.pop(waiter, None)
        if not self._waiting:
            self.close()
