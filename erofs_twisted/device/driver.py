"""The kernel's nbd driver, by netlink and sysfs. Its calls block: not for the reactor's thread."""

from __future__ import annotations

import errno
import os
import platform
import select
import socket
import stat
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import attrs

from erofs_twisted.device.machine import load_module, may_administer
from erofs_twisted.device.netlink import GenericNetlink
from erofs_twisted.device.uapi import (
    FAMILY,
    VERSION,
    Command,
    Connection,
    encode_index,
    encode_reconfigure,
    parse_index,
)
from erofs_twisted.errors import MountError
from erofs_twisted.interfaces import Connected

SECTOR = 512
POLL = 0.005
"""Seconds between two looks at sysfs, which has no other way to tell: a look takes some 20 µs."""

PATIENCE = 10.0
"""Seconds that the driver may take for what it does in the background."""

SETTLED = 0.001
"""Seconds after which it has not dropped a socket that it was given: it does that before its call returns."""


@attrs.frozen
class Attached:
    """A connected device. ``connection`` tells it from a later one that was given the same index, see
    `_connection`. ``made_node``: we made the node at ``path``."""

    index: int
    path: str
    connection: int
    made_node: bool


@attrs.frozen
class Reconnected:
    """A device whose server has died, and ``sock``, the end for a new one. Requests wait in it."""

    attached: Attached
    sock: socket.socket


class NBDDriver:
    """Devices of ``/sys/block/nbdN``, with their nodes at ``/dev/nbdN``.

    Where nothing makes nodes, as in a container with a /dev of its own, `attach` makes the node and `detach`
    removes it.
    """

    def check(self) -> None:
        """Load the driver if it is missing. Raises `MountError` with what this machine lacks."""
        if not may_administer():
            raise MountError("nbd devices need root (CAP_SYS_ADMIN)")
        if not Path("/sys/module/nbd").exists():
            # Without max_part=0 the driver looks for a partition table on each new device: reads at both ends
            # of an image, which has none.
            reason = load_module("nbd", "max_part=0")
            if not Path("/sys/module/nbd").exists():
                raise MountError(
                    f"this kernel ({platform.release()}) has no nbd driver (modprobe nbd: {reason}): "
                    "install the kernel's full package of modules, or use the fuse back end"
                )

    def attach(self, connection: Connection, queue: dict[str, int]) -> Attached:
        """Connect an unused device, and wait until it has its size. ``queue`` is written to the device's
        ``queue/`` directory in sysfs, in its order. Raises `MountError`, with nothing left attached."""
        index = _connect(connection)
        try:
            device = _sysfs(index)
            _wait_until(lambda: _is_ready(device, connection.size), f"{device.name} does not get its size")
            for name, value in queue.items():
                _set(device / "queue" / name, value)
            path, made_node = _find_node(device)
            return Attached(index, path, _connection(device), made_node)
        except BaseException:
            _disconnect(index)
            raise

    def reconnect(self, path: str, identifier: str, patience: float = PATIENCE) -> Reconnected:
        """Give a device whose server has died a new socket. The driver drops it, and says nothing of that, as
        long as it does not know that the old one is dead: then another follows. Raises `MountError`."""
        deadline = time.monotonic() + patience
        while True:
            ours, kernels = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
            with kernels:
                try:
                    attached = self.reconfigure(path, [kernels.fileno()], identifier)
                except MountError:
                    ours.close()
                    raise
            if not _was_dropped(ours):
                return Reconnected(attached, ours)
            ours.close()
            if time.monotonic() > deadline:
                raise MountError(
                    f"{path} is served by somebody else, or the nbd driver does not take it back"
                )
            time.sleep(POLL)

    def reconfigure(self, path: str, sockets: Sequence[int], identifier: str) -> Attached:
        """One attempt to `reconnect`."""
        attached = self.find(path)
        _, made_node = _find_node(_sysfs(attached.index))
        attached = attrs.evolve(attached, made_node=made_node)
        try:
            _request(Command.RECONFIGURE, encode_reconfigure(attached.index, sockets, identifier))
        except OSError as error:
            raise MountError(f"the nbd driver does not take {path} back: {error.strerror}") from error
        return attached

    def set_up(self, attached: Attached, queue: dict[str, int]) -> None:
        """Write what `attach` writes, where it differs; one that was killed may not have come to it. Only as
        long as nothing uses the device: the kernel may wait for requests under way. Raises `MountError`."""
        directory = _sysfs(attached.index) / "queue"
        if not self.is_held(attached):
            for name, value in queue.items():
                if (directory / name).read_text().strip() != str(value):
                    _set(directory / name, value)

    def connected(self, identifier: str) -> list[Connected]:
        """The devices that say this of their server, and that the driver takes new sockets for."""
        found = []
        for device in sorted(Path("/sys/block").glob("nbd*")):
            if _is_connected(device, identifier) and _is_bound(device, identifier):
                attached = self.find(f"/dev/{device.name}")
                found.append(
                    Connected(
                        path=attached.path,
                        size=_size(device),
                        identifier=identifier,
                        is_held=self.is_held(attached),
                    )
                )
        return found

    def is_connected(self, path: str, size: int, identifier: str) -> bool:
        """Is this a device of that many bytes, that says this of its server?"""
        device = Path("/sys/block", Path(path).name)
        return _is_connected(device, identifier) and _size(device) == size

    def find(self, path: str) -> Attached:
        """The device of the node at ``path`` as it is now, whoever attached it."""
        name = Path(path).name
        return Attached(int(name.removeprefix("nbd")), path, _connection(Path("/sys/block", name)), False)

    def detach(self, attached: Attached) -> None:
        """Disconnect, and wait until the driver has freed the device. Nothing to do where somebody else
        disconnected it. Raises `MountError` where something still has it open."""
        device = _sysfs(attached.index)
        try:
            if _connection(device) == attached.connection:
                _disconnect(attached.index)
                _wait_until(
                    lambda: _connection(device) != attached.connection,
                    f"{attached.path} is told to disconnect, but does not",
                )
                _wait_until(
                    lambda: _connection(device) != 0 or _size(device) == 0,
                    f"{attached.path} is disconnected, but something still has it open (a mount in another "
                    "mount namespace?): its reads fail, and its index is free when that ends",
                )
        finally:
            if attached.made_node:
                Path(attached.path).unlink(missing_ok=True)

    def is_held(self, attached: Attached) -> bool:
        """Is it mounted, in whatever mount namespace, or taken otherwise for one user alone?"""
        try:
            os.close(os.open(attached.path, os.O_RDONLY | os.O_EXCL | os.O_CLOEXEC))
        except OSError as error:
            return error.errno == errno.EBUSY
        return False


def _connect(connection: Connection) -> int:
    deadline = time.monotonic() + PATIENCE
    while True:
        try:
            return parse_index(_request(Command.CONNECT, connection.encode()))
        except OSError as error:
            # Busy: udev opened the unused device just before the driver took it.
            if error.errno != errno.EBUSY or time.monotonic() > deadline:
                raise MountError(f"the nbd driver does not connect a device: {error.strerror}") from error
            time.sleep(POLL)


def _disconnect(index: int) -> None:
    try:
        _request(Command.DISCONNECT, encode_index(index))
    except OSError as error:
        raise MountError(f"the nbd driver does not disconnect nbd{index}: {error.strerror}") from error


def _request(command: Command, attributes: bytes) -> bytes:
    with GenericNetlink(FAMILY, VERSION) as netlink:
        replies = netlink.request(command, attributes)
    return replies[0].attributes if replies else b""


def _sysfs(index: int) -> Path:
    return Path(f"/sys/block/nbd{index}")


def _is_ready(device: Path, size: int) -> bool:
    return _connection(device) != 0 and _size(device) == size


def _connection(device: Path) -> int:
    """A number for the device's present connection, 0 where it has none.

    ``pid`` is in sysfs as long as a connection lasts, made anew for each, and so has another inode each time.
    Its content may well be the same again: it is that of the thread that connected the device.
    """
    try:
        return (device / "pid").stat().st_ino
    except OSError:
        return 0


def _is_connected(device: Path, identifier: str) -> bool:
    return _connection(device) != 0 and _backend(device) == identifier


def _was_dropped(sock: socket.socket) -> bool:
    """Has the driver closed the other end of a socket that it was given?"""
    poll = select.poll()
    poll.register(sock, 0)
    return bool(poll.poll(1000 * SETTLED))


def _is_bound(device: Path, identifier: str) -> bool:
    """Has nobody told it to disconnect? While it is mounted it looks connected all the same. To reconfigure
    it without new sockets changes nothing, and is refused then."""
    index = int(device.name.removeprefix("nbd"))
    try:
        _request(Command.RECONFIGURE, encode_reconfigure(index, (), identifier))
    except OSError:
        return False
    return True


def _backend(device: Path) -> str:
    """What CONNECT said of the server; '' where it said nothing."""
    try:
        return (device / "backend").read_text(errors="surrogateescape").removesuffix("\n")
    except OSError:
        return ""


def _size(device: Path) -> int:
    """In bytes; also 0 where the device itself has gone."""
    try:
        return int((device / "size").read_text()) * SECTOR
    except FileNotFoundError:
        return 0


def _set(path: Path, value: int) -> None:
    try:
        path.write_text(str(value))
    except OSError as error:
        raise MountError(f"{path} cannot be set to {value}: {error.strerror}") from error


def _find_node(device: Path) -> tuple[str, bool]:
    path = Path("/dev", device.name)
    major, minor = map(int, (device / "dev").read_text().split(":"))
    number = os.makedev(major, minor)
    try:
        there = path.stat()
    except FileNotFoundError:
        try:
            os.mknod(path, stat.S_IFBLK | 0o600, number)
        except OSError as error:
            raise MountError(f"there is no {path}, and it cannot be made: {error.strerror}") from error
        return str(path), True
    if not stat.S_ISBLK(there.st_mode) or there.st_rdev != number:
        raise MountError(f"{path} is not the block device {major}:{minor}: remove it, it is left over")
    return str(path), False


def _wait_until(condition: Callable[[], bool], otherwise: str) -> None:
    deadline = time.monotonic() + PATIENCE
    while not condition():
        if time.monotonic() > deadline:
            raise MountError(f"{otherwise} (waited {PATIENCE:g} s)")
        time.sleep(POLL)
