"""Waiting for a mount that another process makes."""

from __future__ import annotations

import time
from collections.abc import Callable

from erofs_twisted.errors import MountError
from erofs_twisted.mount.mountinfo import mount_at
from erofs_twisted.mount.mountpoint import mounts_here
from erofs_twisted.state.journal import Journal, daemon_runs
from erofs_twisted.state.records import Status

POLL = 0.02
GRACE = 3.0
"""Seconds for another daemon to begin, in the place of one that was killed."""


def wait_until_ready(
    journal: Journal, path: str, timeout: float, check: Callable[[], object] = lambda: None
) -> None:
    """Return as soon as the mount point ``path`` can be used. It blocks, up to ``timeout`` seconds.

    Raises `MountError` where it cannot, with the daemon's own words. As long as there is no record of one,
    ``check`` is called, which may raise something else.
    """
    began = time.monotonic()
    deadline = began + timeout
    while True:
        record = journal.read(path)
        if record is not None:
            alive = daemon_runs(record)
            if alive and record.status is Status.READY and _is_mounted(path):
                return
            has_failed = record.status is Status.FAILED
            if not alive and (has_failed or time.monotonic() > began + min(GRACE, timeout)):
                if not record.device:
                    journal.forget(path)
                was_killed = (
                    f"the daemon of {path} (process {record.pid}) was killed; start it again to take its "
                    f"mount over, or clear that away with 'erofs-nbd umount {path}'"
                )
                raise MountError(record.reason if has_failed else was_killed)
        else:
            check()
        if time.monotonic() >= deadline:
            if record is None:
                raise MountError(f"no daemon for {path} came up in {timeout:g} s; see its log")
            reason = f": {record.reason}" if record.reason else ""
            raise MountError(f"{path} is still {record.status} after {timeout:g} s{reason}")
        time.sleep(POLL)


def _is_mounted(path: str) -> bool:
    return mount_at(mounts_here(), path) is not None
