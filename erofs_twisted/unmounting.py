"""The end of a mount, asked for from outside its daemon; also of one whose daemon was killed."""

from __future__ import annotations

from typing import Any

from twisted.internet.task import deferLater

from erofs_twisted.errors import MountError
from erofs_twisted.leftovers import forget, take_away
from erofs_twisted.mount.mountpoint import Mountpoint
from erofs_twisted.pool import SystemCallPool
from erofs_twisted.state.journal import Journal, daemon_runs
from erofs_twisted.state.records import MountRecord, Status

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
        if alive:
            await Mountpoint(reactor, pool, path).unmount(lazy=lazy)
        else:
            await take_away(reactor, pool, journal, record, lazy)
    finally:
        await pool.stop()
    if not lazy:
        await _until_ended(reactor, record)
    if not daemon_runs(record):
        # One that ended by itself has removed it.
        forget(journal, record)


async def _until_ended(reactor: Any, record: MountRecord) -> None:
    deadline = reactor.seconds() + PATIENCE
    while daemon_runs(record):
        if reactor.seconds() >= deadline:
            raise MountError(
                f"{record.mountpoint} is unmounted, but its daemon (process {record.pid}) has not ended"
            )
        await deferLater(reactor, POLL)
