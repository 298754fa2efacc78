"""New daemons for mounts whose own were killed: ``erofs-nbd reattach``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import attrs
from twisted.python.threadpool import ThreadPool

from erofs_twisted.control.starting import have_daemon
from erofs_twisted.device.nbd import NetlinkConnector
from erofs_twisted.errors import ErofsTwistedError, MountError
from erofs_twisted.leftovers import plan_for
from erofs_twisted.mount.mountpoint import Mountpoint
from erofs_twisted.pool import SystemCallPool
from erofs_twisted.process import TWISTD, run_program
from erofs_twisted.state.journal import Journal, daemon_runs
from erofs_twisted.state.records import MountRecord
from erofs_twisted.state.takeover import Plan
from erofs_twisted.waiting import wait_until_ready


@attrs.frozen
class Orphan:
    """A mount without a daemon, and what is to be done about it."""

    record: MountRecord
    plan: Plan

    def told(self) -> list[str]:
        """The steps, in words."""
        return [step.told(self.record, self.plan.device) for step in self.plan.steps]


def orphans_on_record(journal: Journal, mountpoint: str | None) -> list[MountRecord]:
    """The mounts on record whose daemon does not run: the one on ``mountpoint``, or all.

    Raises `MountError` where that one is not on record, or is served.
    """
    if mountpoint is None:
        return [record for record in journal.records() if not daemon_runs(record)]
    record = journal.read(mountpoint)
    if record is None:
        raise MountError(
            f"{mountpoint}: no mount of erofs-nbd is on record in {journal.state_dir} (--state-dir)"
        )
    if daemon_runs(record):
        raise MountError(f"{mountpoint} is served, by process {record.pid}")
    return [record]


async def look_at(
    reactor: Any, records: Sequence[MountRecord], errors: list[ErofsTwistedError]
) -> list[Orphan]:
    """What there is of mounts, and so what new daemons will do. What cannot be told is one of ``errors``."""
    pool = SystemCallPool(reactor)
    found = []
    try:
        for record in records:
            try:
                found.append(await _look_at(reactor, pool, record))
            except MountError as error:
                errors.append(error)
    finally:
        await pool.stop()
    return found


async def _look_at(reactor: Any, pool: ThreadPool, record: MountRecord) -> Orphan:
    mountpoint = Mountpoint(reactor, pool, record.mountpoint)
    connector = NetlinkConnector(reactor, pool) if record.backend == "nbd" else None
    return Orphan(record, await plan_for(record, connector, mountpoint, record.is_wanted))


def start(journal: Journal, record: MountRecord, more: Mapping[str, str], timeout: float) -> None:
    """Start a daemon for a mount on record, with the options of the first and ``more``; wait until it serves.

    One of many in a daemon comes up with all others. One that was unmounted is served until nobody uses it.
    It blocks. The log is in the mount's state directory. Raises `MountError`, with the daemon's own words.
    """
    if record.service:
        have_daemon(journal.state_dir)
        if not record.is_wanted:
            return
        wait_until_ready(journal, record.mountpoint, timeout)
        return
    log = journal.directory(record.mountpoint) / "log"
    arguments = ["--pidfile=", f"--logfile={log}", "erofs-nbd", *_spelt({**record.options, **more})]
    status, said = run_program([*TWISTD, *arguments])
    if status != 0:
        raise MountError(f"{record.mountpoint}: {said or 'twistd ended at once'}")
    wait_until_ready(journal, record.mountpoint, timeout)


def _spelt(options: Mapping[str, str | bool]) -> Sequence[str]:
    return [f"--{name}" if value is True else f"--{name}={value}" for name, value in options.items()]


def failures(errors: Sequence[ErofsTwistedError]) -> MountError:
    """Of several mounts, as one error."""
    return MountError("\n".join(map(str, errors)))
