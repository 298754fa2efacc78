"""One mount as a Twisted service: it starts, serves until unmounted or told to stop, and ends the reactor."""

from __future__ import annotations

import enum
from collections.abc import Callable, Mapping
from contextlib import AsyncExitStack
from typing import Any, TypeVar

import attrs
import sdnotify
from twisted.application.service import Service
from twisted.internet.defer import CancelledError, Deferred, DeferredQueue
from twisted.internet.task import deferLater
from twisted.logger import Logger
from twisted.python.failure import Failure

from erofs_twisted.device.connector import choose_connector
from erofs_twisted.device.fuse import FuseConnector
from erofs_twisted.device.nbd import NetlinkConnector
from erofs_twisted.errors import ErofsTwistedError, MountError
from erofs_twisted.image import OpenImage, open_image
from erofs_twisted.interfaces import IBlockDevice, IDeviceConnector
from erofs_twisted.leftovers import plan_for
from erofs_twisted.mount.mountpoint import Busy, Mountpoint
from erofs_twisted.mount.watch import MountWatch
from erofs_twisted.nbd.server import NBDServer
from erofs_twisted.options import ImageConfig, MountConfig
from erofs_twisted.pool import SystemCallPool
from erofs_twisted.process import ExitStatus, on_stop_signal, resume_collections
from erofs_twisted.registry.digest import Digest
from erofs_twisted.registry.reference import ImageReference
from erofs_twisted.state.journal import Journal, MountState, boot_id
from erofs_twisted.state.records import Status, record_name
from erofs_twisted.state.takeover import AFRESH, Plan, Step

BUSY_RETRY = 1.0
"""Seconds between two looks at whether a mount or a device is still in use."""

NOTHING: Mapping[str, Any] = {"backend": "", "identifier": "", "device": "", "size": 0, "mount_id": 0}
"""What is on record of a device and a mount where there are none."""

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
        self._state: MountState | None = None
        self._leaves = False
        """Does what was there before stay when this ends now?"""

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
        state = None
        try:
            journal = Journal(config.state_dir)
            state = journal.claim(config.mountpoint, str(config.image.reference), config.typed)
            self._state = state
            async with AsyncExitStack() as undo:
                mountpoint, device = await self._start(undo, state)
                resume_collections()
                await self._serve(mountpoint, device, state)
        except Stopped:
            self.log.info("stopped before {path} was mounted", path=config.mountpoint)
            if self._leaves:
                failure = "stopped before it was taken over; its mount waits for a daemon"
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
        nbd, fuse = NetlinkConnector(reactor, pool, config.nbd), FuseConnector(reactor, pool, str(state.path))
        plan = await self._look(state, nbd, mountpoint)
        self._leaves = plan.adopts
        await self._clear(plan, state, nbd, mountpoint)
        undo.push_async_callback(self._remove_directory, mountpoint, state)
        keeps = Step.KEEP in plan.steps
        if not keeps:
            if config.mkdir and await mountpoint.is_missing():
                state.update(made=True)
            await mountpoint.check(make=config.mkdir)
        mountpoint.adopt(plan.mount_id, state.record.made)
        connector = nbd if plan.adopts else await choose_connector(config.attach, [nbd, fuse])
        pinned = _pinned(config.image, state) if plan.adopts else config.image
        image = await self._unless_stopped(Deferred.fromCoroutine(open_image(reactor, pool, pinned)))
        undo.push_async_callback(image.close)
        server = NBDServer(reactor)
        undo.push_async_callback(server.stop)
        self._raise_if_stopped()
        device = await self._attach(plan, connector, image, server, state)
        self._leaves = False
        undo.push_async_callback(self._give_back, device, state)
        if not keeps:
            self._raise_if_stopped()
            await self._unless_stopped(Deferred.fromCoroutine(image.check()))
            await self._mount(mountpoint, device, image)
        undo.push_async_callback(self._until_released, device)
        undo.push_async_callback(mountpoint.unmount, lazy=True)
        _ = device.lost.addCallback(lambda _: self._events.put(Event.DEVICE_LOST))
        watch = MountWatch(reactor)
        undo.callback(watch.close)
        _ = watch.gone(mountpoint.path).addCallback(lambda _: self._events.put(Event.UNMOUNTED))
        if keeps:
            await self._go_on(mountpoint, image)
        state.update(status=Status.READY, mount_id=mountpoint.mount_id)
        self._notify(f"READY=1\nSTATUS={config.image.reference} on {config.mountpoint}")
        self.log.info(
            "{what} {image} ({digest}) on {path} through {device} in {seconds:.2f} s",
            what="took over" if plan.adopts else "mounted",
            image=str(config.image.reference),
            digest=image.resolved.digest,
            path=config.mountpoint,
            device=device.path,
            seconds=reactor.seconds() - began,
        )
        return mountpoint, device

    async def _look(self, state: MountState, nbd: IDeviceConnector, mountpoint: Mountpoint) -> Plan:
        """What is to be done about what a daemon that was killed has left. Raises `MountError`."""
        record, config = state.before, self._config
        if record is None:
            return AFRESH
        plan = await plan_for(record, nbd, mountpoint)
        if plan.adopts and record.image != str(config.image.reference):
            raise MountError(
                f"--mountpoint {config.mountpoint}: {record.image} is there, and waits for a daemon; give "
                f"that as --image, or end it with 'erofs-nbd umount {config.mountpoint}'"
            )
        return plan

    async def _clear(
        self, plan: Plan, state: MountState, nbd: NetlinkConnector, mountpoint: Mountpoint
    ) -> None:
        """Take away what is of no use."""
        assert state.before is not None or plan is AFRESH
        for step in plan.steps:
            if state.before is not None:
                self.log.info("{step}", step=step.told(state.before, plan.device))
            if step is Step.UNMOUNT:
                await mountpoint.unmount(lazy=True)
            elif step is Step.DISCONNECT:
                await nbd.disconnect(plan.device)
        if not plan.adopts:
            config = self._config
            state.update(image=str(config.image.reference), options=config.typed, boot=boot_id(), **NOTHING)

    async def _attach(
        self,
        plan: Plan,
        connector: IDeviceConnector,
        image: OpenImage,
        server: NBDServer,
        state: MountState,
    ) -> IBlockDevice:
        """The image's device, a new one or the one that waits for a server, and both on record."""
        if plan.adopts:
            record = state.record
            if image.layer.digest != record.layer or image.export.size != record.size:
                raise MountError(f"{record.image} is not what {plan.device} was made for any more")
            device = await connector.adopt(plan.device, image.export, server, record.identifier)
            # Of what is on record, one that was killed early had not heard, and another mount may have gone.
            state.update(device=device.path, mount_id=plan.mount_id)
            return device
        identifier = self._config.nbd.backend_identifier
        if identifier is None:
            identifier = f"{image.export.description} {record_name(self._config.mountpoint)}"
        # On record before there is a device: it is found by that.
        state.update(
            backend=connector.name,
            identifier=identifier,
            size=image.export.size,
            digest=image.resolved.digest,
            layer=image.layer.digest,
        )
        device = await connector.attach(image.export, server, identifier)
        state.update(device=device.path)
        return device

    async def _go_on(self, mountpoint: Mountpoint, image: OpenImage) -> None:
        """With a mount that was there before this daemon."""
        if await mountpoint.there() is None:
            self._events.put(Event.UNMOUNTED)
        self._checking = Deferred.fromCoroutine(image.check()).addErrback(self._not_checked)

    def _not_checked(self, failure: Failure) -> None:
        failure.trap(ErofsTwistedError, CancelledError)
        self.log.warn("the rest of the image is not fetched: {reason}", reason=failure.getErrorMessage())

    async def _give_back(self, device: IBlockDevice, state: MountState) -> None:
        await device.detach()
        state.update(**NOTHING)

    async def _remove_directory(self, mountpoint: Mountpoint, state: MountState) -> None:
        if self._leaves:
            return
        await mountpoint.remove_if_made()
        if state.record.made:
            state.update(made=False)

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


def _pinned(config: ImageConfig, state: MountState) -> ImageConfig:
    """The image that was mounted, whatever its tag stands for by now."""
    if not isinstance(config.reference, ImageReference):
        return config
    return attrs.evolve(
        config, reference=attrs.evolve(config.reference, digest=Digest.parse(state.record.digest))
    )
