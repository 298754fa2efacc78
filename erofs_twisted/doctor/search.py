"""Looks for what daemons have left: in the state directory, in sysfs, among mounts and processes. It changes
nothing. It blocks."""

from __future__ import annotations

import fcntl
import os
import stat
from collections.abc import Iterator, Sequence, Set
from contextlib import suppress
from pathlib import Path

import attrs

from erofs_twisted.device.driver import NBDDriver
from erofs_twisted.device.fuse import PREFIX
from erofs_twisted.doctor.remains import (
    FUSE_FILE,
    Damaged,
    Device,
    FuseDirectory,
    OnRecord,
    Pidfile,
    Remains,
    name_in,
)
from erofs_twisted.errors import MountError
from erofs_twisted.interfaces import Connected
from erofs_twisted.leftovers import seen
from erofs_twisted.mount.mountinfo import Mount, mount_at
from erofs_twisted.mount.mountpoint import mounts_here
from erofs_twisted.ownerport import is_dead
from erofs_twisted.state.journal import DAMAGED, RECORD, boot_id, daemon_runs
from erofs_twisted.state.records import MountRecord, RecordError, is_record_name
from erofs_twisted.state.takeover import make_plan

PROC = Path("/proc")
BLOCK = Path("/sys/block")
DELETED = " (deleted)"
PIDFILE = "twistd.pid"


@attrs.frozen
class Opened:
    """A file that a process has open, by the path that it had."""

    pid: int
    path: str


def look_for_remains(state_dir: Path, driver: NBDDriver | None, directory: Path | None = None) -> Remains:
    """``driver`` is None where this process may not ask it; then devices stay out. Pidfiles are looked for in
    ``directory``, the current one, and in ``state_dir``, of which nothing is said where it cannot be read."""
    mounts, boot = mounts_here(), boot_id()
    records, damaged = _read_records(state_dir)
    opened = list(open_files())
    backing = _files_of_loop_devices()
    return Remains(
        state_dir=str(state_dir),
        boot=boot,
        records=[_on_record(record, driver, mounts, boot) for record in records],
        damaged=damaged,
        devices=None if driver is None else _devices(driver, records, opened, backing),
        connected=frozenset(f"/dev/{pid.parent.name}" for pid in BLOCK.glob("nbd*/pid")),
        mounts=mounts,
        backing=backing,
        fuse=_fuse_directories(state_dir, mounts, backing, {each.path for each in opened}),
        vacant=[str(path) for path in _vacant(state_dir)],
        sockets=[str(path) for path in _dead_sockets(state_dir)],
        pidfiles=[*_pidfiles([*state_dir.glob("*.pid"), (directory or Path.cwd()) / PIDFILE])],
    )


def open_files() -> Iterator[Opened]:
    """What processes have open, but for this one, as far as we may look. Only procfs is asked, which does not
    wait for file systems that are stuck."""
    for process in PROC.iterdir():
        if not process.name.isdigit() or int(process.name) == os.getpid():
            continue
        try:
            for link in os.scandir(process / "fd"):
                yield Opened(int(process.name), os.readlink(link.path).removesuffix(DELETED))
        except OSError:
            continue  # it has ended, or is not ours to look at


def users_of(path: str, opened: Sequence[Opened]) -> tuple[str, ...]:
    """The processes that have a device open, and the devices that stand on it."""
    pids = sorted({each.pid for each in opened if each.path == path})
    above = [*_files_of_loop_devices(path), *_names(BLOCK / Path(path).name / "holders")]
    return (*(f"process {pid}" for pid in pids), *above)


def daemon_of(identifier: str, opened: Sequence[Opened]) -> int:
    """The process that keeps the directory of the mount that a device was made for; 0 where none is seen."""
    name = name_in(identifier)
    return next((each.pid for each in opened if name and os.path.basename(each.path) == name), 0)


def is_held_by_a_daemon(directory: Path) -> bool:
    """Is it locked? Raises OSError."""
    # A shared lock, and for a moment only: one that starts just now may be told that another serves.
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(descriptor)
    return False


def is_dead_socket(path: Path) -> bool:
    """Does nobody listen on it, as far as that can be told?"""
    with suppress(OSError):
        return is_dead(str(path))
    return False


def _read_records(state_dir: Path) -> tuple[list[MountRecord], list[Damaged]]:
    records, damaged = [], []
    try:
        directories = sorted(state_dir.iterdir())
    except OSError:
        return [], []
    for path in directories:
        try:
            records.append(MountRecord.from_json((path / RECORD).read_bytes()))
        except (FileNotFoundError, NotADirectoryError):
            pass
        except (OSError, RecordError) as error:
            reason = str(error.strerror if isinstance(error, OSError) else error)
            is_held = is_held_by_a_daemon(path)
            damaged.append(Damaged(path=str(path / RECORD), reason=reason, is_aside=False, is_held=is_held))
        if (path / DAMAGED).exists():
            reason = "a daemon could not read it"
            damaged.append(Damaged(path=str(path / DAMAGED), reason=reason, is_aside=True, is_held=False))
    return records, damaged


def _on_record(record: MountRecord, driver: NBDDriver | None, mounts: list[Mount], boot: str) -> OnRecord:
    if daemon_runs(record):
        return OnRecord(record=record, is_served=True, is_stopped=_is_stopped(record.pid))
    devices: list[Connected] = []
    if record.backend == "nbd" and record.identifier:
        if driver is None:
            return OnRecord(record=record, is_served=False, problem="what it left takes root to tell")
        devices = driver.connected(record.identifier)
    try:
        plan = make_plan(record, seen(boot, devices, mount_at(mounts, record.mountpoint)), record.is_wanted)
    except MountError as error:
        return OnRecord(record=record, is_served=False, problem=str(error))
    return OnRecord(record=record, is_served=False, plan=plan)


def _is_stopped(pid: int) -> bool:
    try:
        return (PROC / str(pid) / "stat").read_text(errors="replace").rpartition(")")[2].split()[0] == "T"
    except OSError:
        return False


def _devices(
    driver: NBDDriver, records: Sequence[MountRecord], opened: Sequence[Opened], backing: dict[str, str]
) -> list[Device]:
    known = {record.identifier for record in records if record.identifier}
    found = []
    for directory in sorted(BLOCK.glob("nbd*")):
        try:
            identifier = (directory / "backend").read_text(errors="surrogateescape").removesuffix("\n")
        except OSError:
            continue  # not connected, or by one who does not say who he is
        if identifier not in known and not name_in(identifier):
            continue
        path = f"/dev/{directory.name}"
        found.append(
            Device(
                path=path,
                identifier=identifier,
                is_bound=any(each.path == path for each in driver.connected(identifier)),
                is_held=driver.is_held(driver.find(path)),
                users=users_of(path, opened),
                daemon=daemon_of(identifier, opened),
            )
        )
    return found


def _files_of_loop_devices(file: str = "") -> dict[str, str]:
    """Each loop device's file, or those of one file."""
    found = {}
    for path in BLOCK.glob("loop*/loop/backing_file"):
        try:
            name = path.read_text(errors="surrogateescape").removesuffix("\n").removesuffix(DELETED)
        except OSError:
            continue
        if not file or name == file:
            found[f"/dev/{path.parent.parent.name}"] = name
    return found


def _fuse_directories(
    state_dir: Path, mounts: Sequence[Mount], backing: dict[str, str], opened: Set[str]
) -> list[FuseDirectory]:
    """Those in the state directory, and those of whatever is mounted."""
    paths = {str(path) for path in state_dir.glob(f"*/{PREFIX}*")}
    for mount in mounts:
        if mount.fstype == "erofs" and (
            found := FUSE_FILE.fullmatch(backing.get(mount.source, mount.source))
        ):
            paths.add(os.path.dirname(found[0]))
    directories = []
    for path in sorted(paths):
        try:
            is_served: bool | None = is_held_by_a_daemon(Path(path))
        except OSError:
            # A daemon goes on without its directory, which it still has open.
            is_served = True if path in opened else None
        directories.append(FuseDirectory(path=path, is_served=is_served))
    return directories


def _vacant(state_dir: Path) -> Iterator[Path]:
    for path in sorted(state_dir.glob("*")):
        with suppress(OSError):
            is_a_mounts = is_record_name(path.name) and path.is_dir()
            if is_a_mounts and not os.listdir(path) and not is_held_by_a_daemon(path):
                yield path


def _dead_sockets(state_dir: Path) -> Iterator[Path]:
    """Beside those in directories of nbdfuse, which go with these."""
    for path in sorted([*state_dir.glob("*"), *state_dir.glob("*/*")]):
        with suppress(OSError):
            if stat.S_ISSOCK(path.lstat().st_mode) and is_dead_socket(path):
                yield path


def _pidfiles(paths: Sequence[Path]) -> Iterator[Pidfile]:
    for path in paths:
        try:
            pid = int(path.read_text(errors="replace"))
        except (OSError, ValueError):
            continue
        try:
            process = PROC / str(pid)
            command = (process / "comm").read_text(errors="replace").strip()
            # Not to be shown: there may be secrets among the arguments.
            is_twistd = b"twistd" in (process / "cmdline").read_bytes()
        except OSError:
            command, is_twistd = "", False
        yield Pidfile(path=str(path), pid=pid, command=command, is_twistd=is_twistd)


def _names(directory: Path) -> list[str]:
    try:
        return sorted(path.name for path in directory.iterdir())
    except OSError:
        return []
