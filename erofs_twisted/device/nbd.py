"""Exports as ``/dev/nbdN``, over the nbd driver's netlink interface."""

from __future__ import annotations

import socket
from collections.abc import MutableMapping
from typing import Any

import attrs
from twisted.internet.defer import CancelledError, Deferred
from twisted.logger import Logger
from twisted.python.threadpool import ThreadPool
from zope.interface import implementer

from erofs_twisted.device.driver import Attached, NBDDriver, Reconnected
from erofs_twisted.device.settings import NBDSettings
from erofs_twisted.device.uapi import NBD_FLAG_HAS_FLAGS, NBD_FLAG_READ_ONLY, Connection
from erofs_twisted.errors import MountError
from erofs_twisted.interfaces import (
    Connected,
    HandedDevice,
    IBlockDevice,
    IDeviceConnector,
    IExport,
    INBDServer,
)
from erofs_twisted.syscalls import in_thread, in_thread_to_its_end

BLOCK_SIZE = 4096


@implementer(IDeviceConnector)
class NetlinkConnector:
    """The ``nbd`` back end: one socket pair a device, its other end in the kernel's hands. By their paths,
    ``handed`` are devices that another process has given to this one, and ``reclaimed`` those that have a new
    socket since it was killed; it takes out what it adopts."""

    name = "nbd"

    def __init__(
        self,
        reactor: Any,
        pool: ThreadPool,
        settings: NBDSettings | None = None,
        driver: NBDDriver | None = None,
        handed: MutableMapping[str, HandedDevice] | None = None,
        reclaimed: MutableMapping[str, Reconnected] | None = None,
    ) -> None:
        self._reactor = reactor
        self._pool = pool
        self._settings = settings or NBDSettings()
        self._driver = NBDDriver() if driver is None else driver
        self._handed = {} if handed is None else handed
        self._reclaimed = {} if reclaimed is None else reclaimed

    def check(self) -> Deferred[None]:
        return Deferred.fromCoroutine(in_thread(self._reactor, self._pool, self._driver.check))

    def attach(
        self, export: IExport, server: INBDServer, identifier: str | None = None
    ) -> Deferred[IBlockDevice]:
        return Deferred.fromCoroutine(self._attach(export, server, identifier))

    def connected(self, identifier: str) -> Deferred[list[Connected]]:
        return Deferred.fromCoroutine(
            in_thread(self._reactor, self._pool, self._driver.connected, identifier)
        )

    def adopt(
        self, path: str, export: IExport, server: INBDServer, identifier: str
    ) -> Deferred[IBlockDevice]:
        return Deferred.fromCoroutine(self._adopt(path, export, server, identifier))

    def disconnect(self, path: str) -> Deferred[None]:
        def disconnect() -> None:
            self._driver.detach(self._driver.find(path))

        return Deferred.fromCoroutine(in_thread(self._reactor, self._pool, disconnect))

    async def _adopt(self, path: str, export: IExport, server: INBDServer, identifier: str) -> IBlockDevice:
        handed = self._handed.pop(path, None)
        if handed is not None and handed.connections:
            attached = await in_thread(self._reactor, self._pool, self._driver.find, path)
            attached = attrs.evolve(attached, made_node=handed.facts["made_node"])
            (connection,) = handed.connections
            disconnected = server.go_on(connection, export)
            return NBDDevice(self._reactor, self._pool, self._driver, attached, disconnected)
        return await self._reconnect(path, export, server, identifier)

    async def _reconnect(
        self, path: str, export: IExport, server: INBDServer, identifier: str
    ) -> IBlockDevice:
        there = self._reclaimed.pop(path, None) or await self._reclaim(path, identifier)
        disconnected = server.adopt(there.sock, export)
        await in_thread(self._reactor, self._pool, self._driver.set_up, there.attached, self._queue())
        return NBDDevice(self._reactor, self._pool, self._driver, there.attached, disconnected)

    async def _reclaim(self, path: str, identifier: str) -> Reconnected:
        there, cancelled = await in_thread_to_its_end(
            self._reactor, self._pool, self._driver.reconnect, path, identifier
        )
        if cancelled:
            there.sock.close()
            raise CancelledError()
        return there

    async def _attach(
        self, export: IExport, server: INBDServer, identifier: str | None = None
    ) -> IBlockDevice:
        ours, kernels = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        with kernels:
            connection = self._connection(kernels, export, identifier)
            # Served from the start: the driver may read the device before CONNECT returns.
            disconnected = server.adopt(ours, export)
            attached, cancelled = await in_thread_to_its_end(
                self._reactor, self._pool, self._driver.attach, connection, self._queue()
            )
        device = NBDDevice(self._reactor, self._pool, self._driver, attached, disconnected)
        if cancelled:
            await device.detach()
            raise CancelledError()
        return device

    def _connection(self, kernels: socket.socket, export: IExport, identifier: str | None) -> Connection:
        settings = self._settings
        identifier = settings.backend_identifier if identifier is None else identifier
        return Connection(
            sockets=[kernels.fileno()],
            size=export.size,
            block_size=BLOCK_SIZE,
            server_flags=NBD_FLAG_HAS_FLAGS | NBD_FLAG_READ_ONLY,
            timeout=settings.timeout,
            dead_conn_timeout=settings.dead_conn_timeout,
            backend_identifier=export.description if identifier is None else identifier,
        )

    def _queue(self) -> dict[str, int]:
        # In this order: a new request size makes recent kernels choose the read-ahead anew.
        return {
            "io_timeout": self._settings.io_timeout_ms,
            "max_sectors_kb": self._settings.max_sectors_kb,
            "read_ahead_kb": self._settings.read_ahead_kb,
        }


@implementer(IBlockDevice)
class NBDDevice:
    """``/dev/nbdN`` while it is connected to us."""

    log = Logger()

    def __init__(
        self,
        reactor: Any,
        pool: ThreadPool,
        driver: NBDDriver,
        attached: Attached,
        disconnected: Deferred[None],
    ) -> None:
        self.path = attached.path
        self.lost: Deferred[None] = Deferred()
        self._reactor = reactor
        self._pool = pool
        self._driver = driver
        self._attached = attached
        self._detaching = False
        self._detached = False
        self._connection = disconnected.addCallback(self._connection_ended)

    def is_held(self) -> Deferred[bool]:
        return Deferred.fromCoroutine(
            in_thread(self._reactor, self._pool, self._driver.is_held, self._attached)
        )

    def leave(self) -> HandedDevice:
        self._detaching = True
        return HandedDevice(path=self.path, facts={"made_node": self._attached.made_node})

    def detach(self) -> Deferred[None]:
        return Deferred.fromCoroutine(self._detach())

    async def _detach(self) -> None:
        if self._detached:
            return
        if not self.lost.called and await self.is_held():
            raise MountError(f"{self.path} is still mounted somewhere: unmount that first")
        self._detaching = True
        await in_thread_to_its_end(self._reactor, self._pool, self._driver.detach, self._attached)
        self._detached = True

    def _connection_ended(self, _: None) -> None:
        if not self._detaching:
            self.log.warn("{path} was disconnected by somebody else", path=self.path)
            self.lost.callback(None)
