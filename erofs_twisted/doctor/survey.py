"""Looks at what this machine has: drivers, programs, directories. It leaves nothing, and loads nothing. It
blocks."""

from __future__ import annotations

import errno
import fcntl
import gzip
import os
import platform
import subprocess
import tempfile
from pathlib import Path

from erofs_twisted.blocks.cachefiles import CacheError, CacheFiles
from erofs_twisted.device.machine import PATIENCE, lists_filesystem, may_administer
from erofs_twisted.device.nbdfuse import missing_programs
from erofs_twisted.device.netlink import GenericNetlink
from erofs_twisted.device.uapi import FAMILY, VERSION
from erofs_twisted.doctor.machine import COMPRESSORS, Machine, Place
from erofs_twisted.mount.mountpoint import mounts_here

UNIT = "erofs-nbd@.service"
UNITS = (
    "/etc/systemd/system",
    "/run/systemd/system",
    "/usr/local/lib/systemd/system",
    "/usr/lib/systemd/system",
)
RULE = "60-erofs-twisted.rules"
RULES = ("/etc/udev/rules.d", "/run/udev/rules.d", "/usr/lib/udev/rules.d", "/lib/udev/rules.d")
SIZE = 4 << 20
"""Of the file with a hole that is made for a moment, in bytes."""

TAIL = 4096


def look_at_machine(cache_dir: Path, state_dir: Path) -> Machine:
    """What there is. ``cache_dir`` and ``state_dir`` need not be there."""
    unit = _first(UNITS, UNIT)
    return Machine(
        release=platform.release(),
        may_administer=may_administer(),
        nbd_loaded=Path("/sys/module/nbd").exists(),
        nbd_loadable=is_loadable("nbd"),
        nbd_family=_has_family(),
        nbd_connected=len([*Path("/sys/block").glob("nbd*/pid")]),
        nbd_free=sum(not (path / "pid").exists() for path in Path("/sys/block").glob("nbd*")),
        max_part=_number(Path("/sys/module/nbd/parameters/max_part")),
        erofs_known=lists_filesystem("erofs"),
        erofs_loadable=is_loadable("erofs"),
        config=kernel_config(),
        symbols=_decompressors(),
        fuse_known=Path("/dev/fuse").exists(),
        fuse_loadable=is_loadable("fuse"),
        missing_programs=tuple(missing_programs()),
        has_systemd=Path("/run/systemd/system").exists(),
        unit=unit,
        unit_program=_missing_program(unit),
        has_udev=Path("/run/udev/control").exists(),
        udev_rule=_first(RULES, RULE),
        cache=look_at_cache(cache_dir),
        state=look_at_state(state_dir),
    )


def look_at_cache(path: Path) -> Place:
    """The cache directory: what the files of blobs take is tried with one that has no name."""
    nearest = _nearest(path)
    is_there = nearest == path
    try:
        if not nearest.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))
        room = CacheFiles(str(path)).room() if is_there else _free(nearest)
        is_sparse = _try_file(nearest)
    except (OSError, CacheError) as error:
        problem = str(error) if isinstance(error, CacheError) else str(error.strerror or error)
        return Place(
            path=str(path), is_there=is_there, filesystem=filesystem_of(nearest), room=0, problem=problem
        )
    return Place(
        path=str(path),
        is_there=is_there,
        filesystem=filesystem_of(nearest),
        room=room,
        is_sparse=is_sparse,
    )


def look_at_state(path: Path) -> Place:
    """The state directory: who else may write to it could have daemons do what he likes."""
    nearest = _nearest(path)
    is_there = nearest == path
    problem = ""
    if not nearest.is_dir():
        problem = os.strerror(errno.ENOTDIR)
    elif not os.access(nearest, os.R_OK | os.W_OK | os.X_OK):
        problem = os.strerror(errno.EACCES)
    elif is_there and (nearest.stat().st_uid != os.geteuid() or nearest.stat().st_mode & 0o022):
        problem = "others may write to it, so what is on record there cannot be trusted (chmod 700)"
    return Place(
        path=str(path),
        is_there=is_there,
        filesystem=filesystem_of(nearest),
        room=0 if problem else _free(nearest),
        problem=problem,
    )


def is_loadable(module: str) -> bool | None:
    """Would modprobe(8) find it? None where there is no modprobe."""
    try:
        done = subprocess.run(
            ["modprobe", "--dry-run", "--quiet", module], capture_output=True, timeout=PATIENCE, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.returncode == 0


def kernel_config() -> dict[str, str] | None:
    """The options of the kernel that runs; None where its configuration cannot be read."""
    release = platform.release()
    for path in ("/proc/config.gz", f"/boot/config-{release}", f"/lib/modules/{release}/config"):
        try:
            with open(path, "rb") as file:
                content = gzip.decompress(file.read()) if path.endswith(".gz") else file.read()
        except (OSError, EOFError):
            continue
        return parse_config(content.decode(errors="replace"))
    return None


def parse_config(text: str) -> dict[str, str]:
    """A kernel's configuration, without the options that are not set."""
    pairs = (line.partition("=") for line in text.splitlines() if line.startswith("CONFIG_"))
    return {name: value for name, equals, value in pairs if equals}


def parse_symbols(lines: list[str]) -> frozenset[str] | None:
    """Of /proc/kallsyms, the decompressors of EROFS; None where EROFS is not in it at all."""
    names = {word for line in lines if "erofs_" in line for word in line.split()[2:3]}
    wanted = {symbol for _, symbol in COMPRESSORS.values()}
    return frozenset(names & wanted) if names else None


def filesystem_of(path: Path) -> str:
    """The type of the file system that a directory is on."""
    real = os.path.realpath(path)
    best, fstype = "", ""
    for mount in mounts_here():
        is_above = real == mount.path or real.startswith(mount.path.rstrip("/") + "/")
        if is_above and len(mount.path) >= len(best):
            best, fstype = mount.path, mount.fstype
    return fstype


def _has_family() -> bool:
    try:
        with GenericNetlink(FAMILY, VERSION):
            return True
    except OSError:
        return False


def _decompressors() -> frozenset[str] | None:
    try:
        with open("/proc/kallsyms", errors="replace") as file:
            return parse_symbols([line for line in file if "erofs_" in line])
    except OSError:
        return None


def _try_file(directory: Path) -> bool:
    """Make a file as the cache does, for a moment: are its holes no room? Raises OSError."""
    with tempfile.TemporaryFile(dir=directory) as file:
        os.ftruncate(file.fileno(), SIZE)
        os.posix_fallocate(file.fileno(), SIZE - TAIL, TAIL)
        fcntl.flock(file.fileno(), fcntl.LOCK_SH | fcntl.LOCK_NB)
        return os.fstat(file.fileno()).st_blocks * 512 < SIZE


def _nearest(path: Path) -> Path:
    """It, or the first above it that there is."""
    return next(each for each in (path, *path.parents) if os.path.lexists(each))


def _free(directory: Path) -> int:
    system = os.statvfs(directory)
    return system.f_bavail * system.f_frsize


def _number(path: Path) -> int:
    try:
        return int(path.read_text())
    except OSError:
        return 0


def _first(directories: tuple[str, ...], name: str) -> str:
    paths = (os.path.join(directory, name) for directory in directories)
    return next((path for path in paths if os.path.exists(path)), "")


def _missing_program(unit: str) -> str:
    """What a unit starts, where that is not there; else ''."""
    if not unit:
        return ""
    for line in Path(unit).read_text(errors="replace").splitlines():
        if line.startswith("ExecStart=/"):
            program = line.removeprefix("ExecStart=").split()[0]
            return "" if os.access(program, os.X_OK) else program
    return ""
