"""The NBD protocol's numbers and layouts, by the names that its specification gives them.

Source: the NBD protocol, https://github.com/NetworkBlockDevice/nbd/blob/master/doc/proto.md. Every integer on
the wire is unsigned and big-endian.
"""

from __future__ import annotations

from enum import IntEnum, IntFlag
from struct import Struct

NBDMAGIC = 0x4E42444D41474943
"""What a server says first: ``NBDMAGIC`` in ASCII."""

IHAVEOPT = 0x49484156454F5054
"""The magic of a newstyle server's greeting and of each option: ``IHAVEOPT`` in ASCII."""

OPTION_REPLY_MAGIC = 0x3E889045565A9
REQUEST_MAGIC = 0x25609513
SIMPLE_REPLY_MAGIC = 0x67446698
STRUCTURED_REPLY_MAGIC = 0x668E33EF

MAX_STRING = 4096
"""The longest string (name, description, query, message) that the protocol allows, in bytes."""

MINIMUM_BLOCK = 1
PREFERRED_BLOCK = 4096
MAXIMUM_PAYLOAD = 32 << 20
"""The block sizes that an export advertises: minimum, preferred, and the longest read, in bytes."""

MAXIMUM_EXTENTS = 1 << 20
"""The most descriptors that one reply to NBD_CMD_BLOCK_STATUS may carry."""

BASE_ALLOCATION = "base:allocation"
ALLOCATION_CONTEXT = 1
"""The id by which base:allocation is known in the transmission phase."""


class HandshakeFlag(IntFlag):
    """NBD_FLAG_*, 16 bits, from the server."""

    FIXED_NEWSTYLE = 1 << 0
    NO_ZEROES = 1 << 1


class ClientFlag(IntFlag):
    """NBD_FLAG_C_*, 32 bits, from the client."""

    FIXED_NEWSTYLE = 1 << 0
    NO_ZEROES = 1 << 1


class TransmissionFlag(IntFlag):
    """NBD_FLAG_*, 16 bits: what an export is and which commands may be sent to it."""

    HAS_FLAGS = 1 << 0
    READ_ONLY = 1 << 1
    SEND_FLUSH = 1 << 2
    SEND_FUA = 1 << 3
    ROTATIONAL = 1 << 4
    SEND_TRIM = 1 << 5
    SEND_WRITE_ZEROES = 1 << 6
    SEND_DF = 1 << 7
    CAN_MULTI_CONN = 1 << 8
    SEND_RESIZE = 1 << 9
    SEND_CACHE = 1 << 10
    SEND_FAST_ZERO = 1 << 11


class Option(IntEnum):
    """NBD_OPT_*."""

    EXPORT_NAME = 1
    ABORT = 2
    LIST = 3
    PEEK_EXPORT = 4
    STARTTLS = 5
    INFO = 6
    GO = 7
    STRUCTURED_REPLY = 8
    LIST_META_CONTEXT = 9
    SET_META_CONTEXT = 10
    EXTENDED_HEADERS = 11


class OptionReply(IntEnum):
    """NBD_REP_*; the errors have bit 31 set."""

    ACK = 1
    SERVER = 2
    INFO = 3
    META_CONTEXT = 4
    ERR_UNSUP = (1 << 31) + 1
    ERR_POLICY = (1 << 31) + 2
    ERR_INVALID = (1 << 31) + 3
    ERR_PLATFORM = (1 << 31) + 4
    ERR_TLS_REQD = (1 << 31) + 5
    ERR_UNKNOWN = (1 << 31) + 6
    ERR_SHUTDOWN = (1 << 31) + 7
    ERR_BLOCK_SIZE_REQD = (1 << 31) + 8
    ERR_TOO_BIG = (1 << 31) + 9


class Info(IntEnum):
    """NBD_INFO_*: what a client may ask about an export, and what it is told."""

    EXPORT = 0
    NAME = 1
    DESCRIPTION = 2
    BLOCK_SIZE = 3


class Command(IntEnum):
    """NBD_CMD_*."""

    READ = 0
    WRITE = 1
    DISC = 2
    FLUSH = 3
    TRIM = 4
    CACHE = 5
    WRITE_ZEROES = 6
    BLOCK_STATUS = 7
    RESIZE = 8


class CommandFlag(IntFlag):
    """NBD_CMD_FLAG_*, 16 bits."""

    FUA = 1 << 0
    NO_HOLE = 1 << 1
    DF = 1 << 2
    REQ_ONE = 1 << 3
    FAST_ZERO = 1 << 4
    PAYLOAD_LEN = 1 << 5


class ReplyFlag(IntFlag):
    """NBD_REPLY_FLAG_*, 16 bits, of a structured reply's chunk."""

    DONE = 1 << 0


class ReplyType(IntEnum):
    """NBD_REPLY_TYPE_*, 16 bits, of a structured reply's chunk; the errors have bit 15 set."""

    NONE = 0
    OFFSET_DATA = 1
    OFFSET_HOLE = 2
    BLOCK_STATUS = 5
    ERROR = (1 << 15) + 1
    ERROR_OFFSET = (1 << 15) + 2


class StateFlag(IntFlag):
    """NBD_STATE_*: an extent's status in the context base:allocation."""

    HOLE = 1 << 0
    ZERO = 1 << 1


GREETING = Struct(">QQH")
"""NBDMAGIC, IHAVEOPT, handshake flags."""

CLIENT_FLAGS = Struct(">I")

OPTION = Struct(">QII")
"""IHAVEOPT, option, length of the data that follows."""

OPTION_REPLY = Struct(">QIII")
"""Magic, option, reply type, length of the data that follows."""

EXPORT_SIZE_AND_FLAGS = Struct(">QH")
"""The answer to NBD_OPT_EXPORT_NAME, followed by `EXPORT_NAME_PADDING` zeroes unless NO_ZEROES was agreed."""

EXPORT_NAME_PADDING = 124

INFO_EXPORT = Struct(">HQH")
"""NBD_INFO_EXPORT, size in bytes, transmission flags."""

INFO_BLOCK_SIZE = Struct(">HIII")
"""NBD_INFO_BLOCK_SIZE, minimum, preferred, maximum payload in bytes."""

REQUEST = Struct(">IHHQQI")
"""Magic, command flags, command, cookie, offset, length."""

SIMPLE_REPLY = Struct(">IIQ")
"""Magic, error, cookie."""

CHUNK = Struct(">IHHQI")
"""Magic, reply flags, reply type, cookie, length of the payload that follows."""

OFFSET_DATA_CHUNK = Struct(">IHHQIQ")
"""A chunk's header and its payload's first field, the offset; the data follow."""

ERROR_PAYLOAD = Struct(">IH")
"""Error, length of the message that follows."""

EXTENT = Struct(">II")
"""Length in bytes, status flags."""

U16 = Struct(">H")
U32 = Struct(">I")


def text(message: str) -> bytes:
    """``message`` as the protocol has it: UTF-8, no NUL, at most `MAX_STRING` bytes, of whole characters."""
    encoded = message.replace("\0", " ").encode("utf-8", "replace")
    return encoded[:MAX_STRING].decode("utf-8", "ignore").encode()


def option_reply(option: int, reply: OptionReply, payload: bytes = b"") -> bytes:
    """One reply to an option."""
    return OPTION_REPLY.pack(OPTION_REPLY_MAGIC, option, reply, len(payload)) + payload
