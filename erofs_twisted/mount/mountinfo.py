"""``/proc/PID/mountinfo`` as values (proc_pid_mountinfo(5))."""

from __future__ import annotations

import re
from collections.abc import Iterable

import attrs

AUTOMOUNT = "autofs"


@attrs.frozen
class Mount:
    """One mount, as one mount namespace sees it. ``device`` is ``major:minor`` of the file system; ``source``
    is what was mounted, as mount(2) was told."""

    mount_id: int
    parent_id: int
    device: str
    root: str
    path: str
    fstype: str
    source: str


def parse_mountinfo(content: bytes) -> list[Mount]:
    """The mounts in the file's order. A line that is not of its form is left out."""
    return [mount for line in content.split(b"\n") if (mount := _parse_line(line)) is not None]


def is_trapped(mounts: Iterable[Mount], path: str) -> bool:
    """Does an automount wait there for somebody who looks?"""
    return any(mount.path == path and mount.fstype == AUTOMOUNT for mount in mounts)


def mount_at(mounts: Iterable[Mount], path: str) -> Mount | None:
    """The mount that ``path``, absolute and free of symbolic links, leads to: the topmost of those there. The
    trap of an automount is none."""
    stacked = [mount for mount in mounts if mount.path == path and mount.fstype != AUTOMOUNT]
    covered = {mount.parent_id for mount in stacked}
    on_top = [mount for mount in stacked if mount.mount_id not in covered]
    return on_top[-1] if on_top else None


def mounts_below(mounts: Iterable[Mount], mount_id: int) -> list[Mount]:
    """The mounts that stand directly on this one."""
    return [mount for mount in mounts if mount.parent_id == mount_id != mount.mount_id]


def _parse_line(line: bytes) -> Mount | None:
    # ID PARENT MAJOR:MINOR ROOT PATH OPTIONS [OPTIONAL…] - TYPE SOURCE SUPER-OPTIONS
    fields = line.split(b" ")
    try:
        separator = fields.index(b"-", 6)
        mount_id, parent_id = int(fields[0]), int(fields[1])
        device, root, path = map(_unescape, fields[2:5])
        fstype, source = map(_unescape, fields[separator + 1 : separator + 3])
    except ValueError:
        return None
    return Mount(mount_id, parent_id, device, root, path, fstype, source)


def _unescape(field: bytes) -> str:
    """The kernel writes space, tab, newline, backslash and ``#`` as three octal digits."""
    plain = re.sub(rb"\\([0-3][0-7]{2})", lambda match: bytes([int(match[1], 8)]), field)
    return plain.decode("utf-8", "surrogateescape")
