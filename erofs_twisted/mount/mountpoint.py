"""The directory that an image is mounted on, from before the mount until after it."""

from __future__ import annotations

import errno
import os
import platform
from contextlib import suppress
from pathlib import Path
from typing import Any

from twisted.internet.defer import CancelledError
from twisted.logger import Logger
from twisted.python.threadpool import ThreadPool

from erofs_twisted.errors import MountError
from erofs_twisted.mount.holders import Holder, find_holders
from erofs_twisted.mount.mountinfo import Mount, mount_at, mounts_below, parse_mountinfo
from erofs_twisted.mount.options import MountOptions
from erofs_twisted.syscalls import MNT_DETACH, UMOUNT_NOFOLLOW, in_thread, in_thread_to_its_end, mount, umount

MOUNTINFO = Path("/proc/self/mountinfo")


class Busy(MountError):
    """A mount cannot be unmounted, for ``holders`` use it, or other mounts stand on it."""

    def __init__(self, path: str, holders: list[Holder], below: list[str]) -> None:
        users = [*map(str, holders), *(f"the mount on {other}" for other in below)]
        super().__init__(f"{path} is in use by {', '.join(users) or 'something that /proc does not show'}")
        self.holders = holders


class Mountpoint:
    """One directory. Whatever may touch the file system mounted on it runs in a thread of ``pool``.

    ``path`` is as given until `check` or `mount` has run, and free of symbolic links from then on. Where a
    lookup of it would wait for what is to be mounted there, as one of an automount does, ``reach`` is another
    way to the directory, a file below /proc that somebody has open; ``path`` has no symbolic links then.
    """

    log = Logger()

    def __init__(self, reactor: Any, pool: ThreadPool, path: str, reach: str = "") -> None:
        self.path = path
        self.reach = reach
        self._reactor = reactor
        self._pool = pool
        self._made = False
        self._mount_id: int | None = None

    async def check(self, make: bool = False) -> None:
        """See that it can be mounted on: a directory, and no mount point already. ``make`` makes it where it
        is missing. Raises `MountError`."""
        (self.path, self._made), cancelled = await in_thread_to_its_end(
            self._reactor, self._pool, _prepare, self.path, self.reach, make
        )
        if cancelled:
            await self.remove_if_made()
            raise CancelledError()

    async def mount(self, source: str, fstype: str, options: MountOptions) -> None:
        """Mount ``source`` here. Raises `MountError`.

        mount(2) cannot be called off: when cancelled, this waits for it to end, and undoes it."""
        self._mount_id, cancelled = await in_thread_to_its_end(
            self._reactor, self._pool, _mount, source, self.path, self.reach, fstype, options
        )
        if cancelled:
            await self.unmount(lazy=True)
            raise CancelledError()

    async def unmount(self, lazy: bool = False) -> None:
        """Unmount what `mount` mounted; without a `mount` of ours, what is on top here. Where that has gone
        already, there is nothing to do. ``lazy`` takes it out of the directory tree at once, while its users
        keep it. Raises `Busy`, or another `MountError`."""
        await in_thread_to_its_end(self._reactor, self._pool, _unmount, self.path, self._mount_id, lazy)

    @property
    def mount_id(self) -> int:
        """Of the mount that is ours; 0 where there is none."""
        return self._mount_id or 0

    async def there(self) -> Mount | None:
        """What is mounted here, on top; None where nothing is."""
        return mount_at(await in_thread(self._reactor, self._pool, mounts_here), self.path)

    async def is_missing(self) -> bool:
        """Is there nothing of that name?"""
        return not self.reach and not await in_thread(self._reactor, self._pool, os.path.lexists, self.path)

    def adopt(self, mount_id: int, made: bool) -> None:
        """An earlier process has mounted that, unless it is 0, and ``made`` the directory."""
        self._mount_id = mount_id or None
        self._made = self._made or made

    async def holders(self) -> list[Holder]:
        """The processes that use what is mounted here."""
        return await in_thread(self._reactor, self._pool, _holders, self.path)

    async def remove_if_made(self) -> None:
        """Remove the directory, if it was made for this and is still empty."""
        if self._made:
            self._made = False
            try:
                await in_thread(self._reactor, self._pool, os.rmdir, self.path)
            except OSError as error:
                self.log.warn("{path} stays: {reason}", path=self.path, reason=error.strerror)


def mounts_here() -> list[Mount]:
    """All mounts of this mount namespace. It blocks."""
    return parse_mountinfo(MOUNTINFO.read_bytes())


def remove_empty(path: str) -> None:
    """Remove a directory, unless something is in it, or mounted on it. It blocks."""
    with suppress(OSError):
        os.rmdir(path)


def _prepare(path: str, reach: str, make: bool) -> tuple[str, bool]:
    made = False
    try:
        if reach:
            if os.readlink(reach) != path or not os.path.isdir(reach):
                raise MountError(f"{reach} is not the directory {path}")
            return path, False
        if make and not os.path.lexists(path):
            os.mkdir(path, 0o755)
            made = True
        path = os.path.realpath(path, strict=True)
        if not os.path.isdir(path):
            raise MountError(f"{path} is not a directory, so nothing can be mounted on it")
    except FileNotFoundError as error:
        missing = os.path.dirname(path) if make else path
        cure = "make it first" if make else "make it first, or let --mkdir do so"
        raise MountError(f"there is no directory {missing}: {cure}") from error
    except OSError as error:
        raise MountError(f"{path} cannot be mounted on: {error.strerror}") from error
    if (there := mount_at(mounts_here(), path)) is not None:
        raise MountError(
            f"{path} is a mount point already, of {there.source} (type {there.fstype}): unmount that first, "
            "or take another directory"
        )
    return path, made


def _mount(source: str, path: str, reach: str, fstype: str, options: MountOptions) -> int:
    """The new mount's id; 0, which no mount has, if somebody has unmounted it already."""
    try:
        mount(source, reach or path, fstype, options.flags, options.data)
    except OSError as error:
        raise MountError(
            f"the kernel cannot mount {source} on {path} (type {fstype}): {error.strerror}"
            f"{_explain(error.errno or 0, fstype)}"
        ) from error
    there = mount_at(mounts_here(), path)
    return there.mount_id if there is not None else 0


def _explain(number: int, fstype: str) -> str:
    kernel = f"this kernel ({platform.release()})"
    dmesg = f"; dmesg has its reason (dmesg | grep {fstype})"
    match number:
        case errno.EPERM | errno.EACCES:
            return "; it takes root (CAP_SYS_ADMIN)"
        case errno.ENODEV:
            return f"; {kernel} has no {fstype}: it takes CONFIG_{fstype.upper()}_FS, or modprobe {fstype}"
        case errno.ENOTBLK:
            return f"; {kernel} mounts no regular file: it takes CONFIG_{fstype.upper()}_FS_BACKED_BY_FILE"
        case errno.EINVAL:
            return f"; the image is damaged, or has a feature or an option that {kernel} does not know{dmesg}"
        case errno.EOPNOTSUPP:
            return f"; the image is compressed or laid out in a way that {kernel} does not support{dmesg}"
        case errno.EUCLEAN:
            return f"; the image is damaged{dmesg}"
        case errno.EIO:
            return "; it could not be read: the lines above in this log say why"
        case errno.EBUSY:
            return "; it is mounted there already, or in use otherwise"
        case _:
            return dmesg


def _unmount(path: str, mount_id: int | None, lazy: bool) -> None:
    mounts = mounts_here()
    top = mount_at(mounts, path)
    stacked = {there.mount_id for there in mounts if there.path == path}
    if top is None or mount_id not in {None, *stacked}:
        return
    if mount_id not in {None, top.mount_id}:
        raise MountError(f"{path}: {top.source} (type {top.fstype}) is mounted over it: unmount that first")
    try:
        umount(path, UMOUNT_NOFOLLOW | (MNT_DETACH if lazy else 0))
    except OSError as error:
        if error.errno == errno.EBUSY:
            below = [other.path for other in mounts_below(mounts, top.mount_id)]
            raise Busy(path, find_holders(top), below) from error
        if error.errno != errno.EINVAL:  # EINVAL: somebody else was faster
            raise MountError(f"{path} cannot be unmounted: {error.strerror}") from error


def _holders(path: str) -> list[Holder]:
    there = mount_at(mounts_here(), path)
    return [] if there is None else find_holders(there)
