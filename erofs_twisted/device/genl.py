"""Generic netlink messages to bytes and back.

Source: netlink(7), ``include/uapi/linux/netlink.h`` and ``genetlink.h`` of Linux. pyroute2 can do this and
all else that netlink has, but to import it takes a quarter of a second: a fifth of the time that a mount may
take from the command to the first read. These are the few messages that the nbd driver needs.
"""

from __future__ import annotations

import struct
import sys

import attrs

GENL_ID_CTRL = 16
CTRL_CMD_GETFAMILY = 3
CTRL_ATTR_FAMILY_ID = 1
CTRL_ATTR_FAMILY_NAME = 2

NLM_F_REQUEST = 0x1
NLM_F_ACK = 0x4
NLM_F_CAPPED = 0x100
NLM_F_ACK_TLVS = 0x200
NLMSG_ERROR = 2
NLMSGERR_ATTR_MSG = 1
NLA_F_NESTED = 0x8000
NLA_TYPE_MASK = 0x3FFF

_message = struct.Struct("=IHHII")  # length, type, flags, sequence number, port
_generic = struct.Struct("=BBH")  # command, version, reserved
_attribute = struct.Struct("=HH")  # length, type
_error = struct.Struct("=i")


class MalformedMessage(ValueError):
    """The bytes are no netlink message, or not the one that was expected."""


@attrs.frozen
class Reply:
    """A message of a family. ``attributes`` are as `parse_attributes` takes them."""

    sequence: int
    command: int
    attributes: bytes


@attrs.frozen
class Ack:
    """The end of a request: ``errno`` is 0 where it was done; ``message`` is the kernel's reason, or
    empty."""

    sequence: int
    errno: int
    message: str = ""


def encode_request(family: int, command: int, version: int, sequence: int, attributes: bytes) -> bytes:
    """A request that the kernel ends with an `Ack`."""
    body = _generic.pack(command, version, 0) + attributes
    flags = NLM_F_REQUEST | NLM_F_ACK
    return _message.pack(_message.size + len(body), family, flags, sequence, 0) + body


def encode_get_family(name: str, sequence: int) -> bytes:
    """Asks the controller which number a family has on this kernel."""
    named = attribute(CTRL_ATTR_FAMILY_NAME, name.encode() + b"\0")
    return encode_request(GENL_ID_CTRL, CTRL_CMD_GETFAMILY, 1, sequence, named)


def parse_family_id(attributes: bytes) -> int:
    """The answer to `encode_get_family`. Raises `MalformedMessage`."""
    for kind, payload in parse_attributes(attributes):
        if kind == CTRL_ATTR_FAMILY_ID and len(payload) == 2:
            return int.from_bytes(payload, sys.byteorder)
    raise MalformedMessage("the family's number is missing")


def parse_messages(datagram: bytes) -> list[Reply | Ack]:
    """All messages of one read of the socket. Raises `MalformedMessage`."""
    messages: list[Reply | Ack] = []
    position = 0
    while position < len(datagram):
        if len(datagram) - position < _message.size:
            raise MalformedMessage(f"{len(datagram) - position} bytes are too few for a message")
        length, kind, flags, sequence, _ = _message.unpack_from(datagram, position)
        if not _message.size <= length <= len(datagram) - position:
            raise MalformedMessage(f"a message claims {length} bytes")
        body = datagram[position + _message.size : position + length]
        messages.append(
            _parse_ack(body, flags, sequence) if kind == NLMSG_ERROR else _parse_reply(body, sequence)
        )
        position += _padded(length)
    return messages


def parse_attributes(payload: bytes) -> list[tuple[int, bytes]]:
    """The (type, content) of each attribute. Raises `MalformedMessage`."""
    attributes = []
    position = 0
    while position < len(payload):
        if len(payload) - position < _attribute.size:
            raise MalformedMessage(f"{len(payload) - position} bytes are too few for an attribute")
        length, kind = _attribute.unpack_from(payload, position)
        if not _attribute.size <= length <= len(payload) - position:
            raise MalformedMessage(f"an attribute claims {length} bytes")
        attributes.append((kind & NLA_TYPE_MASK, payload[position + _attribute.size : position + length]))
        position += _padded(length)
    return attributes


def attribute(kind: int, payload: bytes) -> bytes:
    length = _attribute.size + len(payload)
    return _attribute.pack(length, kind) + payload + bytes(_padded(length) - length)


def nested(kind: int, attributes: bytes) -> bytes:
    return attribute(kind | NLA_F_NESTED, attributes)


def u32(number: int) -> bytes:
    return number.to_bytes(4, sys.byteorder)


def u64(number: int) -> bytes:
    return number.to_bytes(8, sys.byteorder)


def _parse_reply(body: bytes, sequence: int) -> Reply:
    if len(body) < _generic.size:
        raise MalformedMessage(f"{len(body)} bytes are too few for a generic message")
    return Reply(sequence, body[0], body[_generic.size :])


def _parse_ack(body: bytes, flags: int, sequence: int) -> Ack:
    # The error, the header of the request, the rest of the request unless capped, then attributes if flagged.
    if len(body) < _error.size + _message.size:
        raise MalformedMessage(f"{len(body)} bytes are too few for an acknowledgement")
    (error,) = _error.unpack_from(body)
    if not flags & NLM_F_ACK_TLVS:
        return Ack(sequence, -error)
    request_length = _message.size
    if error and not flags & NLM_F_CAPPED:
        request_length = max(request_length, _message.unpack_from(body, _error.size)[0])
    for kind, payload in parse_attributes(body[_error.size + _padded(request_length) :]):
        if kind == NLMSGERR_ATTR_MSG:
            return Ack(sequence, -error, payload.rstrip(b"\0").decode("utf-8", "replace"))
    return Ack(sequence, -error)


def _padded(length: int) -> int:
    return length + 3 & ~3
