"""What daemons have left, and what is to be said of it. Nothing is looked at or done here."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, Sequence

import attrs

from erofs_twisted.doctor.finding import Act, Finding, Level, Repair
from erofs_twisted.mount.mountinfo import Mount, mount_at
from erofs_twisted.state.records import MountRecord, Status, record_name
from erofs_twisted.state.takeover import Plan, Step

FUSE_FILE = re.compile(r"(.+)/([^/]+)/(fuse-[^/]+)/image")
OURS = re.compile(r"application/vnd\.erofs\S* (?:sha256|sha512):[0-9a-f]{64,} (\S+)")
"""What a device says of a server of ours, where no --nbd-backend-identifier was given."""


def name_in(identifier: str) -> str:
    """The mount's own name in what a device says of its server; '' where that is not our way to say it."""
    found = OURS.fullmatch(identifier)
    return found[1] if found else ""


@attrs.frozen(kw_only=True)
class OnRecord:
    """``plan`` is for a mount that no daemon serves; None where none can be made: ``problem`` tells why.
    ``is_stopped``: its daemon is there, but does not run (SIGSTOP)."""

    record: MountRecord
    is_served: bool
    is_stopped: bool = False
    plan: Plan | None = None
    problem: str = ""


@attrs.frozen(kw_only=True)
class Device:
    """An nbd device that is connected, and says that its server is ours.

    ``is_bound``: nobody has told it to disconnect. ``is_held``: it is mounted, in whatever mount namespace,
    or claimed otherwise; ``users`` are processes that have it open. ``daemon`` is a process that keeps a
    directory of the mount's name, as only its daemon does; 0 where there is none to be seen.
    """

    path: str
    identifier: str
    is_bound: bool
    is_held: bool
    users: tuple[str, ...] = ()
    daemon: int = 0


@attrs.frozen(kw_only=True)
class FuseDirectory:
    """Where nbdfuse shows an image as a file. ``is_served`` is None where the directory has gone, or cannot
    be read."""

    path: str
    is_served: bool | None


@attrs.frozen(kw_only=True)
class Damaged:
    """A record that cannot be read; ``is_aside``: a daemon has found that out, and begun another.
    ``is_held``: the daemon that wrote it runs."""

    path: str
    reason: str
    is_aside: bool
    is_held: bool


@attrs.frozen(kw_only=True)
class Pidfile:
    """``command`` is that of the process that it names, '' where there is none."""

    path: str
    pid: int
    command: str
    is_twistd: bool


@attrs.frozen(kw_only=True)
class Remains:
    """What there is.

    ``devices`` is None where it takes root to tell. ``connected`` are the nbd devices with a connection,
    whosever. ``backing`` has the files of loop devices. ``vacant`` are directories of mounts with nothing in
    them that no daemon holds, ``sockets`` those that nobody listens on.
    """

    state_dir: str
    boot: str
    records: Sequence[OnRecord] = ()
    damaged: Sequence[Damaged] = ()
    devices: Sequence[Device] | None = ()
    connected: frozenset[str] = frozenset()
    mounts: Sequence[Mount] = ()
    backing: Mapping[str, str] = attrs.field(factory=dict)
    fuse: Sequence[FuseDirectory] = ()
    vacant: Sequence[str] = ()
    sockets: Sequence[str] = ()
    pidfiles: Sequence[Pidfile] = ()


def findings_of(remains: Remains) -> list[Finding]:
    """All there is to say of them."""
    found = [
        *(_of_record(remains, each) for each in remains.records),
        *_of_devices(remains),
        *_of_lost_mounts(remains),
        *_of_fuse_mounts(remains),
        *_of_files(remains),
    ]
    return found or [Finding(Level.OK, "mounts", f"none is on record in {remains.state_dir}")]


def _of_record(remains: Remains, each: OnRecord) -> Finding:
    record = each.record
    where = record.mountpoint
    if each.is_stopped:
        return Finding(
            Level.BAD,
            where,
            f"its daemon (process {record.pid}) was stopped, and who reads the mount waits",
            f"kill -CONT {record.pid}",
        )
    if each.is_served:
        if record.status is Status.STOPPING and record.reason:
            return Finding(
                Level.WARNING,
                where,
                f"process {record.pid} was told to stop, and waits: {record.reason}",
                f"end what uses it, or erofs-nbd umount --lazy {where}",
            )
        return Finding(Level.OK, where, f"{record.image}, served by process {record.pid} ({record.status})")
    died = f"its daemon (process {record.pid}) has died"
    if each.plan is None:
        is_unknown = remains.devices is None
        return Finding(
            Level.UNKNOWN if is_unknown else Level.BAD,
            where,
            f"{died}; {each.problem}",
            "run as root" if is_unknown else "then ask again",
        )
    return _of_dead_record(remains, record, each.plan, died)


def _of_dead_record(remains: Remains, record: MountRecord, plan: Plan, died: str) -> Finding:
    where, steps = record.mountpoint, plan.steps
    forget = Repair(act=Act.FORGET, target=where)
    if Step.FORGET in steps and record.boot:
        return Finding(
            Level.WARNING,
            where,
            "it is on record from before the machine's restart",
            f"erofs-nbd umount {where} forgets it",
            (forget,),
        )
    device = _device_at(remains, plan.device)
    in_use = device is not None and (device.is_held or bool(device.users))
    if Step.KEEP in steps:
        return Finding(
            Level.BAD,
            where,
            f"{died}, and who reads the mount waits",
            f"erofs-nbd reattach {where}, or erofs-nbd umount --lazy {where}",
            (Repair(act=Act.REATTACH, target=where),),
        )
    if Step.ADOPT in steps and in_use:
        what_then = "until that ends" if Step.LINGER in steps else "and mounts it here again"
        return Finding(
            Level.BAD,
            where,
            f"{died}; {plan.device} is not mounted here, but in use, and who reads it waits",
            f"erofs-nbd reattach {where} serves it, {what_then}",
        )
    if (Step.ADOPT in steps or Step.DISCONNECT in steps) and not in_use:
        return Finding(
            Level.BAD,
            where,
            f"{died}; {plan.device} is connected, and nothing uses it",
            f"erofs-nbd reattach {where} mounts it; --fix disconnects it",
            (Repair(act=Act.DISCONNECT, target=plan.device, identifier=record.identifier), forget),
        )
    if Step.UNMOUNT in steps:
        return Finding(
            Level.BAD,
            where,
            f"{died}, and {record.device} is gone: reads of the mount fail",
            f"erofs-nbd umount --lazy {where}",
            (*_unmount(remains, mount_at(remains.mounts, where)), forget),
        )
    if (kept := _device_of(remains, record)) is not None:
        return Finding(
            Level.BAD,
            where,
            f"{died}; {kept.path} is in use elsewhere, and something else is mounted on {where}",
            f"unmount {where}, then erofs-nbd reattach {where}",
        )
    if record.status is Status.FAILED:
        return Finding(
            Level.WARNING,
            where,
            f"it was not mounted: {record.reason}",
            f"start it again, or forget it: erofs-nbd umount {where}",
            (forget,),
        )
    return Finding(
        Level.WARNING, where, f"{died}, and left nothing", f"erofs-nbd umount {where} forgets it", (forget,)
    )


def _of_devices(remains: Remains) -> Iterator[Finding]:
    if remains.devices is None:
        yield Finding(
            Level.UNKNOWN,
            "devices",
            "whose nbd devices are and who uses them takes root to tell",
            "run as root",
        )
        return
    for device in remains.devices:
        if not any(_is_of(device, each.record, remains.boot) for each in remains.records):
            yield _of_device(remains, device)


def _of_device(remains: Remains, device: Device) -> Finding:
    """One that is not on record here."""
    name = name_in(device.identifier)
    mount = next((m for m in remains.mounts if m.source == device.path and m.fstype == "erofs"), None)
    if device.daemon:
        return Finding(
            Level.OK, device.path, f"served by process {device.daemon}, on record in another --state-dir"
        )
    is_ours = mount is not None and record_name(mount.path) == name
    users = ", ".join(device.users) or "another mount namespace, or a file that is open"
    if not device.is_bound:
        if mount is not None:
            return Finding(
                Level.BAD,
                mount.path,
                f"{device.path} was disconnected: reads of the mount fail",
                f"umount -l {mount.path}",
                _unmount(remains, mount) if is_ours else (),
            )
        return Finding(
            Level.BAD,
            device.path,
            f"it was disconnected, but is still in use ({users}): reads fail",
            "it is free when that ends",
        )
    if mount is not None:
        return Finding(
            Level.BAD,
            mount.path,
            f"no daemon is to be seen that serves {device.path}, and none is on record: who reads it waits",
            f"umount -l {mount.path}, then nbd-client -d {device.path}; --state-dir names another record",
        )
    if device.is_held or device.users:
        return Finding(
            Level.BAD,
            device.path,
            f"no daemon is to be seen that serves it, but it is in use ({users})",
            f"end that, then nbd-client -d {device.path}; --state-dir names another record",
        )
    return Finding(
        Level.BAD,
        device.path,
        "it is connected, but nobody serves it, and nothing uses it",
        f"nbd-client -d {device.path}",
        (Repair(act=Act.DISCONNECT, target=device.path, identifier=device.identifier),),
    )


def _of_lost_mounts(remains: Remains) -> Iterator[Finding]:
    """On nbd devices that have no connection at all, so that nobody can tell whose they were."""
    for mount in remains.mounts:
        is_nbd = mount.fstype == "erofs" and re.fullmatch(r"/dev/nbd\d+", mount.source)
        if not is_nbd or mount.source in remains.connected or _on_record(remains, mount.path):
            continue
        yield Finding(
            Level.BAD,
            mount.path,
            f"{mount.source} is not connected: reads of the mount fail",
            f"umount -l {mount.path}, if it is not another program's",
        )


def _of_fuse_mounts(remains: Remains) -> Iterator[Finding]:
    served = {each.path: each.is_served for each in remains.fuse}
    for mount in remains.mounts:
        found = FUSE_FILE.fullmatch(remains.backing.get(mount.source, mount.source))
        if mount.fstype != "erofs" or found is None or found[2] != record_name(mount.path):
            continue
        directory = os.path.dirname(found[0])
        if _on_record(remains, mount.path) or served.get(directory):
            continue
        state_dir = found[1]
        if served.get(directory) is None:
            yield Finding(
                Level.UNKNOWN,
                mount.path,
                f"{directory} is not there, or not to be read, so nobody can tell who serves the mount",
                f"if reads of it fail: umount -l {mount.path}",
            )
        elif state_dir != remains.state_dir:
            yield Finding(
                Level.BAD,
                mount.path,
                "nobody serves its file: reads of the mount fail",
                f"erofs-nbd doctor --state-dir {state_dir}",
            )
        else:
            unmount = _unmount(remains, mount)
            clear = Repair(act=Act.CLEAR, target=os.path.dirname(directory))
            yield Finding(
                Level.BAD,
                mount.path,
                "nobody serves its file, and it is not on record: reads of the mount fail",
                f"umount -l {mount.path}",
                (*unmount, clear) if unmount else (),
            )


def _of_files(remains: Remains) -> Iterator[Finding]:
    for damaged in remains.damaged:
        what = "a record that was set aside" if damaged.is_aside else "a record that cannot be read"
        if damaged.is_held:
            cure = "its daemon runs: unmount, or wait until it ends"
        else:
            cure = "look at it, and remove it: what its daemon may have left is not found by it"
        yield Finding(Level.WARNING, damaged.path, f"{what}: {damaged.reason}", cure)
    # What is in the directory of a mount that has died goes with its record.
    dead = {
        os.path.join(remains.state_dir, record_name(each.record.mountpoint))
        for each in remains.records
        if not each.is_served
    }
    mounted = {os.path.dirname(remains.backing.get(m.source, m.source)) for m in remains.mounts}
    for each in remains.fuse:
        home = os.path.dirname(each.path)
        is_here = os.path.dirname(home) == remains.state_dir
        if each.is_served is False and is_here and home not in dead and each.path not in mounted:
            yield Finding(
                Level.WARNING,
                each.path,
                "left by a daemon of the fuse back end that was killed",
                "the next mount there removes it",
                (Repair(act=Act.CLEAR, target=home),),
            )
    for path in remains.vacant:
        yield Finding(
            Level.WARNING,
            path,
            "a mount's directory with nothing in it",
            f"rmdir {path}",
            (Repair(act=Act.CLEAR, target=path),),
        )
    for path in remains.sockets:
        if os.path.dirname(path) not in dead:
            yield Finding(
                Level.WARNING,
                path,
                "a socket that nobody listens on",
                f"rm {path}",
                (Repair(act=Act.UNLINK, target=path),),
            )
    for pidfile in remains.pidfiles:
        if not pidfile.command:
            yield Finding(
                Level.WARNING,
                pidfile.path,
                f"process {pidfile.pid}, which it names, does not run",
                f"twistd removes it when it starts again, or rm {pidfile.path}",
            )
        elif not pidfile.is_twistd:
            yield Finding(
                Level.WARNING,
                pidfile.path,
                f"process {pidfile.pid}, which it names, is another program: {pidfile.command}",
                f"rm {pidfile.path}: with it, twistd refuses to start",
            )


def _device_at(remains: Remains, path: str) -> Device | None:
    return next((device for device in remains.devices or () if path and device.path == path), None)


def _device_of(remains: Remains, record: MountRecord) -> Device | None:
    return next((d for d in remains.devices or () if _is_of(d, record, remains.boot)), None)


def _is_of(device: Device, record: MountRecord, boot: str) -> bool:
    return (
        record.boot == boot
        and bool(record.identifier)
        and record.identifier == device.identifier
        and record.device in ("", device.path)
    )


def _on_record(remains: Remains, path: str) -> bool:
    return any(each.record.mountpoint == path for each in remains.records)


def _unmount(remains: Remains, mount: Mount | None) -> tuple[Repair, ...]:
    """Nothing where something is mounted over it."""
    if mount is None or mount_at(remains.mounts, mount.path) != mount:
        return ()
    return (Repair(act=Act.UNMOUNT, target=mount.path, mount_id=mount.mount_id, source=mount.source),)
