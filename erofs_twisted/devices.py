"""The devices of a daemon: one for each layer, however often that is mounted."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Hashable
from contextlib import AsyncExitStack
from typing import Any
from weakref import WeakValueDictionary

import attrs
from twisted.internet.defer import CancelledError, Deferred, DeferredLock
from twisted.internet.task import deferLater
from twisted.logger import Logger

from erofs_twisted.image import OpenImage
from erofs_twisted.interfaces import HandedDevice, IBlockDevice
from erofs_twisted.nbd.server import NBDServer
from erofs_twisted.pool import SystemCallPool

HELD_RETRY = 1.0
"""Seconds between two looks at whether a device is still in use."""


@attrs.define(eq=False)
class Served:
    """A layer as a device, with all that is behind it. ``identifier`` is what it says of its server."""

    image: OpenImage
    server: NBDServer
    device: IBlockDevice
    backend: str
    identifier: str
    users: int = 0

    async def end(self) -> None:
        """Take the device back, and all that is behind it."""
        async with self._behind() as undo:
            undo.push_async_callback(self.device.detach)

    async def leave(self) -> HandedDevice:
        """Leave the device as it is, for another process to serve: reads wait for that."""
        handed = self.device.leave()
        async with self._behind():
            connections = await self.server.hand_over()
        return attrs.evolve(
            handed, size=self.image.export.size, identifier=self.identifier, connections=connections
        )

    def _behind(self) -> AsyncExitStack:
        undo = AsyncExitStack()
        undo.push_async_callback(self.image.close)
        undo.push_async_callback(self.server.stop)
        return undo

    def abandon(self) -> None:
        """Fail the reads of its only user; nothing where there are others."""
        if self.users <= 1:
            _ = self.image.abandon()


class Devices:
    """Counts who uses what is served."""

    log = Logger()

    def __init__(self, reactor: Any, handed: dict[str, HandedDevice] | None = None) -> None:
        self._reactor = reactor
        self.pool = SystemCallPool(reactor)
        """Threads for what is shared."""
        self.handed = {} if handed is None else handed
        """By their paths, those that another daemon has given to this one and that are not taken yet; in the
        end, those that are for the next one."""
        self._served: list[tuple[Hashable, Served]] = []
        self._locks: WeakValueDictionary[Hashable, DeferredLock] = WeakValueDictionary()
        self._is_leaving = False
        self._waits: set[Deferred[None]] = set()

    async def close(self) -> None:
        """When all is given back."""
        await self.pool.stop()

    def find(self, kind: Hashable, path: str = "") -> Served | None:
        """What is served of that kind; where a device's path is named, on that device only."""
        for of_kind, served in self._served:
            if of_kind == kind and path in ("", served.device.path) and not served.device.lost.called:
                return served
        return None

    def all(self) -> list[Served]:
        """Everything that is served now."""
        return [served for _, served in self._served]

    def on(self, path: str) -> Served | None:
        """What is served on a device."""
        return next((served for _, served in self._served if served.device.path == path), None)

    async def take(self, kind: Hashable, path: str, make: Callable[[], Awaitable[Served]]) -> Served:
        """As `find`; where there is nothing, what ``make`` makes. `give_back` it.

        One of a kind is made at a time: who wants the same takes it then.
        """
        lock = self._locks.setdefault(kind, DeferredLock())
        await lock.acquire()
        try:
            served = self.find(kind, path)
            if served is None:
                served = await make()
                self._served.append((kind, served))
            served.users += 1
            return served
        finally:
            lock.release()

    async def give_back(self, served: Served) -> bool:
        """One user less. After the last it ends, as soon as nothing holds the device: open files read it
        after a lazy unmount, and so do mounts in other namespaces. False where it is `handed` to another
        daemon instead."""
        served.users -= 1
        said = False
        while not served.users and not served.device.lost.called and await served.device.is_held():
            if self._is_leaving:
                await self._leave(served)
                return False
            if not said:
                path = served.device.path
                self.log.warn("{device} is still in use; serving it until that ends", device=path)
                said = True
            await self._wait()
        if not served.users:
            self._forget(served)
            await served.end()
        return True

    async def _wait(self) -> None:
        """Some time, or until there is something else to do."""
        wait: Deferred[None] = deferLater(self._reactor, HELD_RETRY)
        self._waits.add(wait)
        try:
            await wait
        except CancelledError:
            pass
        finally:
            self._waits.discard(wait)

    def leave_what_is_held(self) -> None:
        """Hand over what is waited for, too."""
        self._is_leaving = True
        for wait in list(self._waits):
            wait.cancel()

    async def leave(self, served: Served) -> None:
        """One user less. After the last one it is `handed` to another daemon."""
        served.users -= 1
        if not served.users:
            await self._leave(served)

    async def _leave(self, served: Served) -> None:
        self._forget(served)
        self.handed[served.device.path] = await served.leave()

    def _forget(self, served: Served) -> None:
        self._served = [(kind, each) for kind, each in self._served if each is not served]
