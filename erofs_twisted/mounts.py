"""All the mounts of a daemon that has as many as are asked for."""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import attrs
from twisted.internet.defer import CancelledError, Deferred
from twisted.internet.task import deferLater
from twisted.logger import Logger
from zope.interface import implementer

from erofs_twisted import __version__
from erofs_twisted.control.errors import CallError, MountedOtherwise, NoSuchMount
from erofs_twisted.devices import Devices
from erofs_twisted.errors import ErofsTwistedError, MountError
from erofs_twisted.handover import Handover
from erofs_twisted.interfaces import IMounts
from erofs_twisted.leftovers import forget, take_away
from erofs_twisted.mounting import Mount
from erofs_twisted.options import OPTIONS, MountConfig, read_mount_config
from erofs_twisted.process import open_files
from erofs_twisted.recentlines import RecentLines
from erofs_twisted.state.journal import Journal, daemon_runs
from erofs_twisted.state.records import TOLD, MountRecord, Status
from erofs_twisted.syscalls import in_thread

FIRST_PAUSE, LONGEST_PAUSE = 1.0, 60.0
"""Seconds between two attempts to have a mount again that an earlier daemon had."""

SPARE_FILES = 100
"""So many file descriptors has a mount to find free: its own, and connections, for it and for all others."""

Options = Mapping[str, str | bool]


@attrs.define(eq=False)
class _Running:
    """A mount, and those who wait for it."""

    mount: Mount
    settled: list[Deferred[None]] = attrs.field(factory=list)
    ended: list[Deferred[None]] = attrs.field(factory=list)
    is_up: bool = False
    is_settled: bool = False
    failure: str = "it was unmounted before it could be used"

    def when_settled(self) -> Deferred[None]:
        """Fires when the mount can be used, or has ended."""
        waiter: Deferred[None] = Deferred()
        if self.is_settled:
            waiter.callback(None)
        else:
            self.settled.append(waiter)
        return waiter

    def when_ended(self) -> Deferred[None]:
        waiter: Deferred[None] = Deferred()
        self.ended.append(waiter)
        return waiter

    def come_up(self) -> None:
        self.is_up = True
        self._settle()

    def raise_unless_up(self) -> None:
        """Raises `MountError`."""
        if not self.is_up:
            raise MountError(self.failure)

    def _settle(self) -> None:
        self.is_settled = True
        waiting, self.settled = self.settled, []
        for waiter in waiting:
            waiter.callback(None)

    def end(self, failure: str | None) -> None:
        self.failure = failure or self.failure
        self._settle()
        waiting, self.ended = self.ended, []
        for waiter in waiting:
            waiter.callback(None)


@implementer(IMounts)
class Mounts:
    """``defaults`` are options for all mounts, as they were typed. `restore` what is on record, and in the
    end `close`."""

    log = Logger()

    def __init__(
        self,
        reactor: Any,
        defaults: Options,
        state_dir: Path,
        lines: RecentLines,
        begin_upgrade: Callable[[], object] = lambda: None,
        handover: Handover | None = None,
    ) -> None:
        self._reactor = reactor
        self._defaults = {**defaults, "state-dir": str(state_dir)}
        self._state_dir = state_dir
        self._lines = lines
        self._before = Handover() if handover is None else handover
        self.devices = Devices(reactor, self._before.devices, self._before.reclaimed)
        self._running: dict[str, _Running] = {}
        self._restoring: dict[str, Deferred[None]] = {}
        self._began = reactor.seconds()
        self._is_closing = False
        self._begin_upgrade = begin_upgrade
        self._instance = secrets.token_hex(8)

    def status(self) -> Any:
        """As `IMounts.status`."""
        memory = next(
            int(line.split()[1]) * 1024
            for line in Path("/proc/self/status").read_text().splitlines()
            if line.startswith("VmRSS:")
        )
        devices = {each.mount.served.device.path for each in self._running.values() if each.mount.served}
        return {
            "instance": self._instance,
            "version": __version__,
            "pid": os.getpid(),
            "seconds": round(self._reactor.seconds() - self._began, 1),
            "mounts": len(self._running),
            "devices": len(devices),
            "memory": memory,
            "open_files": open_files()[0],
        }

    def log_lines(self, mountpoint: str, after: int) -> Any:
        """As `IMounts.log_lines`."""
        words: tuple[str, ...] = ()
        if mountpoint:
            record = self._find(mountpoint).mount.record
            words = (mountpoint, *(() if record is None or not record.layer else (record.layer,)))
        number, lines = self._lines.after(after, words)
        return {"next": number, "lines": lines}

    def upgrade(self) -> None:
        """As `IMounts.upgrade`."""
        self._begin_upgrade()

    def mounts(self) -> Any:
        """As `IMounts.mounts`."""
        return [self._told(path, running) for path, running in sorted(self._running.items())]

    def one(self, mountpoint: str) -> Any:
        """As `IMounts.one`."""
        return self._told(mountpoint, self._find(mountpoint))

    def mount(self, mountpoint: str, options: Options, reach: str = "") -> Deferred[tuple[bool, Any]]:
        """As `IMounts.mount`."""
        return Deferred.fromCoroutine(self._mount(mountpoint, options, reach=reach))

    def unmount(self, mountpoint: str, lazy: bool) -> Deferred[None]:
        """As `IMounts.unmount`."""
        return Deferred.fromCoroutine(self._unmount(mountpoint, lazy))

    def prefetch(self, mountpoint: str) -> Deferred[None]:
        """As `IMounts.prefetch`."""
        return Deferred.fromCoroutine(self._prefetch(mountpoint))

    def restore(self) -> int:
        """Have the mounts again that an earlier daemon like this had; how many those are.

        One that cannot be had now is tried again, until it is there or unmounted: its registry may be down
        as this host starts. It does not keep the others from coming up.
        """
        journal = Journal(self._state_dir)
        journal.tidy()
        found = [
            record
            for record in journal.records()
            if record.service and (record.pid in (os.getpid(), self._before.pid) or not daemon_runs(record))
        ]
        for record in found:
            self._begin_restoring(record)
        return len(found)

    async def close(self) -> None:
        """End all mounts; a second call unmounts lazily what is still in use."""
        self._is_closing = True
        for restoring in list(self._restoring.values()):
            restoring.cancel()
        ends = [running.when_ended() for running in self._running.values()]
        for running in list(self._running.values()):
            running.mount.request_stop()
        for end in ends:
            await end

    async def leave(self) -> None:
        """End, and leave all mounts and devices to the next daemon, those that are about to come up too."""
        self._is_closing = True
        there = list(self._running.values())
        ends = [running.when_ended() for running in there]
        for running in there:
            running.mount.leave()
        for running in there:
            await running.when_settled()
        for restoring in list(self._restoring.values()):
            restoring.cancel()
        for end in ends:
            await end

    async def stop(self) -> None:
        """When all has ended: the last threads."""
        await self.devices.close()

    async def _mount(
        self, mountpoint: str, options: Options, pinned: str = "", is_wanted: bool = True, reach: str = ""
    ) -> tuple[bool, Any]:
        config = await self._read(mountpoint, options, bool(reach))
        while (running := self._running.get(config.mountpoint)) is not None:
            record = running.mount.record
            if record is not None and record.status is Status.STOPPING:
                await running.when_ended()
                continue
            refusal = _refusal(running.mount.config, config)
            if running.is_up and not running.mount.is_mounted:
                if await _mount_again(running, refusal, reach):
                    return True, self._told(config.mountpoint, running)
                continue
            if refusal is not None:
                raise refusal
            await running.when_settled()
            running.raise_unless_up()
            return False, self._told(config.mountpoint, running)
        if self._is_closing:
            raise MountError("the daemon is about to end, or to be replaced: call again")
        _check_files()
        running = self._begin(config, pinned, is_wanted, reach)
        await running.when_settled()
        running.raise_unless_up()
        return True, self._told(config.mountpoint, running)

    async def _read(self, mountpoint: str, options: Options, is_resolved: bool) -> MountConfig:
        if not os.path.isabs(mountpoint):
            raise CallError(f"the mount point {mountpoint!r} is not an absolute path")
        unknown = options.keys() - OPTIONS.keys() - {"password"}
        if unknown:
            raise CallError(f"there is no option {min(unknown)!r}")
        values = {**self._defaults, **options, "mountpoint": mountpoint, "state-dir": str(self._state_dir)}
        # The path may lead through a mount of our own, which this thread serves.
        return await in_thread(self._reactor, self.devices.pool, read_mount_config, values, is_resolved)

    def _begin(self, config: MountConfig, pinned: str, is_wanted: bool, reach: str) -> _Running:
        mount = Mount(
            self._reactor,
            config,
            self.devices,
            service=True,
            pinned=pinned,
            is_wanted=is_wanted,
            reach=reach,
        )
        running = self._running[config.mountpoint] = _Running(mount)
        _ = mount.ready.addCallback(lambda _: running.come_up())
        life = Deferred.fromCoroutine(mount.live())
        _ = life.addCallback(partial(self._ended, config.mountpoint, running))
        return running

    def _ended(self, path: str, running: _Running, failure: str | None) -> None:
        if self._running.get(path) is running:
            del self._running[path]
        if failure is not None and running.mount.record is not None and path not in self._restoring:
            # Who asked for it is told, so it need not be on record.
            Journal(self._state_dir).forget(path)
        running.end(failure)

    async def _unmount(self, mountpoint: str, lazy: bool) -> None:
        restoring = self._restoring.get(mountpoint)
        if restoring is not None:
            restoring.cancel()
            running = self._running.get(mountpoint)
            if running is not None and not running.is_up:
                # It is being tried just now, and leaves what was there before.
                ended = running.when_ended()
                running.mount.request_stop()
                await ended
            self._restoring.pop(mountpoint, None)
            if mountpoint not in self._running:
                await self._take_away(mountpoint, lazy)
                return
        running = self._find(mountpoint)
        there = running.mount.record
        if there is not None and there.status is Status.UNMOUNTED:
            if lazy:
                return
            raise MountError(f"{mountpoint} is unmounted; {there.reason}")
        ended = running.when_ended()
        await running.mount.unmount(lazy)
        if not lazy:
            await ended

    async def _take_away(self, mountpoint: str, lazy: bool) -> None:
        """What an earlier daemon has left, and this one could not take over."""
        journal = Journal(self._state_dir)
        record = journal.read(mountpoint)
        if record is None:
            return
        self._before.drop(record.device)
        self.devices.let_go(record.device)
        try:
            await take_away(self._reactor, self.devices.pool, journal, record, lazy)
        except MountError:
            self._begin_restoring(record)
            raise
        forget(journal, record)

    async def _prefetch(self, mountpoint: str) -> None:
        served = self._find(mountpoint).mount.served
        if served is None:
            raise MountError(f"{mountpoint} is not mounted yet")
        await served.image.fetch_all()

    def _begin_restoring(self, record: MountRecord) -> None:
        restoring = Deferred.fromCoroutine(self._restore(record))
        self._restoring[record.mountpoint] = restoring.addErrback(
            lambda failure: failure.trap(CancelledError)
        )

    async def _restore(self, record: MountRecord) -> None:
        pause = FIRST_PAUSE
        while True:
            try:
                options = {name: value for name, value in record.options.items() if name != "mountpoint"}
                # What was mounted, and not what its tag stands for now: the registry may be down.
                await self._mount(record.mountpoint, options, record.digest, record.is_wanted)
                break
            except ErofsTwistedError as error:
                self.devices.let_go(record.device)
                if not record.is_wanted and Journal(self._state_dir).read(record.mountpoint) is None:
                    # It had been unmounted, and nobody uses it any more.
                    break
                self.log.warn(
                    "{path} is not there yet; trying again in {pause:.0f} s: {reason}",
                    path=record.mountpoint,
                    pause=pause,
                    reason=str(error),
                )
            await deferLater(self._reactor, pause)
            pause = min(2 * pause, LONGEST_PAUSE)
        self._restoring.pop(record.mountpoint, None)

    def _find(self, mountpoint: str) -> _Running:
        running = self._running.get(mountpoint)
        if running is None:
            raise NoSuchMount(f"{mountpoint} is no mount of this daemon's")
        return running

    def _told(self, path: str, running: _Running) -> dict[str, Any]:
        record, served = running.mount.record, running.mount.served
        if record is None:
            return {"mountpoint": path, "status": Status.STARTING}
        missing = None if served is None else served.image.missing
        return {**{name: getattr(record, name) for name in TOLD}, "missing": missing}


async def _mount_again(running: _Running, refusal: MountedOtherwise | None, reach: str) -> bool:
    """Mount again what was unmounted, if somebody has files of it open; False when it has ended instead.

    Where there is a ``refusal``, it is another image that is to be mounted there. Raises `MountError`.
    """
    record = running.mount.record
    if refusal is None:
        if await running.mount.mount_again(reach):
            return True
    elif record is not None and record.status is Status.UNMOUNTED:
        raise MountedOtherwise(
            f"{record.image} is unmounted from {record.mountpoint}, and {record.reason}: take "
            "another directory"
        )
    await running.when_ended()
    return False


def _check_files() -> None:
    """Is there room for another mount? What is there goes on only if some files are left for it. Raises
    `MountError`."""
    there, limit = open_files()
    if there + SPARE_FILES > limit:
        raise MountError(
            f"the daemon has {there} files open, and may have {limit}: unmount something, or raise its limit "
            "(LimitNOFILE= in its unit, ulimit -n)"
        )


def _refusal(there: MountConfig, asked: MountConfig) -> MountedOtherwise | None:
    """The same again is the same mount; another is refused."""
    if there.image.reference != asked.image.reference:
        return MountedOtherwise(
            f"{there.image.reference} is mounted on {there.mountpoint}: unmount that first "
            f"(erofs-nbd umount {there.mountpoint}), or take another directory"
        )
    different = sorted(
        name
        for name in there.typed.keys() | asked.typed.keys()
        if there.typed.get(name) != asked.typed.get(name)
    )
    if not different:
        return None
    return MountedOtherwise(
        f"{there.image.reference} is mounted on {there.mountpoint} with another --{different[0]}: "
        f"unmount that first (erofs-nbd umount {there.mountpoint})"
    )
