"""The devices of a daemon: one for each layer, however often that is mounted."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Hashable
from contextlib import AsyncExitStack
from typing import Any
from weakref import WeakValueDictionary

import attrs
from twisted.internet.defer import DeferredLock

from erofs_twisted.device.driver import Reconnected
from erofs_twisted.image import OpenImage
from erofs_twisted.interfaces import HandedDevice, IBlockDevice
from erofs_twisted.nbd.server import NBDServer
from erofs_twisted.pool import SystemCallPool


@attrs.define(eq=False)
class Served:
    """A layer as a device, with all that is behind it. ``identifier`` is what it says of its server."""

    image: OpenImage
    server: NBDServer
    device: IBlockDevice
    backend: str
    identifier: str
    users: set[object] = attrs.field(factory=set)

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
        if len(self.users) <= 1:
            _ = self.image.abandon()


class Devices:
    """Knows who uses what is served."""

    def __init__(
        self,
        reactor: Any,
        handed: dict[str, HandedDevice] | None = None,
        reclaimed: dict[str, Reconnected] | None = None,
    ) -> None:
        self.pool = SystemCallPool(reactor)
        """Threads for what is shared."""
        self.handed = {} if handed is None else handed
        """By their paths, those that another daemon has given to this one and that are not taken yet; in the
        end, those that are for the next one."""
        self.reclaimed = {} if reclaimed is None else reclaimed
        """By their paths, those that wait for a server, and that have a socket for that."""
        self._served: list[tuple[Hashable, Served]] = []
        self._locks: WeakValueDictionary[Hashable, DeferredLock] = WeakValueDictionary()

    async def close(self) -> None:
        """When all is given back."""
        await self.pool.stop()

    def let_go(self, path: str) -> None:
        """Of one that nobody serves: requests wait for another socket, as long as the kernel lets them."""
        found = self.reclaimed.pop(path, None)
        if found is not None:
            found.sock.close()

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

    async def take(
        self, kind: Hashable, path: str, make: Callable[[], Awaitable[Served]], user: object
    ) -> Served:
        """As `find`; where there is nothing, what ``make`` makes. The ``user`` is to `give_back` it.

        One of a kind is made at a time: who wants the same takes it then.
        """
        lock = self._locks.setdefault(kind, DeferredLock())
        await lock.acquire()
        try:
            served = self.find(kind, path)
            if served is None:
                served = await make()
                self._served.append((kind, served))
            served.users.add(user)
            return served
        finally:
            lock.release()

    async def give_back(self, served: Served, user: object) -> None:
        """With its last user it ends, whoever has the device open."""
        served.users.discard(user)
        if not served.users:
            self._forget(served)
            await served.end()

    async def leave(self, served: Served, user: object) -> None:
        """With its last user it is `handed` to another daemon."""
        served.users.discard(user)
        if not served.users:
            self._forget(served)
            self.handed[served.device.path] = await served.leave()

    def _forget(self, served: Served) -> None:
        self._served = [(kind, each) for kind, each in self._served if each is not served]
