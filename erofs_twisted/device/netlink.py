"""Requests over a generic netlink socket. They block: not for the reactor's thread."""

from __future__ import annotations

import os
import socket
from types import TracebackType

from erofs_twisted.device.genl import (
    Reply,
    encode_get_family,
    encode_request,
    parse_family_id,
    parse_messages,
)

NETLINK_GENERIC = 16
SOL_NETLINK = 270
NETLINK_CAP_ACK = 10
NETLINK_EXT_ACK = 11
BUFFER = 1 << 16


class GenericNetlink:
    """Speaks to one family of the kernel, such as ``nbd``; a context manager.

    What the kernel refuses is an OSError with its errno, and its own words where it has some. To enter raises
    FileNotFoundError where it has no such family.
    """

    def __init__(self, family: str, version: int, timeout: float = 30.0) -> None:
        self._name = family
        self._version = version
        self._timeout = timeout
        self._sequence = 0

    def __enter__(self) -> GenericNetlink:
        self._socket = socket.socket(
            socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, NETLINK_GENERIC
        )
        try:
            self._socket.setsockopt(SOL_NETLINK, NETLINK_CAP_ACK, 1)
            self._socket.setsockopt(SOL_NETLINK, NETLINK_EXT_ACK, 1)
            self._socket.settimeout(self._timeout)
            self._socket.bind((0, 0))
            self._sequence += 1
            (reply,) = self._exchange(encode_get_family(self._name, self._sequence))
            self._family = parse_family_id(reply.attributes)
        except BaseException:
            self._socket.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._socket.close()

    def request(self, command: int, attributes: bytes) -> list[Reply]:
        """What the kernel answered before it acknowledged the command."""
        self._sequence += 1
        return self._exchange(
            encode_request(self._family, command, self._version, self._sequence, attributes)
        )

    def _exchange(self, request: bytes) -> list[Reply]:
        self._socket.send(request)
        replies: list[Reply] = []
        while True:
            for message in parse_messages(self._socket.recv(BUFFER)):
                if message.sequence != self._sequence:
                    continue
                if isinstance(message, Reply):
                    replies.append(message)
                elif message.errno:
                    raise OSError(message.errno, message.message or os.strerror(message.errno))
                else:
                    return replies
