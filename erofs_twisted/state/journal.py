"""The state directory: one directory a mount, which its daemon holds locked, with its record inside."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import attrs
from twisted.logger import Logger

from erofs_twisted.errors import MountError
from erofs_twisted.files import UNFINISHED, make_directory, remove_unfinished, replace_file, sync_directory
from erofs_twisted.state.records import MountRecord, RecordError, Status, is_record_name, record_name

RECORD = "record.json"
DAMAGED = "record.damaged"
"""Where a record goes that cannot be read."""


def process_started(pid: int) -> int | None:
    """When a process started, in clock ticks since boot; None where there is no such process."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(errors="replace")
    except OSError:
        return None
    # The command, in parentheses, may hold anything; field 22 is the 20th behind it.
    fields = stat.rpartition(")")[2].split()
    return None if fields[0] in "ZX" else int(fields[19])


def boot_id() -> str:
    """Of the kernel that runs: what is on record from another boot says nothing of processes and devices."""
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


@attrs.define
class MountState:
    """A mount's own directory, locked by this process: ``path`` is there until `release`.

    ``before`` is what a daemon that has ended has left on record. It stays there until `update` replaces it.
    """

    path: Path
    _lock: int
    record: MountRecord
    before: MountRecord | None = None
    _written: MountRecord | None = attrs.field(init=False, default=None)

    log = Logger()

    def update(self, **changes: Any) -> None:
        """Replace fields of the record, on disk in one step, and for good when this returns. What is there
        already is not written again. Raises `MountError` where it cannot be written; `record` has them all
        the same."""
        self.record = attrs.evolve(self.record, **changes)
        if self.record == self._written:
            return
        # It may fail with the new one in place.
        self._written = None
        try:
            replace_file(str(self.path / RECORD), self.record.to_json(), durable=True)
        except OSError as error:
            raise MountError(
                f"--state-dir {self.path.parent}: {error.strerror}: {self.record.mountpoint} cannot be "
                "recorded; make room there, or name another directory"
            ) from error
        self._written = self.record

    def note(self, **changes: Any) -> None:
        """As `update`, where it has to go on without: it is only logged."""
        try:
            self.update(**changes)
        except MountError as error:
            self.log.error("{reason}", reason=str(error))

    def leave(self) -> None:
        """Give the mount up, leaving what there is, on record, to the next daemon."""
        os.close(self._lock)
        self._lock = -1

    def release(self, failure: str | None = None) -> None:
        """Give the mount up, leaving nothing, for good when this returns; with ``failure``, only the record
        that tells why, for whoever waits for the mount, and what it has left."""
        if self._lock < 0:
            return
        if failure is None:
            _remove(self.path)
        else:
            self.note(status=Status.FAILED, reason=failure)
        os.close(self._lock)
        self._lock = -1


@attrs.frozen
class Journal:
    """The mounts of this host that share a state directory."""

    state_dir: Path

    log = Logger()

    def claim(
        self,
        mountpoint: str,
        image: str,
        options: Mapping[str, str | bool] | None = None,
        *,
        service: bool = False,
    ) -> MountState:
        """Begin a mount: its directory, locked, with a record that says 'starting'.

        Where the daemon before was killed, the record still tells of its image, device and mount, for these
        may be there yet. Raises `MountError` where another daemon serves that mount point or the directory
        cannot be made.
        """
        path = self.directory(mountpoint)
        try:
            lock = self._lock(path)
        except OSError as error:
            if error.errno == errno.EWOULDBLOCK:
                owner = self.read(mountpoint)
                whose = f"process {owner.pid} ({owner.image})" if owner else "another process"
                raise MountError(
                    f"--mountpoint {mountpoint}: {whose} already serves it; "
                    f"end that with 'erofs-nbd umount {mountpoint}'"
                ) from error
            raise MountError(
                f"--state-dir {self.state_dir}: {error.strerror}; name a directory that this user may write"
            ) from error
        started = process_started(os.getpid())
        assert started is not None, "this process runs"
        with contextlib.suppress(OSError):
            remove_unfinished(path)
        before = self._before(mountpoint)
        record = MountRecord(
            mountpoint=mountpoint,
            image=image,
            pid=os.getpid(),
            pid_started=started,
            options=dict(options or {}),
            service=service,
        )
        if before is not None:
            # What it tells of may be there yet.
            names = ["pid", "pid_started", "service"]
            if before.status is not Status.UNMOUNTED:
                names += ["status", "reason"]
            if before.backend:
                record = attrs.evolve(before, **{name: getattr(record, name) for name in names})
            record = attrs.evolve(record, made=before.made)
        state = MountState(path, lock, record, before)
        if before is not None:
            # Who reads what it tells of waits for us, recorded or not.
            state.note()
            return state
        try:
            state.update()
        except MountError:
            state.release()
            raise
        return state

    def read(self, mountpoint: str) -> MountRecord | None:
        """The record of a mount; None where there is none. Raises `RecordError` where it is damaged."""
        try:
            return MountRecord.from_json((self.directory(mountpoint) / RECORD).read_bytes())
        except FileNotFoundError:
            return None
        except PermissionError as error:
            raise RecordError(
                f"--state-dir {self.state_dir}: {error.strerror}; run as the user who mounted it"
            ) from error

    def forget(self, mountpoint: str, first: Callable[[], object] = lambda: None) -> None:
        """Drop what a daemon that has ended left of a mount, after ``first`` was done, which no other daemon
        for it disturbs. Raises OSError where a daemon still holds it."""
        path = self.directory(mountpoint)
        with contextlib.suppress(FileNotFoundError):
            lock = self._lock(path, make=False)
            try:
                first()
                _remove(path)
            finally:
                os.close(lock)

    def tidy(self) -> None:
        """Remove what a kill or a crash has left without a record: directories, and records half written."""
        with contextlib.suppress(OSError):
            for path in self.state_dir.iterdir():
                if is_record_name(path.name) and _is_untidy(path):
                    self._tidy(path)

    def _tidy(self, path: Path) -> None:
        with contextlib.suppress(OSError):  # a daemon has it, or there is more in it
            lock = self._lock(path, make=False)
            try:
                remove_unfinished(path)
                if not (path / RECORD).exists():
                    path.rmdir()
            finally:
                os.close(lock)

    def records(self) -> list[MountRecord]:
        """Of all mounts, by mount point. One that is damaged is passed over, with a warning."""
        found = []
        for path in self.state_dir.glob(f"*/{RECORD}"):
            try:
                found.append(MountRecord.from_json(path.read_bytes()))
            except (OSError, RecordError) as error:
                self.log.warn("{path} is passed over: {reason}", path=str(path), reason=str(error))
        return sorted(found, key=lambda record: record.mountpoint)

    def _before(self, mountpoint: str) -> MountRecord | None:
        try:
            return self.read(mountpoint)
        except RecordError as error:
            path = self.directory(mountpoint)
            (path / RECORD).rename(path / DAMAGED)
            self.log.warn(
                "the record of {mountpoint} cannot be read ({reason}); it is set aside as {aside}, and what "
                "its daemon may have left is not taken over",
                mountpoint=mountpoint,
                reason=str(error),
                aside=str(path / DAMAGED),
            )
            return None

    def directory(self, mountpoint: str) -> Path:
        """The mount's own directory, whether it is there or not."""
        return self.state_dir / record_name(mountpoint)

    def _lock(self, path: Path, make: bool = True) -> int:
        """Lock a mount's directory: the one that has that name, though others come and go meanwhile."""
        while True:
            try:
                if make:
                    make_directory(path)
                lock = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            except FileNotFoundError:
                if make:
                    continue
                raise
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if os.path.samestat(os.fstat(lock), path.stat()):
                    return lock
            except FileNotFoundError:
                pass
            except OSError:
                os.close(lock)
                raise
            os.close(lock)


def _is_untidy(path: Path) -> bool:
    return not (path / RECORD).exists() or any(path.glob(f"{UNFINISHED}*"))


def _remove(path: Path) -> None:
    # A mount that was given up, and is on record again after a crash, would be made anew.
    shutil.rmtree(path, ignore_errors=True)
    with contextlib.suppress(OSError):
        sync_directory(path.parent)


def daemon_runs(record: MountRecord) -> bool:
    """Is the daemon that wrote a record still the process that it was? One that has replaced its program, as
    an upgrade does, is."""
    return process_started(record.pid) == record.pid_started
