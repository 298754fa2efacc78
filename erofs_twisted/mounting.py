"""One mount: it starts, serves until it is unmounted or told to end, and takes everything back."""

from __future__ import annotations

import enum
from collections.abc import Callable
from contextlib import AsyncExitStack
from typing import Any, TypeVar

import attrs
from twisted.internet.defer import CancelledError, Deferred, DeferredQueue
from twisted.logger import Logger

from erofs_twisted.device.connector import choose_connector
from erofs_twisted.device.fuse import FuseConnector
from erofs_twisted.device.nbd import NetlinkConnector
from erofs_twisted.devices import Devices, Served
from erofs_twisted.errors import ErofsTwistedError, MountError
from erofs_twisted.interfaces import IDeviceConnector
from erofs_twisted.leftovers import plan_for
from erofs_twisted.mount.mountpoint import Busy, Mountpoint
from erofs_twisted.mount.watch import MountWatch
from erofs_twisted.options import MountConfig
from erofs_twisted.pool import SystemCallPool
from erofs_twisted.state.journal import Journal, MountState, boot_id
from erofs_twisted.state.records import MountRecord, Status
from erofs_twisted.state.takeover import AFRESH, Plan, Step
from erofs_twisted.taking import NOTHING, DeviceTaking

BUSY_RETRY = 1.0
"""Seconds between two attempts to unmount what is in use."""

HELD_RETRY = 1.0
"""Seconds between two looks at whether a device is still in use."""

LINGERS = "it is served for who has files of it open, until they close them"
"""Why a mount that was unmounted lazily has not ended."""

Result = TypeVar("Result")


class Event(enum.Enum):
    """What may happen to a mount that serves."""

    UNMOUNTED = enum.auto()
    DEVICE_LOST = enum.auto()
    STOP = enum.auto()
    LEAVE = enum.auto()
    RETRY = enum.auto()
    MOUNT = enum.auto()


class Stopped(Exception):
    """Told to stop while starting: no failure."""


class Left(Exception):
    """Told to leave it all to another daemon: no failure either."""


@attrs.frozen
class _There:
    """What there is of a mount from its start to its end."""

    mountpoint: Mountpoint
    served: Served
    watch: MountWatch


class Mount:
    """One mount of what ``config`` says, on one of a daemon's ``devices``; ``service`` says whether other
    mounts may be that daemon's, too. It is of the manifest ``pinned``, if that is given, whatever its tag
    stands for. Where it is not ``is_wanted``, what an earlier daemon has unmounted is only served to its end.
    ``reach`` is as `Mountpoint` has it. `live` is called once."""

    log = Logger()

    def __init__(
        self,
        reactor: Any,
        config: MountConfig,
        devices: Devices,
        *,
        service: bool = False,
        pinned: str = "",
        is_wanted: bool = True,
        reach: str = "",
    ) -> None:
        self.config = config
        self.ready: Deferred[None] = Deferred()
        """Fires when it can be used, or is served to its end; never, where it ends before."""
        self.served: Served | None = None
        """What it is mounted from, while it is."""
        self.is_mounted = False
        """Is it mounted now? Where it was, and is not, it is about to end."""
        self._reactor = reactor
        self._devices = devices
        self._service = service
        self._digest = pinned
        self._is_wanted = is_wanted
        self._reach = reach
        self._again: list[Deferred[bool]] = []
        self._events: DeferredQueue[Event] = DeferredQueue()
        self._give_up: Callable[[], object] | None = None
        self._stop_wishes = 0
        self._state: MountState | None = None
        self._mountpoint: Mountpoint | None = None
        """What is mounted."""
        self._leaves = False
        """Does what was there before stay when this ends now?"""
        self.has_left = False
        """Has it ended, and is it the next daemon's?"""

    @property
    def record(self) -> MountRecord | None:
        """How far it has come; None where it has not begun."""
        return None if self._state is None else self._state.record

    async def unmount(self, lazy: bool) -> None:
        """Unmount it, and let it end then. Raises `Busy`, and goes on."""
        if self._mountpoint is None:
            self.request_stop()
        else:
            await self._mountpoint.unmount(lazy=lazy)

    def mount_again(self, reach: str = "") -> Deferred[bool]:
        """Mount what was unmounted, and is served still for who uses it. True when it is mounted, False when
        it has ended instead. Fails with `MountError`."""
        assert self._mountpoint is not None, "it was mounted"
        self._mountpoint.reach = reach
        done: Deferred[bool] = Deferred()
        self._again.append(done)
        self._events.put(Event.MOUNT)
        return done

    def request_stop(self) -> None:
        """End in good order. A second request unmounts lazily what is still in use."""
        self._stop_wishes += 1
        give_up, self._give_up = self._give_up, None
        if give_up is not None:
            give_up()
        self._events.put(Event.STOP)

    def leave(self) -> None:
        """End, and leave device and mount as they are, to another daemon: now, or as soon as it is up."""
        self._events.put(Event.LEAVE)

    async def live(self) -> str | None:
        """From the first step to the last one; then why it failed, or None where its end was asked for."""
        try:
            return await self._live()
        finally:
            self._settle_again(lambda done: done.callback(False))

    async def _live(self) -> str | None:
        config = self.config
        failure: str | None = None
        state = None
        try:
            journal = Journal(config.state_dir)
            state = journal.claim(
                config.mountpoint, str(config.image.reference), config.typed, service=self._service
            )
            self._state = state
            async with AsyncExitStack() as undo:
                there = await self._start(undo, state)
                self.ready.callback(None)
                while self.is_mounted or await self._until_mounted_again(undo, there, state):
                    await self._serve(there, state)
            if self._leaves:
                raise Left
        except Stopped:
            self.log.info("stopped before {path} was mounted", path=config.mountpoint)
            if self._leaves:
                failure = "stopped before it was taken over; its mount waits for a daemon"
        except Left:
            self.log.info("{path} is left to the next daemon", path=config.mountpoint)
            assert state is not None
            state.leave()
            self.has_left = True
            return None
        except ErofsTwistedError as error:
            failure = str(error)
            self.log.critical("{path}: {reason}", path=config.mountpoint, reason=failure)
        except Exception as error:  # noqa: BLE001 - a bug must not leave the mount neither dead nor alive
            failure = f"unexpected {type(error).__name__}: {error}"
            self.log.failure("a bug: please report it")
        if state is not None:
            state.release(failure)
        return failure

    async def _start(self, undo: AsyncExitStack, state: MountState) -> _There:
        """Each step leaves in ``undo`` what takes it back."""
        reactor, config = self._reactor, self.config
        began = reactor.seconds()
        pool = SystemCallPool(reactor)
        undo.push_async_callback(pool.stop)
        mountpoint = Mountpoint(reactor, pool, config.mountpoint, self._reach)
        shared, handed = self._devices.pool, self._devices.handed
        reclaimed = self._devices.reclaimed
        nbd = NetlinkConnector(reactor, shared, config.nbd, handed=handed, reclaimed=reclaimed)
        fuse = FuseConnector(reactor, shared, str(state.path), handed=handed)
        connectors = [nbd, fuse]
        before = state.before
        made_by = next((each for each in connectors if before and each.name == before.backend), None)
        plan = await self._look(before, made_by, mountpoint)
        self._leaves = plan.adopts
        await self._clear(plan, state, made_by, mountpoint)
        undo.push_async_callback(self._remove_directory, mountpoint, state)
        keeps, lingers = Step.KEEP in plan.steps, Step.LINGER in plan.steps
        ends = plan.steps[-1] is Step.FORGET
        if keeps or lingers or ends:
            mountpoint.adopt(plan.mount_id, state.record.made)
        else:
            await self._prepare(mountpoint, state)
        if ends:
            raise Stopped
        if plan.adopts:
            assert made_by is not None
            connector: IDeviceConnector = made_by
        else:
            connector = await choose_connector(config.attach, connectors)
        taking = DeviceTaking(reactor, config, self._devices, plan, connector, state)
        served = await self._unless_stopped(Deferred.fromCoroutine(taking.take(self, self._digest)))
        self._leaves = False
        self.served = served
        undo.push_async_callback(self._give_back, served, state)
        if not keeps and not lingers:
            self._raise_if_stopped()
            await self._mount(mountpoint, served)
        _ = served.device.lost.addCallback(lambda _: self._events.put(Event.DEVICE_LOST))
        watch = MountWatch(reactor)
        undo.callback(watch.close)
        there = _There(mountpoint, served, watch)
        if lingers:
            self._mountpoint = mountpoint
            return there
        self._come_up(undo, there, state.note if plan.adopts else state.update)
        self.log.info(
            "{what} {image} ({digest}) on {path} through {device} in {seconds:.2f} s",
            what="took over" if plan.adopts else "mounted",
            image=str(config.image.reference),
            digest=state.record.digest,
            path=config.mountpoint,
            device=served.device.path,
            seconds=reactor.seconds() - began,
        )
        return there

    async def _prepare(self, mountpoint: Mountpoint, state: MountState) -> None:
        """Have a directory to mount on. Raises `MountError`."""
        config = self.config
        if config.mkdir and await mountpoint.is_missing():
            state.update(made=True)
        await mountpoint.check(make=config.mkdir)
        mountpoint.adopt(0, state.record.made)

    def _come_up(self, undo: AsyncExitStack, there: _There, write: Callable[..., None]) -> None:
        """It is mounted: watch it, and put it on record by ``write``."""
        mountpoint = self._mountpoint = there.mountpoint
        undo.push_async_callback(self._take_away, mountpoint)
        self.is_mounted = True
        _ = there.watch.gone(mountpoint.path).addCallback(lambda _: self._gone())
        write(status=Status.READY, reason="", mount_id=mountpoint.mount_id)

    async def _look(
        self, record: MountRecord | None, made_by: IDeviceConnector | None, mountpoint: Mountpoint
    ) -> Plan:
        """What is to be done about what the daemon before has left. Raises `MountError`."""
        config = self.config
        if record is None:
            return AFRESH
        # Who hands a device over has not died: there is nobody who would want the mount again.
        is_over = record.status is Status.UNMOUNTED and record.device in self._devices.handed
        plan = await plan_for(record, made_by, mountpoint, self._is_wanted and not is_over)
        if plan.adopts and record.image != str(config.image.reference):
            raise MountError(
                f"--mountpoint {config.mountpoint}: {record.image} is there, and waits for a daemon; give "
                f"that as --image, or end it with 'erofs-nbd umount {config.mountpoint}'"
            )
        return plan

    async def _clear(
        self, plan: Plan, state: MountState, made_by: IDeviceConnector | None, mountpoint: Mountpoint
    ) -> None:
        """Take away what is of no use."""
        assert state.before is not None or plan is AFRESH
        if state.before is not None and not plan.adopts:
            self._devices.let_go(state.before.device)
        for step in plan.steps:
            if state.before is not None:
                self.log.info("{step}", step=step.told(state.before, plan.device))
            if step is Step.UNMOUNT:
                await mountpoint.unmount(lazy=True)
            elif step is Step.DISCONNECT and self._devices.on(plan.device) is None:
                assert made_by is not None
                await made_by.disconnect(plan.device)
        if Step.LINGER not in plan.steps:
            state.note(status=Status.STARTING, reason="")
        if not plan.adopts:
            config = self.config
            state.update(image=str(config.image.reference), options=config.typed, boot=boot_id(), **NOTHING)

    async def _take_away(self, mountpoint: Mountpoint) -> None:
        if not self._leaves:
            await mountpoint.unmount(lazy=True)

    async def _give_back(self, served: Served, state: MountState) -> None:
        while not self._leaves and await self._linger(served, state):
            pass
        self.served = None
        if self._leaves:
            await self._devices.leave(served, self)
        else:
            await self._devices.give_back(served, self)
            state.note(**NOTHING)

    async def _remove_directory(self, mountpoint: Mountpoint, state: MountState) -> None:
        if self._leaves:
            return
        await mountpoint.remove_if_made()
        if state.record.made:
            state.note(made=False)

    async def _mount(self, mountpoint: Mountpoint, served: Served) -> None:
        # mount(2) cannot be cancelled, but it reads the device.
        self._give_up = served.abandon
        try:
            await mountpoint.mount(served.device.path, "erofs", self.config.options)
        except ErofsTwistedError:
            self._raise_if_stopped()
            raise
        finally:
            self._give_up = None

    async def _serve(self, there: _There, state: MountState) -> None:
        """Until the image is unmounted, by us or by somebody else."""
        while (event := await self._events.get()) is not Event.UNMOUNTED:
            if event is Event.LEAVE:
                self._leaves = True
                raise Left
            if event is Event.DEVICE_LOST:
                path = there.served.device.path
                raise MountError(f"{path} was disconnected by somebody else; reads of the mount fail")
            if event is Event.MOUNT:
                continue
            lazily = self.config.on_stop == "lazy" or self._stop_wishes > 1
            try:
                await there.mountpoint.unmount(lazy=lazily)
            except Busy as busy:
                if event is Event.STOP:
                    state.note(status=Status.STOPPING, reason=str(busy))
                    self.log.warn(
                        "{busy}; unmounting when they let go, or lazily when told to stop again", busy=busy
                    )
                self._reactor.callLater(BUSY_RETRY, self._events.put, Event.RETRY)

    def _gone(self) -> None:
        if self.is_mounted:
            self.is_mounted = False
            self._events.put(Event.UNMOUNTED)

    async def _until_mounted_again(self, undo: AsyncExitStack, there: _There, state: MountState) -> bool:
        """Unmounted, it lingers; False where that has come to an end."""
        while await self._linger(there.served, state):
            if await self._mount_again(undo, there, state):
                return True
        return False

    async def _linger(self, served: Served, state: MountState) -> bool:
        """Unmounted, it is served for who has files of it open or has it mounted elsewhere, until there is
        nobody, or there is another mount that serves them, or another daemon. True when it is to be mounted
        again."""
        while served.users == {self} and not served.device.lost.called and await served.device.is_held():
            if state.record.status is not Status.UNMOUNTED:
                self.log.warn("{path} is unmounted; {reason}", path=self.config.mountpoint, reason=LINGERS)
                state.note(status=Status.UNMOUNTED, reason=LINGERS, mount_id=0)
            look = self._reactor.callLater(HELD_RETRY, self._events.put, Event.RETRY)
            event = await self._events.get()
            if look.active():
                look.cancel()
            if event is Event.LEAVE:
                self._leaves = True
                return False
            if event is Event.MOUNT:
                return True
        # Of two that end at the same moment the second one lingers.
        served.users.discard(self)
        return False

    async def _mount_again(self, undo: AsyncExitStack, there: _There, state: MountState) -> bool:
        """Done? Where it cannot be mounted, those who asked for it are told."""
        try:
            await self._prepare(there.mountpoint, state)
            await self._mount(there.mountpoint, there.served)
        except MountError as error:
            reason = error
            self._settle_again(lambda done: done.errback(reason))
            return False
        self._come_up(undo, there, state.note)
        self.log.info("{path} is mounted again", path=self.config.mountpoint)
        self._settle_again(lambda done: done.callback(True))
        return True

    def _settle_again(self, settle: Callable[[Deferred[bool]], None]) -> None:
        waiting, self._again = self._again, []
        for done in waiting:
            settle(done)

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
