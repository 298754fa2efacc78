"""Numbers of the Linux nbd driver's generic netlink family, and the attributes of its commands.

Source: ``include/uapi/linux/nbd-netlink.h`` and ``include/uapi/linux/nbd.h`` of Linux.
"""

from __future__ import annotations

import enum
import sys
from collections.abc import Sequence

import attrs

from erofs_twisted.device.genl import MalformedMessage, attribute, nested, parse_attributes, u32, u64

FAMILY = "nbd"
VERSION = 1

NBD_FLAG_HAS_FLAGS = 1 << 0
NBD_FLAG_READ_ONLY = 1 << 1

NBD_SOCK_ITEM = 1
NBD_SOCK_FD = 1
NBD_DEVICE_ITEM = 1
NBD_DEVICE_INDEX = 1
NBD_DEVICE_CONNECTED = 2


class Command(enum.IntEnum):
    CONNECT = 1
    DISCONNECT = 2
    RECONFIGURE = 3
    LINK_DEAD = 4
    STATUS = 5


class Attribute(enum.IntEnum):
    INDEX = 1
    SIZE_BYTES = 2
    BLOCK_SIZE_BYTES = 3
    TIMEOUT = 4
    SERVER_FLAGS = 5
    CLIENT_FLAGS = 6
    SOCKETS = 7
    DEAD_CONN_TIMEOUT = 8
    DEVICE_LIST = 9
    BACKEND_IDENTIFIER = 10


@attrs.frozen(kw_only=True)
class Connection:
    """What CONNECT says of a device: sizes in bytes, times in seconds. A ``timeout`` of 0 lets a request take
    as long as it takes."""

    sockets: Sequence[int]
    size: int
    block_size: int
    server_flags: int
    timeout: int
    dead_conn_timeout: int
    backend_identifier: str

    def encode(self) -> bytes:
        """Without INDEX: the driver takes an unused device, and its reply has the index."""
        return (
            attribute(Attribute.SIZE_BYTES, u64(self.size))
            + attribute(Attribute.BLOCK_SIZE_BYTES, u64(self.block_size))
            + attribute(Attribute.TIMEOUT, u64(self.timeout))
            + attribute(Attribute.SERVER_FLAGS, u64(self.server_flags))
            + attribute(Attribute.DEAD_CONN_TIMEOUT, u64(self.dead_conn_timeout))
            + _backend(self.backend_identifier)
            + _sockets(self.sockets)
        )


def encode_reconfigure(index: int, sockets: Sequence[int], backend_identifier: str) -> bytes:
    """New sockets for those of a device that are dead; without any, nothing changes. The driver refuses
    another ``backend_identifier`` than CONNECT had."""
    replaced = _sockets(sockets) if sockets else b""
    return encode_index(index) + _backend(backend_identifier) + replaced


def encode_index(index: int) -> bytes:
    """The attributes of DISCONNECT and STATUS: which device."""
    return attribute(Attribute.INDEX, u32(index))


def parse_index(attributes: bytes) -> int:
    """The device that CONNECT's reply or a LINK_DEAD message names. Raises `MalformedMessage`."""
    return _number(parse_attributes(attributes), Attribute.INDEX, 4)


def parse_status(attributes: bytes) -> dict[int, bool]:
    """Whether each device, by index, is in use, from STATUS's reply. That means little: one whose sockets are
    all dead is, and so is one that a program merely has open. Raises `MalformedMessage`."""
    devices = {}
    for kind, content in parse_attributes(attributes):
        if kind == Attribute.DEVICE_LIST:
            for item, device in parse_attributes(content):
                if item == NBD_DEVICE_ITEM:
                    fields = parse_attributes(device)
                    index = _number(fields, NBD_DEVICE_INDEX, 4)
                    devices[index] = _number(fields, NBD_DEVICE_CONNECTED, 1) != 0
    return devices


def _sockets(descriptors: Sequence[int]) -> bytes:
    items = [nested(NBD_SOCK_ITEM, attribute(NBD_SOCK_FD, u32(fd))) for fd in descriptors]
    return nested(Attribute.SOCKETS, b"".join(items))


def _backend(identifier: str) -> bytes:
    return attribute(Attribute.BACKEND_IDENTIFIER, identifier.encode("utf-8", "surrogateescape") + b"\0")


def _number(fields: list[tuple[int, bytes]], kind: int, width: int) -> int:
    for found, payload in fields:
        if found == kind:
            if len(payload) != width:
                raise MalformedMessage(f"attribute {kind} has {len(payload)} bytes instead of {width}")
            return int.from_bytes(payload, sys.byteorder)
    raise MalformedMessage(f"attribute {kind} is missing")
