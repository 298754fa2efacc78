"""A listening UNIX socket that is its owner's alone."""

from __future__ import annotations

import itertools
import os
import socket
import stat
from contextlib import suppress
from typing import Any

from twisted.internet import tcp, unix
from twisted.internet.interfaces import IProtocolFactory
from twisted.python.failure import Failure

from erofs_twisted.errors import ErofsTwistedError

OWNER_ONLY = 0o600
FIRST_INHERITED = 3
"""SD_LISTEN_FDS_START: the first of those that systemd has opened."""


class SocketInUse(ErofsTwistedError):
    """The path to listen on is taken: by another server, or by a file that is no socket."""


class OwnerPort(unix.Port):
    """Listens at ``path``, mode 0600 from the first moment.

    ``startListening`` replaces a socket file that nobody listens on any more, and raises `SocketInUse` for
    any other file. The file is removed at the end, unless it was replaced by another's meanwhile, or is
    not ours to remove.
    """

    def __init__(self, path: str, factory: IProtocolFactory, reactor: Any) -> None:
        super().__init__(os.fsencode(path), factory, mode=OWNER_ONLY, reactor=reactor)
        self._path = path
        self._identity: tuple[int, int] | None = None

    @classmethod
    def adopt(
        cls, listening: socket.socket, factory: IProtocolFactory, reactor: Any, *, owns_file: bool
    ) -> OwnerPort:
        """One of a socket that listens already; it is duplicated. ``owns_file`` says whether the file is to
        be removed at the end."""
        # One of systemd's is not; the reactor would wait in accept(2).
        listening.setblocking(False)
        port: OwnerPort = cls._fromListeningDescriptor(  # type: ignore[no-untyped-call]
            reactor, listening.fileno(), factory
        )
        if owns_file:
            port._identity = _identity(port._path)
        else:
            port._shouldShutdown = False  # others go on to listen on it
        return port

    def hand_over(self) -> socket.socket:
        """The socket for another process, which is to `adopt` it and owns the file from now on."""
        self._identity = None
        self._shouldShutdown = False
        handed: socket.socket = self.socket.dup()
        return handed

    def createInternetSocket(self) -> socket.socket:
        made: socket.socket = super().createInternetSocket()  # type: ignore[no-untyped-call]
        # Linux gives the file the mode of the socket that is bound. The umask would do too, but that belongs
        # to the whole process, threads and all.
        os.fchmod(made.fileno(), OWNER_ONLY)
        return made

    def startListening(self) -> None:
        is_adopted = self._preexistingSocket is not None
        if not is_adopted:
            _remove_stale(self._path)
        super().startListening()  # type: ignore[no-untyped-call]
        if not is_adopted:
            self._identity = _identity(self._path)

    def connectionLost(self, reason: Failure) -> None:
        if self._identity is not None and _identity(self._path) == self._identity:
            os.unlink(self._path)
        # Past `unix.Port`, which would remove whatever has that name by now.
        tcp.Port.connectionLost(self, reason)


def find_inherited(path: str) -> socket.socket | None:
    """The socket that systemd has opened for this process, or for its parent, to listen at ``path``.

    It is known by what it is. LISTEN_PID and LISTEN_FDS (sd_listen_fds(3)) tell one process, once: Twisted
    takes them out of the environment when it is imported, and the socket outlives forks and upgrades.
    """
    with suppress(OSError):  # past the last of them: it is not open, or no socket
        for descriptor in itertools.count(FIRST_INHERITED):
            found = socket.socket(fileno=descriptor)
            listens = found.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
            if listens and found.family == socket.AF_UNIX and _is_at(found, path):
                return found
            found.detach()
    return None


def _is_at(listening: socket.socket, path: str) -> bool:
    name: str = listening.getsockname()
    return os.path.realpath(name) == os.path.realpath(path)


def is_dead(path: str) -> bool:
    """Does nobody listen on a socket any more? Raises OSError."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.setblocking(False)
        try:
            probe.connect(path)
        except ConnectionRefusedError:
            return True
        except BlockingIOError:
            pass  # its queue is full, so somebody has one
    return False


def _identity(path: str) -> tuple[int, int] | None:
    try:
        found = os.lstat(path)
    except FileNotFoundError:
        return None
    return found.st_dev, found.st_ino


def _remove_stale(path: str) -> None:
    try:
        mode = os.lstat(path).st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(mode):
        raise SocketInUse(f"{path} exists and is no socket: choose another path, or remove it")
    if is_dead(path):
        os.unlink(path)
        return
    raise SocketInUse(f"another server listens on {path}: stop it, or choose another path")
