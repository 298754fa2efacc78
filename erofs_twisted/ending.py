"""The end of a mount, asked for by a program, whichever daemon has it."""

from __future__ import annotations

from erofs_twisted.control import SOCKET
from erofs_twisted.control.client import Daemon
from erofs_twisted.running import run
from erofs_twisted.state.journal import Journal, daemon_runs
from erofs_twisted.unmounting import unmount


def end_mount(journal: Journal, path: str, lazy: bool = False) -> None:
    """As `unmount`, and it blocks. A daemon with many mounts is asked to do it."""
    record = journal.read(path)
    if record is not None and record.service and daemon_runs(record):
        Daemon(journal.state_dir / SOCKET).unmount(path, lazy)
        return
    run(lambda reactor: unmount(reactor, journal, path, lazy))
