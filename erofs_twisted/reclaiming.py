"""The devices of daemons that were killed get new sockets before anything else is done.

What was under way when a daemon was killed is sent again when the block layer's timer fires after that. So
it may as well run while this process imports what it needs, and finds out what is to be done. Requests wait
in the socket meanwhile.
"""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

from erofs_twisted.device.driver import NBDDriver, Reconnected
from erofs_twisted.errors import MountError
from erofs_twisted.state.journal import Journal, boot_id, daemon_runs
from erofs_twisted.state.records import MountRecord, RecordError

PATIENCE = 0.1
"""Seconds in which the driver may find out that the one before is dead. Later it is tried again."""


def reclaim(state_dir: Path, mountpoint: str = "", driver: NBDDriver | None = None) -> dict[str, Reconnected]:
    """By their paths, those that are on record in ``state_dir``, for a daemon that has many mounts, or for
    that of the one ``mountpoint``. It blocks. What cannot be had is left out, and left as it is."""
    journal = Journal(state_dir)
    driver = NBDDriver() if driver is None else driver
    boot = boot_id()
    found: dict[str, Reconnected] = {}
    for record in _records(journal, mountpoint):
        is_ours = record.backend == "nbd" and record.device and record.boot == boot
        if is_ours and record.device not in found and not daemon_runs(record):
            _reconnect(driver, record, found)
    return found


def _records(journal: Journal, mountpoint: str) -> list[MountRecord]:
    if not mountpoint:
        return [record for record in journal.records() if record.service]
    try:
        record = journal.read(mountpoint)
    except (RecordError, OSError):
        return []
    return [] if record is None else [record]


def _reconnect(driver: NBDDriver, record: MountRecord, found: dict[str, Reconnected]) -> None:
    if driver.is_connected(record.device, record.size, record.identifier):
        # It may be served by now, or be told to disconnect: what becomes of it is seen later.
        with suppress(MountError, OSError):
            found[record.device] = driver.reconnect(record.device, record.identifier, PATIENCE)
