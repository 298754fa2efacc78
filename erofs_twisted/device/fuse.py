"""Exports as files, for kernels without nbd: nbdfuse shows an export as a file, and EROFS mounts that."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import platform
import tempfile
import time
from collections.abc import Mapping, MutableMapping
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import attrs
from twisted.internet.defer import CancelledError, Deferred, TimeoutError, maybeDeferred
from twisted.logger import Logger
from twisted.python.threadpool import ThreadPool
from zope.interface import implementer

from erofs_twisted.device.loop import LoopDevice, open_loop
from erofs_twisted.device.machine import knows_filesystem, load_module, may_administer
from erofs_twisted.device.nbdfuse import NBDFuse, missing_programs
from erofs_twisted.errors import MountError
from erofs_twisted.interfaces import (
    Connected,
    HandedDevice,
    IBlockDevice,
    IDeviceConnector,
    IExport,
    INBDServer,
)
from erofs_twisted.syscalls import MNT_EXPIRE, UMOUNT_NOFOLLOW, in_thread, in_thread_to_its_end, mount, umount

BLOCK_SIZE = 4096
LONGEST_SOCKET_PATH = 107
PREFIX = "fuse-"
NOT_MOUNTED = (errno.EINVAL, errno.ENOENT)
"""What umount2(2) says of a file that is no mount point, or is not there."""

DIRECTORY, LOCK, LOOP = "directory", "lock", "loop"
"""What another process is told of a device, and has open of it, by these names."""

POLL = 0.02
PATIENCE = 10.0
"""Seconds: for nbdfuse to show the file, and for the kernel to let go of it."""


@attrs.frozen(kw_only=True)
class _Left:
    """What there is of a device beside its program: its directory, the descriptor that locks that, and the
    loop device where there is one."""

    directory: Path
    lock: int
    loop: LoopDevice | None

    @property
    def file(self) -> str:
        return str(self.directory / "image")

    @property
    def path(self) -> str:
        return self.file if self.loop is None else self.loop.path

    def handed(self, files: Mapping[str, int]) -> HandedDevice:
        """For another process; ``files`` are those of the program."""
        loop = {} if self.loop is None else {LOOP: self.loop.descriptor}
        return HandedDevice(
            path=self.path, facts={DIRECTORY: str(self.directory)}, files={LOCK: self.lock, **loop, **files}
        )

    @classmethod
    def of(cls, device: HandedDevice) -> _Left:
        """What `handed` said."""
        loop = device.files.get(LOOP)
        return cls(
            directory=Path(device.facts[DIRECTORY]),
            lock=device.files[LOCK],
            loop=None if loop is None else LoopDevice(device.path, loop),
        )


@implementer(IDeviceConnector)
class FuseConnector:
    """The ``fuse`` back end. Each device has a private directory of its own in ``runtime_dir``.

    nbdfuse outlives a daemon that is killed, and serves nobody any more: the next one here ends it. One
    whose daemon has given it up in good order goes on: ``handed`` are such devices, by their paths; what is
    adopted is taken out.
    """

    name = "fuse"

    def __init__(
        self,
        reactor: Any,
        pool: ThreadPool,
        runtime_dir: str,
        handed: MutableMapping[str, HandedDevice] | None = None,
    ) -> None:
        self._reactor = reactor
        self._pool = pool
        self._runtime_dir = runtime_dir
        self._handed = {} if handed is None else handed

    def check(self) -> Deferred[None]:
        return Deferred.fromCoroutine(in_thread(self._reactor, self._pool, _check))

    def connected(self, identifier: str) -> Deferred[list[Connected]]:
        """Those that were handed over: nbdfuse does not outlive a server that is killed, and who reads its
        file gets errors from then on."""
        return Deferred.fromCoroutine(self._connected(identifier))

    async def _connected(self, identifier: str) -> list[Connected]:
        found = []
        for path, device in self._handed.items():
            if device.identifier == identifier and LOCK in device.files:
                left = _Left.of(device)
                is_held = await in_thread(self._reactor, self._pool, _is_held, left.file, left.loop)
                found.append(Connected(path=path, size=device.size, identifier=identifier, is_held=is_held))
        return found

    def adopt(
        self, path: str, export: IExport, server: INBDServer, identifier: str
    ) -> Deferred[IBlockDevice]:
        return Deferred.fromCoroutine(self._adopt(path, export, server))

    async def _adopt(self, path: str, export: IExport, server: INBDServer) -> IBlockDevice:
        handed = self._handed.pop(path)
        device = self._go_on(handed)
        for connection in handed.connections:
            _ = server.go_on(connection, export)
        return device

    def disconnect(self, path: str) -> Deferred[None]:
        return Deferred.fromCoroutine(self._disconnect(path))

    async def _disconnect(self, path: str) -> None:
        handed = self._handed.pop(path)
        await self._go_on(handed).detach()
        for connection in handed.connections:
            connection.sock.close()

    def _go_on(self, handed: HandedDevice) -> FuseDevice:
        left = _Left.of(handed)
        program = NBDFuse(self._reactor)
        undo = AsyncExitStack()
        undo.callback(_remove_directory, left.directory)
        undo.callback(os.close, left.lock)
        undo.push_async_callback(program.end)
        undo.push_async_callback(in_thread_to_its_end, self._reactor, self._pool, _unmount, left.file)
        if left.loop is not None:
            undo.callback(os.close, left.loop.descriptor)
        program.go_on(handed.files)
        return FuseDevice(self._reactor, self._pool, left, program, undo)

    def attach(
        self, export: IExport, server: INBDServer, identifier: str | None = None
    ) -> Deferred[IBlockDevice]:
        return Deferred.fromCoroutine(self._attach(export, server))

    async def _attach(self, export: IExport, server: INBDServer) -> IBlockDevice:
        await in_thread(self._reactor, self._pool, clear_away, self._runtime_dir)
        async with AsyncExitStack() as undo:
            directory, lock = self._make_directory(undo)
            socket, file = str(directory / "socket"), str(directory / "image")
            port = await server.listen(socket, [export])
            undo.push_async_callback(maybeDeferred, port.stopListening)
            program = NBDFuse(self._reactor)
            program.start(socket, file)
            undo.push_async_callback(program.end)
            undo.push_async_callback(in_thread_to_its_end, self._reactor, self._pool, _unmount, file)
            await self._until_ready(program)
            loop, cancelled = await in_thread_to_its_end(
                self._reactor, self._pool, _make_mountable, file, socket, export.size
            )
            if loop is not None:
                undo.callback(os.close, loop.descriptor)
            if cancelled:
                raise CancelledError()
            left = _Left(directory=directory, lock=lock, loop=loop)
            return FuseDevice(self._reactor, self._pool, left, program, undo.pop_all())
        raise AssertionError("an exit stack swallows no exception")

    def _make_directory(self, undo: AsyncExitStack) -> tuple[Path, int]:
        os.makedirs(self._runtime_dir, mode=0o700, exist_ok=True)
        directory = Path(tempfile.mkdtemp(prefix=PREFIX, dir=self._runtime_dir))
        undo.callback(_remove_directory, directory)
        lock = _lock(directory)
        undo.callback(os.close, lock)
        (directory / "image").touch(mode=0o400)
        if len(os.fsencode(directory / "socket")) > LONGEST_SOCKET_PATH:
            raise MountError(
                f"{directory} is too long a path for a UNIX socket in it: take a shorter --state-dir"
            )
        return directory, lock

    async def _until_ready(self, program: NBDFuse) -> None:
        try:
            await program.ready.addTimeout(PATIENCE, self._reactor)
        except TimeoutError as error:
            raise MountError(f"nbdfuse has not shown the image as a file within {PATIENCE:g} s") from error


@implementer(IBlockDevice)
class FuseDevice:
    """A file of nbdfuse's, or the loop device on it where this kernel's EROFS mounts no file."""

    log = Logger()

    def __init__(
        self,
        reactor: Any,
        pool: ThreadPool,
        left: _Left,
        program: NBDFuse,
        undo: AsyncExitStack,
    ) -> None:
        self.path = left.path
        self.lost: Deferred[None] = Deferred()
        self._reactor = reactor
        self._pool = pool
        self._left = left
        self._program = program
        self._undo = undo
        self._detaching = False
        self._ended = program.when_ended().addCallback(self._program_ended)

    def is_held(self) -> Deferred[bool]:
        left = self._left
        return Deferred.fromCoroutine(in_thread(self._reactor, self._pool, _is_held, left.file, left.loop))

    def leave(self) -> HandedDevice:
        handed = self._left.handed(self._program.files())
        self._detaching = True
        return handed

    def detach(self) -> Deferred[None]:
        return Deferred.fromCoroutine(self._detach())

    async def _detach(self) -> None:
        if not self.lost.called and await self.is_held():
            raise MountError(f"{self.path} is still mounted somewhere: unmount that first")
        self._detaching = True
        await self._undo.aclose()

    def _program_ended(self, _: None) -> None:
        if not self._detaching:
            self.log.warn("nbdfuse of {path} has ended, and not by us", path=self.path)
            self.lost.callback(None)


def _check() -> None:
    if not may_administer():
        raise MountError("to mount takes root (CAP_SYS_ADMIN)")
    if missing := missing_programs():
        raise MountError(f"missing: {', '.join(missing)}")
    if not os.path.exists("/dev/fuse"):
        reason = load_module("fuse")
        if not os.path.exists("/dev/fuse"):
            raise MountError(f"there is no /dev/fuse (modprobe fuse: {reason})")
    if not knows_filesystem("erofs"):
        raise MountError(f"this kernel ({platform.release()}) has no erofs, nor a module of it to load")


def _make_mountable(file: str, socket: str, size: int) -> LoopDevice | None:
    """A loop device where EROFS takes no file. Raises `MountError`."""
    shown = os.stat(file).st_size
    if shown != size:
        raise MountError(f"nbdfuse shows {shown} bytes of an image of {size}")
    return None if _mounts_files(socket) else open_loop(file, BLOCK_SIZE)


def _mounts_files(socket: str) -> bool:
    """Has this kernel CONFIG_EROFS_FS_BACKED_BY_FILE?

    Without it EROFS refuses all but block devices, by ENOTBLK. With it EROFS opens what is no block device,
    and to open a socket is ENXIO. So the attempt to mount one tells, and never succeeds."""
    try:
        mount(socket, os.path.dirname(socket), "erofs", 1, "")
    except OSError as error:
        return error.errno != errno.ENOTBLK
    return True


def _is_held(file: str, loop: LoopDevice | None) -> bool:
    if loop is not None:
        try:
            os.close(os.open(loop.path, os.O_RDONLY | os.O_EXCL | os.O_CLOEXEC))
        except OSError as error:
            return error.errno == errno.EBUSY
        return False
    # MNT_EXPIRE marks an unused mount as expired (EAGAIN), and says EBUSY of one in use: EROFS has the file
    # open, whatever mount namespace it is mounted in. Any visit, as that below, takes the mark away again.
    try:
        umount(file, MNT_EXPIRE | UMOUNT_NOFOLLOW)
    except OSError as error:
        if error.errno == errno.EAGAIN:
            os.close(os.open(file, os.O_PATH | os.O_CLOEXEC))
        return error.errno == errno.EBUSY
    return False


def _unmount(file: str) -> None:
    deadline = time.monotonic() + PATIENCE
    while True:
        try:
            return _unmount_unless_used(file)
        except OSError as error:
            # The kernel closes EROFS's file, or the loop device's, a moment after the last user's.
            if error.errno != errno.EBUSY or time.monotonic() > deadline:
                raise MountError(f"{file} cannot be unmounted: {error.strerror}") from error
            time.sleep(POLL)


def clear_away(runtime_dir: str) -> None:
    """Unmount and remove what daemons that were killed left behind, but for what is mounted still."""
    for directory in Path(runtime_dir).glob(f"{PREFIX}*"):
        with contextlib.suppress(OSError):  # in use: by a living daemon, or a mount
            lock = _lock(directory)
            try:
                _unmount_unless_used(str(directory / "image"))
                _remove_directory(directory)
            finally:
                os.close(lock)


def _lock(directory: Path) -> int:
    """Says that ``directory`` is in use as long as the descriptor that it returns is open, which is not
    beyond the life of this process. Raises BlockingIOError where another says so."""
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def _unmount_unless_used(file: str) -> None:
    try:
        umount(file, UMOUNT_NOFOLLOW)
    except OSError as error:
        if error.errno not in NOT_MOUNTED:
            raise


def _remove_directory(directory: Path) -> None:
    for name in ("socket", "image"):
        (directory / name).unlink(missing_ok=True)
    directory.rmdir()
