"""What is left of a mount whose daemon has ended, as it is seen now."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from twisted.python.threadpool import ThreadPool

from erofs_twisted.device.driver import NBDDriver
from erofs_twisted.device.fuse import clear_away
from erofs_twisted.interfaces import Connected, IDeviceConnector
from erofs_twisted.mount.mountinfo import Mount
from erofs_twisted.mount.mountpoint import Mountpoint, mounts_here, remove_empty
from erofs_twisted.state.journal import Journal, boot_id
from erofs_twisted.state.records import MountRecord
from erofs_twisted.state.takeover import Plan, Seen, make_plan
from erofs_twisted.syscalls import in_thread


async def plan_for(
    record: MountRecord, connector: IDeviceConnector | None, mountpoint: Mountpoint, is_wanted: bool
) -> Plan:
    """As `make_plan`, for what is left of the mount on ``record``, by the ``connector`` that made its device.
    Raises `MountError`."""
    devices = [] if connector is None else await connector.connected(record.identifier)
    return make_plan(record, seen(boot_id(), devices, await mountpoint.there()), is_wanted)


def seen(boot: str, devices: Sequence[Connected], there: Mount | None) -> Seen:
    """``there`` is what is mounted on the mount point, on top."""
    if there is None:
        return Seen(boot=boot, devices=devices)
    return Seen(boot=boot, devices=devices, source=there.source, mount_id=there.mount_id)


async def take_away(
    reactor: Any, pool: ThreadPool, journal: Journal, record: MountRecord, lazy: bool
) -> None:
    """Unmount what a daemon that has ended has left of a mount, and take its device back. It stays on record.
    Raises `MountError`; `erofs_twisted.mount.mountpoint.Busy` where it is in use, and not ``lazy``."""
    mountpoint = Mountpoint(reactor, pool, record.mountpoint)
    there = await mountpoint.there()
    is_mounted = there is not None and there.source == record.device
    if is_mounted:
        await mountpoint.unmount(lazy=lazy)
    await _clear_device(reactor, pool, journal, record, is_mounted)


def forget(journal: Journal, record: MountRecord) -> None:
    """Drop a mount of which there is nothing any more, and the directory that was made for it. Raises OSError
    where a daemon has begun with it again."""

    def remove_directory() -> None:
        if record.made:
            remove_empty(record.mountpoint)

    journal.forget(record.mountpoint, remove_directory)


async def _clear_device(
    reactor: Any, pool: ThreadPool, journal: Journal, record: MountRecord, was_mounted: bool
) -> None:
    """Take back the device of a daemon that was killed, unless other mounts are on it too. Reads of a file
    that is still open fail."""
    if record.backend == "nbd":
        await in_thread(reactor, pool, _disconnect, record, was_mounted)
    elif record.backend == "fuse":
        await in_thread(reactor, pool, clear_away, str(journal.directory(record.mountpoint)))


def _disconnect(record: MountRecord, was_mounted: bool) -> None:
    driver = NBDDriver()
    if was_mounted:
        # What was mounted here was still the one on record, and not another's on the same index.
        paths = [record.device]
    else:
        devices = driver.connected(record.identifier)
        paths = [each.path for each in devices if record.device in ("", each.path) and not each.is_held]
    sources = {mount.source for mount in mounts_here()}
    for path in paths:
        if path not in sources:
            driver.detach(driver.find(path))
