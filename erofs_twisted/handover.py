"""How a daemon gives its devices to the next one, while who reads them goes on: over a pair of sockets.

The next one says that it is there (`TAKE`). The one before leaves its mounts, sends each device with its open
files, and at last a word that this was all. Each is a line of JSON, with file descriptors beside it
(unix(7), SCM_RIGHTS). What is sent stays in the socket until it is read, also when the sender has ended.
"""

from __future__ import annotations

import base64
import json
import os
import socket
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any

import attrs
from twisted.internet.abstract import FileDescriptor
from twisted.internet.defer import Deferred
from twisted.internet.main import CONNECTION_DONE, CONNECTION_LOST
from twisted.logger import Logger
from twisted.python.failure import Failure

from erofs_twisted.device.driver import Reconnected
from erofs_twisted.interfaces import HandedConnection, HandedDevice

VERSION = 1
TAKE = b'{"take": 1}\n'
ROOM_BESIDE = socket.CMSG_SPACE(4 * 253)
"""Bytes for the descriptors that go with one piece of data: SCM_MAX_FD of the kernel at most."""
BUFFER = 64 << 10
PATIENCE = 10.0
"""Seconds that the next daemon may take to read what it is given, where not all fits into the socket."""
ROOM = 8 << 20
"""Bytes that should fit: more than any number of devices takes."""

_SO_SNDBUFFORCE = 32  # <asm-generic/socket.h>


class MalformedHandover(Exception):
    """What came is not what this version of the program can take."""


@attrs.define
class Handover:
    """What a daemon leaves to the next one: its process number, its devices by their paths, and the socket on
    which it took calls, if it had one. ``reclaimed`` are those that the next one had to find for itself."""

    pid: int = 0
    devices: dict[str, HandedDevice] = attrs.field(factory=dict)
    port: socket.socket | None = None
    reclaimed: dict[str, Reconnected] = attrs.field(factory=dict)

    def drop(self, path: str) -> None:
        """Close what there is of a device, if nobody has taken that."""
        device = self.devices.pop(path, None)
        if device is not None:
            _close(device)

    def close(self) -> None:
        """Close all that nobody has taken."""
        for path in [*self.devices]:
            self.drop(path)
        if self.port is not None:
            self.port.close()
            self.port = None


def make_line() -> tuple[socket.socket, socket.socket]:
    """The end of a daemon, and that of the next one."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    with suppress(PermissionError):  # then it has to be read while it is written
        ours.setsockopt(socket.SOL_SOCKET, _SO_SNDBUFFORCE, ROOM)
    return ours, theirs


def give(sock: socket.socket, handover: Handover) -> None:
    """Send all. It blocks, for `PATIENCE` at most. Raises OSError."""
    sock.settimeout(PATIENCE)
    for device in handover.devices.values():
        _send(sock, *_encode(device))
    port = [] if handover.port is None else [handover.port.fileno()]
    _send(sock, {"version": VERSION, "end": handover.pid}, port)


def take(reactor: Any, sock: socket.socket) -> Deferred[Handover | None]:
    """Say that this process is there, and take what the one before has to give: a Deferred that fires when
    that is all, and with None where it has ended without a word. It may take its time, and go on serving.

    Takes ``sock`` over.
    """
    with suppress(OSError):  # it has ended; what it had to give is in the socket
        sock.send(TAKE)
    taking = _Taking(reactor, sock)
    return taking.done


def on_take(reactor: Any, sock: socket.socket, leave: Callable[[], object]) -> None:
    """Call ``leave`` when the next daemon is there. ``sock`` stays the caller's."""
    _Line(reactor, sock, lambda message, descriptors: leave() if "take" in message else None)


class _Line(FileDescriptor):
    """Reads lines, and gives each to ``received``, with the descriptors that came with it."""

    log = Logger()

    def __init__(
        self,
        reactor: Any,
        sock: socket.socket,
        received: Callable[[Mapping[str, Any], Sequence[int]], object],
    ) -> None:
        super().__init__(reactor)
        sock.setblocking(False)
        self._sock = sock
        self._received = received
        self._data = b""
        self._descriptors: deque[int] = deque()
        self.connected = 1
        self.startReading()  # type: ignore[no-untyped-call]

    def fileno(self) -> int:
        return self._sock.fileno()

    def doRead(self) -> Exception | None:
        try:
            # Not `socket.recv_fds`, which does not pass the flag on, in Python 3.11.
            data, beside, _, _ = self._sock.recvmsg(BUFFER, ROOM_BESIDE, socket.MSG_CMSG_CLOEXEC)
        except BlockingIOError:
            return None
        except OSError:
            return CONNECTION_LOST
        for level, kind, numbers in beside:
            if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
                self._descriptors += memoryview(numbers[: len(numbers) // 4 * 4]).cast("i")
        if not data:
            return CONNECTION_DONE
        *lines, self._data = (self._data + data).split(b"\n")
        for each in lines:
            try:
                message = json.loads(each)
                own = [self._descriptors.popleft() for _ in range(message.get("descriptors", 0))]
                self._received(message, own)
            except (ValueError, TypeError, KeyError, AttributeError, IndexError, MalformedHandover) as error:
                self.log.warn("the daemon before cannot be followed at once: {reason}", reason=str(error))
                return CONNECTION_LOST
        return None

    def connectionLost(self, reason: Failure) -> None:
        super().connectionLost(reason)  # type: ignore[no-untyped-call]
        while self._descriptors:
            os.close(self._descriptors.popleft())


class _Taking(_Line):
    def __init__(self, reactor: Any, sock: socket.socket) -> None:
        self.done: Deferred[Handover | None] = Deferred(lambda _: self._end(None))
        self._handover = Handover()
        super().__init__(reactor, sock, self._take)

    def _take(self, message: Mapping[str, Any], descriptors: Sequence[int]) -> None:
        if message["version"] != VERSION:
            for each in descriptors:
                os.close(each)
            raise MalformedHandover(f"it is of version {message['version']}, and not {VERSION}")
        if "end" in message:
            self._handover.pid = message["end"]
            if descriptors:
                self._handover.port = socket.socket(fileno=descriptors[0])
            self._end(self._handover)
        else:
            device = _decode(message, descriptors)
            self._handover.devices[device.path] = device

    def connectionLost(self, reason: Failure) -> None:
        super().connectionLost(reason)
        self._end(None)

    def _end(self, handover: Handover | None) -> None:
        self.stopReading()  # type: ignore[no-untyped-call]
        self._sock.close()
        if handover is None:
            self._handover.close()
        if not self.done.called:
            self.done.callback(handover)


def _send(sock: socket.socket, message: Mapping[str, Any], descriptors: Sequence[int]) -> None:
    data = json.dumps({**message, "descriptors": len(descriptors)}).encode() + b"\n"
    sent = socket.send_fds(sock, [data], descriptors) if descriptors else 0
    sock.sendall(data[sent:])


def _encode(device: HandedDevice) -> tuple[dict[str, Any], list[int]]:
    connections = [
        {
            "requests": base64.b64encode(each.requests).decode(),
            "structured": each.structured,
            "allocation": each.allocation,
        }
        for each in device.connections
    ]
    message = {
        "version": VERSION,
        "path": device.path,
        "size": device.size,
        "identifier": device.identifier,
        "connections": connections,
        "facts": dict(device.facts),
        "names": list(device.files),
    }
    return message, [*(each.sock.fileno() for each in device.connections), *device.files.values()]


def _decode(message: Mapping[str, Any], descriptors: Sequence[int]) -> HandedDevice:
    connections, names = message["connections"], message["names"]
    if len(descriptors) != len(connections) + len(names):
        raise MalformedHandover(f"{message['path']} comes with {len(descriptors)} open files")
    return HandedDevice(
        path=message["path"],
        size=message["size"],
        identifier=message["identifier"],
        connections=[
            HandedConnection(
                sock=socket.socket(fileno=descriptor),
                requests=base64.b64decode(each["requests"]),
                structured=each["structured"],
                allocation=each["allocation"],
            )
            for each, descriptor in zip(connections, descriptors, strict=False)
        ],
        facts=message["facts"],
        files=dict(zip(names, descriptors[len(connections) :], strict=True)),
    )


def _close(device: HandedDevice) -> None:
    for connection in device.connections:
        connection.sock.close()
    for descriptor in device.files.values():
        os.close(descriptor)
