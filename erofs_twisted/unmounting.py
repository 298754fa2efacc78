"""The end of a mount, asked for from outside its daemon; also of one whose daemon was killed."""

from __future__ import annotations

from functools import partial
from typing import Any

from twisted.internet.task import deferLater
from twisted.python.threadpool import ThreadPool

from erofs_twisted.device.driver import NBDDriver
from erofs_twisted.device.fuse import clear_away
from erofs_twisted.errors import MountError
from erofs_twisted.mount.mountpoint import Mountpoint, mounts_here, remove_empty
from erofs_twisted.pool import SystemCallPool
from erofs_twisted.state.journal import Journal, daemon_runs
from erofs_twisted.state.records import MountRecord, Status
from erofs_twisted.syscalls import in_thread

PATIENCE = 30.0
"""Seconds that a daemon has, once its mount has gone, to give its device back and end."""

POLL = 0.02


async def unmount(reactor: Any, journal: Journal, path: str, lazy: bool = False) -> None:
    """Unmount ``path``, and wait until device and daemon have gone; with ``lazy`` the daemon stays as long as
    something uses the mount. Raises `MountError`; `erofs_twisted.mount.mountpoint.Busy` names the users."""
    record = journal.read(path)
    if record is None:
        raise MountError(f"{path}: no mount of erofs-nbd is on record in {journal.state_dir} (--state-dir)")
    alive = daemon_runs(record)
    if record.status is Status.FAILED and not alive and not record.device:
        journal.forget(path)
        raise MountError(f"{path} was not mounted: {record.reason}")
    pool = SystemCallPool(reactor)
    try:
        mountpoint = Mountpoint(reactor, pool, path)
        if alive:
            await mountpoint.unmount(lazy=lazy)
        else:
            there = await mountpoint.there()
            is_mounted = there is not None and there.source == record.device
            if is_mounted:
                await mountpoint.unmount(lazy=lazy)
            await _clear_device(reactor, pool, journal, record, is_mounted)
    finally:
        await pool.stop()
    if not lazy:
        await _until_ended(reactor, record)
    if not daemon_runs(record):
        # One that ended by itself has removed it.
        journal.forget(path, partial(remove_empty, path) if record.made else lambda: None)


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


async def _until_ended(reactor: Any, record: MountRecord) -> None:
    deadline = reactor.seconds() + PATIENCE
    while daemon_runs(record):
        if reactor.seconds() >= deadline:
            raise MountError(
                f"{record.mountpoint} is unmounted, but its daemon (process {record.pid}) has not ended"
            )
        await deferLater(reactor, POLL)
