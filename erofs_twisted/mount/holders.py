"""Which processes keep a mount busy."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path

import attrs

from erofs_twisted.mount.mountinfo import Mount

MNT_ID = re.compile(rb"^mnt_id:\s*(\d+)", re.MULTILINE)


@attrs.frozen(order=True)
class Holder:
    """A process that has its directory, its root, its program, an open file or a mapped file on a mount."""

    pid: int
    command: str

    def __str__(self) -> str:
        return f"{self.command} (process {self.pid})"


def find_holders(mount: Mount, proc: Path = Path("/proc")) -> list[Holder]:
    """The processes that use ``mount``, by process number, as far as we may look.

    Asks only procfs: the mounted file system, which may be the thing that is stuck, is never touched.
    """
    return sorted(
        Holder(int(process.name), _command(process))
        for process in proc.iterdir()
        if process.name.isdigit() and _holds(process, mount)
    )


def _holds(process: Path, mount: Mount) -> bool:
    try:
        return mount.mount_id in _mount_ids(process) or _maps_a_file_of(process, mount.device)
    except (FileNotFoundError, ProcessLookupError, PermissionError):
        return False


def _mount_ids(process: Path) -> Iterator[int]:
    for name in ("cwd", "root", "exe"):
        try:
            # Such a link of procfs leads to the very file, without a walk along its path.
            descriptor = os.open(process / name, os.O_PATH)
        except OSError:
            continue
        try:
            yield from _mount_id(Path("/proc/self/fdinfo", str(descriptor)))
        finally:
            os.close(descriptor)
    for descriptor_info in (process / "fdinfo").iterdir():
        yield from _mount_id(descriptor_info)


def _mount_id(descriptor_info: Path) -> Iterator[int]:
    try:
        found = MNT_ID.search(descriptor_info.read_bytes())
    except (FileNotFoundError, ProcessLookupError):
        return
    if found:
        yield int(found[1])


def _maps_a_file_of(process: Path, device: str) -> bool:
    major, _, minor = device.partition(":")
    wanted = f"{int(major):02x}:{int(minor):02x}".encode()
    lines = (process / "maps").read_bytes().splitlines()
    return any(line.split(b" ", 4)[3] == wanted for line in lines)


def _command(process: Path) -> str:
    try:
        return (process / "comm").read_text(errors="replace").strip()
    except OSError:
        return "a process that has ended"
