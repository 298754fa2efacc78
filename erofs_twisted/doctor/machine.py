"""What this machine has of what mounts need, and what is to be said of it. Nothing is looked at here."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import attrs

from erofs_twisted.doctor.finding import Finding, Level

COMPRESSORS = {
    "LZ4": ("CONFIG_EROFS_FS_ZIP", "z_erofs_lz4_decompress"),
    "LZMA": ("CONFIG_EROFS_FS_ZIP_LZMA", "z_erofs_lzma_decompress"),
    "DEFLATE": ("CONFIG_EROFS_FS_ZIP_DEFLATE", "z_erofs_deflate_decompress"),
    "ZSTD": ("CONFIG_EROFS_FS_ZIP_ZSTD", "z_erofs_zstd_decompress"),
}
"""What EROFS can decompress: by which option of the kernel, and in which function."""

BACKED_BY_FILE = "CONFIG_EROFS_FS_BACKED_BY_FILE"
SHARED = frozenset({"nfs", "nfs4", "cifs", "smb3", "ceph", "glusterfs", "fuse.glusterfs", "lustre", "9p"})
"""File systems that several hosts may mount."""

IN_MEMORY = frozenset({"tmpfs", "ramfs"})
SCARCE = 1 << 30
SOCKET_BELOW = len("/name-of-up-to-twenty-012345678901/fuse-01234567/socket")
LONGEST_SOCKET_PATH = 107


@attrs.frozen(kw_only=True)
class Place:
    """A directory, or the nearest one above it, where it has to be made yet (not ``is_there``).

    ``problem`` tells why it cannot be used. ``room`` are the bytes that may be written to it; ``is_sparse``
    whether holes take no room, None where that was not tried.
    """

    path: str
    is_there: bool
    filesystem: str
    room: int
    problem: str = ""
    is_sparse: bool | None = None


@attrs.frozen(kw_only=True)
class Machine:
    """What was seen. ``…_loadable`` is whether modprobe(8) would find the module; None where it is missing.

    ``nbd_family``: has the driver its netlink interface? ``config`` has the kernel's options, None where they
    cannot be read; ``symbols`` are the names of functions in the kernel that are in `COMPRESSORS`, None where
    EROFS is not loaded or they cannot be read. ``unit`` is the path of our systemd unit, '' where there is
    none, and ``unit_program`` what it starts, where that is missing.
    """

    release: str
    may_administer: bool
    nbd_loaded: bool
    nbd_loadable: bool | None
    nbd_family: bool
    nbd_connected: int
    nbd_free: int
    max_part: int
    erofs_known: bool
    erofs_loadable: bool | None
    config: Mapping[str, str] | None
    symbols: frozenset[str] | None
    fuse_known: bool
    fuse_loadable: bool | None
    missing_programs: tuple[str, ...]
    has_systemd: bool
    unit: str
    unit_program: str
    has_udev: bool
    udev_rule: str
    cache: Place
    state: Place


def findings_of(machine: Machine) -> list[Finding]:
    """A finding for each check, in the order in which a mount needs the things."""
    return [
        _privileges(machine),
        _erofs(machine),
        _compression(machine),
        *_nbd(machine),
        _fuse(machine),
        _cache(machine.cache),
        _state(machine.state),
        _unit(machine),
        *_udev(machine),
    ]


def _privileges(machine: Machine) -> Finding:
    if machine.may_administer:
        return Finding(Level.OK, "privileges", "CAP_SYS_ADMIN, as mounts take it")
    return Finding(
        Level.BAD,
        "privileges",
        "this user may not mount (CAP_SYS_ADMIN)",
        "run as root; without, there is erofs-nbd serve",
    )


def _erofs(machine: Machine) -> Finding:
    if machine.erofs_known:
        return Finding(Level.OK, "erofs", f"this kernel ({machine.release}) has it")
    if machine.erofs_loadable:
        return Finding(Level.OK, "erofs", "its module is not loaded yet; the first mount does so")
    if machine.erofs_loadable is None:
        return Finding(
            Level.UNKNOWN,
            "erofs",
            "it is not loaded, and whether there is a module cannot be told without modprobe",
            "install kmod",
        )
    return Finding(
        Level.BAD,
        "erofs",
        f"this kernel ({machine.release}) has no erofs, nor a module of it to load",
        "install the kernel's full package of modules, or one with CONFIG_EROFS_FS",
    )


def _compression(machine: Machine) -> Finding:
    found = compressors_of(machine)
    if None in found.values():
        return Finding(
            Level.UNKNOWN,
            "compression",
            "which kinds EROFS has cannot be told: neither the kernel's configuration nor its symbols tell",
            "modprobe erofs, and ask again; LZ4 is in nearly all kernels",
        )
    has = ", ".join(name for name, there in found.items() if there)
    lacks = ", ".join(name for name, there in found.items() if not there)
    if not has:
        return Finding(
            Level.WARNING,
            "compression",
            "EROFS has none here: only images that are not compressed can be mounted",
            "build images without -z, or take a kernel with CONFIG_EROFS_FS_ZIP",
        )
    if lacks:
        return Finding(
            Level.WARNING,
            "compression",
            f"EROFS has {has} here, but not {lacks}",
            "build images with mkfs.erofs -zlz4hc, or take a newer kernel",
        )
    return Finding(Level.OK, "compression", f"EROFS has {has}")


def compressors_of(machine: Machine) -> dict[str, bool | None]:
    """Whether EROFS has each of `COMPRESSORS`; None where that cannot be told."""
    return {name: _has_compressor(machine, *where) for name, where in COMPRESSORS.items()}


def _has_compressor(machine: Machine, option: str, symbol: str) -> bool | None:
    if machine.config is not None:
        return machine.config.get(option) == "y"
    return None if machine.symbols is None else symbol in machine.symbols


def _has_nbd(machine: Machine) -> bool:
    return machine.nbd_family if machine.nbd_loaded else bool(machine.nbd_loadable)


def _fuse_lacks(machine: Machine) -> str:
    """What the fuse back end lacks; ''  where nothing."""
    lacks = [*machine.missing_programs]
    if not machine.fuse_known and not machine.fuse_loadable:
        lacks.append("/dev/fuse" if machine.fuse_loadable is False else "/dev/fuse, or modprobe to load it")
    return ", ".join(lacks)


def _nbd(machine: Machine) -> Iterator[Finding]:
    if not _has_nbd(machine):
        level = Level.BAD if _fuse_lacks(machine) else Level.WARNING
        only = "" if _fuse_lacks(machine) else "; there is fuse, whose mounts end with their daemon"
        if machine.nbd_loaded:
            yield Finding(
                level,
                "nbd",
                f"the driver shows no netlink interface here{only}",
                "run in the host's network namespace, with Linux 4.12 or newer",
            )
        elif machine.nbd_loadable is None:
            yield Finding(
                Level.UNKNOWN if level is Level.WARNING else level,
                "nbd",
                f"not loaded, and whether there is a module cannot be told without modprobe{only}",
                "install kmod",
            )
        else:
            yield Finding(
                level,
                "nbd",
                f"this kernel ({machine.release}) has no nbd driver{only}",
                "install the kernel's full package of modules",
            )
        return
    if not machine.nbd_loaded:
        yield Finding(Level.OK, "nbd", "its module is not loaded yet; the first mount does so")
        return
    yield Finding(
        Level.OK,
        "nbd",
        f"devices connected: {machine.nbd_connected}, free: {machine.nbd_free}; more are made as they are "
        "needed, whatever nbds_max is",
    )
    if machine.max_part:
        yield Finding(
            Level.WARNING,
            "nbd",
            f"max_part is {machine.max_part}: the driver looks for partitions, which are reads of each new "
            "device",
            "options nbd max_part=0 in /etc/modprobe.d (etc/ has such a file), then modprobe -r nbd",
        )


def _fuse(machine: Machine) -> Finding:
    lacks = _fuse_lacks(machine)
    if lacks:
        if _has_nbd(machine):
            return Finding(Level.OK, "fuse", f"not usable (missing: {lacks}), nor needed: there is nbd")
        return Finding(Level.BAD, "fuse", f"missing: {lacks}", "install libnbd-bin, fuse3 and kmod (Debian)")
    if machine.config is None:
        how = "whether EROFS mounts its files or takes a loop device cannot be told"
    elif machine.config.get(BACKED_BY_FILE) == "y":
        how = "EROFS mounts its files"
    else:
        how = "EROFS takes its files through loop devices"
    return Finding(Level.OK, "fuse", f"with nbdfuse; {how}")


def _cache(place: Place) -> Finding:
    what = f"{place.path}, on {place.filesystem or 'a file system that has no name here'}"
    if place.problem:
        return Finding(
            Level.BAD, "cache", f"{place.path}: {place.problem}", "choose another with --cache-dir"
        )
    if place.filesystem in SHARED:
        return Finding(
            Level.WARNING,
            "cache",
            f"{what}: a cache is for the processes of one running system",
            "choose a directory on a disk of this machine, with --cache-dir",
        )
    if place.room <= 0:
        return Finding(
            Level.WARNING,
            "cache",
            f"{what}: no room, so what is read is not kept",
            "make room on the disk, or choose another with --cache-dir",
        )
    if place.is_sparse is False:
        return Finding(
            Level.WARNING,
            "cache",
            f"{what}, which has no holes: each blob takes all of its size at once",
            "choose another with --cache-dir",
        )
    room = f"room for {place.room / (1 << 30):.1f} GiB"
    if place.room < SCARCE:
        return Finding(
            Level.WARNING, "cache", f"{what}: only {room}", "make room on the disk, or choose another"
        )
    return Finding(Level.OK, "cache", f"{what}: {room}" + ("" if place.is_there else "; made when needed"))


def _state(place: Place) -> Finding:
    if place.problem:
        return Finding(
            Level.BAD, "state", f"{place.path}: {place.problem}", "choose another with --state-dir"
        )
    if len(place.path.encode("utf-8", "surrogateescape")) + SOCKET_BELOW > LONGEST_SOCKET_PATH:
        return Finding(
            Level.WARNING,
            "state",
            f"{place.path} is too long a path for the sockets of the fuse back end in it",
            "choose a shorter one with --state-dir",
        )
    if place.filesystem in IN_MEMORY:
        where = f"{place.path}, on {place.filesystem}: it ends with this boot, as what is on record does"
    else:
        where = f"{place.path}, on {place.filesystem or '?'}: records of earlier boots stay, and do no harm"
    return Finding(Level.OK, "state", where + ("" if place.is_there else "; made when needed"))


def _unit(machine: Machine) -> Finding:
    if not machine.has_systemd:
        return Finding(Level.OK, "systemd", "it does not run here")
    if not machine.unit:
        return Finding(
            Level.WARNING,
            "systemd",
            "the unit erofs-nbd@.service is not installed: nobody starts daemons again that were killed",
            "install -D -m 644 etc/systemd/erofs-nbd@.service /etc/systemd/system/erofs-nbd@.service",
        )
    if machine.unit_program:
        return Finding(
            Level.BAD,
            "systemd",
            f"{machine.unit} starts {machine.unit_program}, which is not there",
            "install the program there, or change ExecStart= (systemctl edit --full erofs-nbd@.service)",
        )
    return Finding(Level.OK, "systemd", machine.unit)


def _udev(machine: Machine) -> Iterator[Finding]:
    if machine.has_udev and _has_nbd(machine):
        if machine.udev_rule:
            yield Finding(Level.OK, "udev", machine.udev_rule)
        else:
            yield Finding(
                Level.WARNING,
                "udev",
                "no rule keeps it from looking into our devices, which are requests to the registry",
                "install -D -m 644 etc/udev/60-erofs-twisted.rules /etc/udev/rules.d/60-erofs-twisted.rules",
            )
