"""One mount as a Twisted service: it starts, serves until unmounted or told to stop, and ends the reactor."""

from __future__ import annotations

import enum
from collections.abc import Callable
from contextlib import AsyncExitStack
from typing import Any, TypeVar

import sdnotify
from twisted.application.service import Service
from twisted.internet.defer import CancelledError, Deferred, DeferredQueue
from twisted.internet.task import deferLater
from twisted.logger import Logger

from erofs_twisted.device.connector import choose_connector
from erofs_twisted.device.fuse import FuseConnector
from erofs_twisted.device.nbd import NetlinkConnector
from erofs_twisted.errors import ErofsTwistedError, MountError
from erofs_twisted.image import OpenImage, open_image
from erofs_twisted.interfaces import IBlockDevice
from erofs_twisted.mount.mountpoint import Busy, Mountpoint
from erofs_twisted.mount.watch import MountWatch
from erofs_twisted.nbd.server import NBDServer
from erofs_twisted.options import MountConfig
from erofs_twisted.pool import SystemCallPool
from erofs_twisted.process import ExitStatus, on_stop_signal, resume_collections
from erofs_twisted.state.journal import Journal, MountState
from erofs_twisted.state.records import Status

BUSY_RETRY = 1.0
"""Seconds between two looks at whether a mount or a device is still in use."""

Result = TypeVar("Result")


class Event(enum.Enum):
    """What may happen to a mount that serves."""

    UNMOUNTED = enum.auto()
    DEVICE_LOST = enum.auto()
    STOP = enum.auto()
    RETRY = enum.auto()


class Stopped(Exception):
    """Told to stop while starting: no failure."""


class MountService(Service):
    """Mounts what ``config`` says, and serves it. When the mount has ended, by whatever cause, so does the
    reactor: with ``exit_status`` 0 where the end was asked for, else 1."""

    log = Logger()

    def __init__(self, reactor: Any, config: MountConfig, exit_status: ExitStatus) -> None:
        self._reactor = reactor
        self._config = config
        self._exit_status = exit_status
        self._notify = sdnotify.SystemdNotifier().notify
        self._events: DeferredQueue[Event] = DeferredQueue()
        self._give_up: Callable[[], object] | None = None
        self._stop_wishes = 0
        self._life: Deferred[None] | None = None

    def startService(self) -> None:
        super().startService()  # type: ignore[no-untyped-call]
        on_stop_signal(self._reactor, self.request_stop)
        self._reactor.callWhenRunning(self._begin)

    def stopService(self) -> Deferred[None] | None:
        """Where the reactor ends by another's doing: a mount in use is unmounted lazily, not waited for."""
        super().stopService()  # type: ignore[no-untyped-call]
        life = self._life
        if life is None or life.called:
            return None
        self.request_stop("the end of the reactor")
        self.request_stop("the end of the reactor")
        ended: Deferred[None] = Deferred()
        _ = life.addBoth(lambda _: ended.callback(None))
        return ended

    def request_stop(self, why: str) -> None:
        """End in good order. A second request unmounts lazily what is still in use."""
        self.log.info("stopping: {why}", why=why)
        self._notify("STOPPING=1")
        self._stop_wishes += 1
        if self._give_up is not None:
            self._give_up()
        self._events.put(Event.STOP)

    def _begin(self) -> None:
        self._life = Deferred.fromCoroutine(self._live())

    async def _live(self) -> None:
        config = self._config
        failure: str | None = None
        state: MountState | None = None
        try:
            state = Journal(config.state_dir).claim(config.mountpoint, str(config.image.reference))
            async with AsyncExitStack() as undo:
                mountpoint, device = await self._start(undo, state)
                resume_collections()
                await self._serve(mountpoint, device, state)
        except Stopped:
            self.log.info("stopped before {path} was mounted", path=config.mountpoint)
        except ErofsTwistedError as error:
            failure = str(error)
            self.log.critical("{path}: {reason}", path=config.mountpoint, reason=failure)
        except Exception as error:  # noqa: BLE001 - a bug must not leave the daemon neither dead nor alive
            failure = f"unexpected {type(error).__name__}: {error}"
            self.log.failure("a bug: please report it")
        if state is not None:
            state.release(failure)
        self._exit_status.status = 0 if failure is None else 1
        if self.running:
            self._reactor.stop()

    async def _start(self, undo: AsyncExitStack, state: MountState) -> tuple[Mountpoint, IBlockDevice]:
        """Each step leaves in ``undo`` what takes it back."""
        reactor, config = self._reactor, self._config
        began = reactor.seconds()
        pool = SystemCallPool(reactor)
        undo.push_async_callback(pool.stop)
        mountpoint = Mountpoint(reactor, pool, config.mountpoint)
        await mountpoint.check(make=config.mkdir)
        state.update(backend="", device="")  # of a daemon that was killed: not mounted any more
        undo.push_async_callback(mountpoint.remove_if_made)
        connector = await choose_connector(
            config.attach,
            [NetlinkConnector(reactor, pool, config.nbd), FuseConnector(reactor, pool, str(state.path))],
        )
        image = await self._unless_stopped(Deferred.fromCoroutine(open_image(reactor, pool, config.image)))
        undo.push_async_callback(image.close)
        server = NBDServer(reactor)
        undo.push_async_callback(server.stop)
        self._raise_if_stopped()
        device = await connector.attach(image.export, server)
        undo.push_async_callback(self._give_back, device, state)
        self._raise_if_stopped()
        await self._unless_stopped(Deferred.fromCoroutine(image.check()))
        await self._mount(mountpoint, device, image)
        undo.push_async_callback(self._until_released, device)
        undo.push_async_callback(mountpoint.unmount, lazy=True)
        _ = device.lost.addCallback(lambda _: self._events.put(Event.DEVICE_LOST))
        watch = MountWatch(reactor)
        undo.callback(watch.close)
        _ = watch.gone(mountpoint.path).addCallback(lambda _: self._events.put(Event.UNMOUNTED))
        state.update(
            status=Status.READY, backend=connector.name, device=device.path, digest=image.resolved.digest
        )
        self._notify(f"READY=1\nSTATUS={config.image.reference} on {config.mountpoint}")
        self.log.info(
            "mounted {image} ({digest}) on {path} through {device} in {seconds:.2f} s",
            image=str(config.image.reference),
            digest=image.resolved.digest,
            path=config.mountpoint,
            device=device.path,
            seconds=reactor.seconds() - began,
        )
        return mountpoint, device

    async def _give_back(self, device: IBlockDevice, state: MountState) -> None:
        await device.detach()
        state.update(backend="", device="")

    async def _mount(self, mountpoint: Mountpoint, device: IBlockDevice, image: OpenImage) -> None:
        # mount(2) cannot be cancelled, but it reads the device.
        self._give_up = image.abandon
        try:
            await mountpoint.mount(device.path, "erofs", self._config.options)
        except ErofsTwistedError:
            self._raise_if_stopped()
            raise
        finally:
            self._give_up = None

    async def _serve(self, mountpoint: Mountpoint, device: IBlockDevice, state: MountState) -> None:
        """Until the image is unmounted, by us or by somebody else."""
        while (event := await self._events.get()) is not Event.UNMOUNTED:
            if event is Event.DEVICE_LOST:
                raise MountError(f"{device.path} was disconnected by somebody else; reads of the mount fail")
            lazily = self._config.on_stop == "lazy" or self._stop_wishes > 1
            try:
                await mountpoint.unmount(lazy=lazily)
            except Busy as busy:
                if event is Event.STOP:
                    state.update(status=Status.STOPPING, reason=str(busy))
                    self.log.warn(
                        "{busy}; unmounting when they let go, or lazily when told to stop again", busy=busy
                    )
                self._reactor.callLater(BUSY_RETRY, self._events.put, Event.RETRY)

    async def _until_released(self, device: IBlockDevice) -> None:
        """After a lazy unmount, open files still read the device, and so do mounts in other namespaces."""
        said = False
        while not device.lost.called and await device.is_held():
            if not said:
                self.log.warn("{device} is still in use; serving it until that ends", device=device.path)
                said = True
            await deferLater(self._reactor, BUSY_RETRY)

    async def _unless_stopped(self, work: Deferred[Result]) -> Result:
        """Await what may be cancelled by a request to stop."""
        self._raise_if_stopped()
        self._give_up = work.cancel
        try:
            return await work
        except CancelledError:
            raise Stopped from None
        finally:
            self._give_up = None

    def _raise_if_stopped(self) -> None:
        if self._stop_wishes:
            raise Stopped
