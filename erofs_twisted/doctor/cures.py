"""Repairs what is safe to repair. Before each thing that is done it is looked whether it is still as it was
found: nothing is taken from a daemon or from a user. It blocks."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path

import attrs

from erofs_twisted.device.driver import NBDDriver
from erofs_twisted.device.fuse import PREFIX, clear_away
from erofs_twisted.device.machine import may_administer
from erofs_twisted.doctor.finding import Act, Finding, Repair
from erofs_twisted.doctor.report import Outcome
from erofs_twisted.doctor.search import (
    daemon_of,
    is_dead_socket,
    is_held_by_a_daemon,
    open_files,
    users_of,
)
from erofs_twisted.errors import ErofsTwistedError, MountError
from erofs_twisted.leftovers import forget
from erofs_twisted.mount.mountinfo import mount_at
from erofs_twisted.mount.mountpoint import mounts_here
from erofs_twisted.reattaching import start
from erofs_twisted.state.journal import RECORD, Journal, daemon_runs
from erofs_twisted.syscalls import MNT_DETACH, UMOUNT_NOFOLLOW, umount

PATIENCE = 60.0
"""Seconds that a new daemon may take until it serves."""

RELEASE = 5.0
"""Seconds in which the kernel lets go of a file that was mounted, if nobody uses it."""

POLL = 0.02


@attrs.frozen
class Cures:
    """What can be done to the mounts of ``journal``."""

    journal: Journal
    driver: NBDDriver

    @classmethod
    def of(cls, state_dir: Path) -> Cures:
        """Raises `MountError` for who may not do it."""
        if not may_administer():
            raise MountError("--fix takes root (CAP_SYS_ADMIN)")
        return cls(Journal(state_dir), NBDDriver())

    def apply(self, findings: Iterable[Finding]) -> Iterator[Outcome]:
        """Do what these say, one after another; what fails ends its finding's repairs, and no others."""
        for finding in findings:
            for repair in finding.repairs:
                try:
                    self._acts[repair.act](self, repair)
                except ErofsTwistedError as error:
                    yield Outcome(repair, str(error))
                    break
                except OSError as error:
                    yield Outcome(repair, f"{repair.target}: {error.strerror or error}")
                    break
                yield Outcome(repair)

    def _reattach(self, repair: Repair) -> None:
        record = self.journal.read(repair.target)
        if record is None:
            raise MountError(f"{repair.target} is not on record any more")
        if not daemon_runs(record):  # systemd may have been faster
            start(self.journal, record, {}, PATIENCE)

    def _unmount(self, repair: Repair) -> None:
        there = mount_at(mounts_here(), repair.target)
        if there is None:
            return
        if (there.mount_id, there.source) != (repair.mount_id, repair.source):
            raise MountError(f"{repair.target}: {there.source} was mounted there meanwhile")
        umount(repair.target, UMOUNT_NOFOLLOW | MNT_DETACH)

    def _disconnect(self, repair: Repair) -> None:
        path, identifier = repair.target, repair.identifier
        found = [each for each in self.driver.connected(identifier) if each.path == path]
        if not found:
            return
        opened = list(open_files())
        if found[0].is_held or users_of(path, opened):
            raise MountError(f"{path} is in use")
        if (pid := daemon_of(identifier, opened)) != 0:
            raise MountError(f"{path} is served, by process {pid}")
        # It fails for one that is served; also if the daemon is in a container, and not to be seen from here.
        ours = self.driver.reconnect(path, identifier, patience=0)
        with ours.sock:
            self.driver.detach(ours.attached)

    def _forget(self, repair: Repair) -> None:
        record = self.journal.read(repair.target)
        if record is not None and daemon_runs(record):
            raise MountError(f"{repair.target} is served, by process {record.pid}")
        directory = self.journal.directory(repair.target)
        self._clear_fuse(directory)
        try:
            if record is None:
                self.journal.forget(repair.target)
            else:
                forget(self.journal, record)
        except BlockingIOError as error:
            raise MountError(f"{repair.target}: a daemon has just started") from error

    def _clear_fuse(self, directory: Path) -> None:
        """What nbdfuse has left, and not what a daemon has. The kernel lets go of a file a moment after what
        was on it is unmounted."""
        deadline = time.monotonic() + RELEASE
        while True:
            clear_away(str(directory))
            left = [path for path in directory.glob(f"{PREFIX}*") if not _is_a_daemons(path)]
            if not left:
                return
            if time.monotonic() > deadline:
                raise MountError(f"{left[0]} is in use still, by who has files of the mount open")
            time.sleep(POLL)

    def _clear(self, repair: Repair) -> None:
        directory = Path(repair.target)
        self._clear_fuse(directory)
        if not (directory / RECORD).exists():
            with suppress(FileNotFoundError):
                os.rmdir(directory)

    def _unlink(self, repair: Repair) -> None:
        path = Path(repair.target)
        with suppress(FileNotFoundError):
            if not is_dead_socket(path):
                raise MountError(f"{path}: somebody listens on it now")
            path.unlink()

    _acts = {
        Act.REATTACH: _reattach,
        Act.UNMOUNT: _unmount,
        Act.DISCONNECT: _disconnect,
        Act.FORGET: _forget,
        Act.CLEAR: _clear,
        Act.UNLINK: _unlink,
    }


def _is_a_daemons(directory: Path) -> bool:
    try:
        return is_held_by_a_daemon(directory)
    except FileNotFoundError:
        return True  # that is, not to be waited for
