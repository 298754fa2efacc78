"""The two forms that a reply takes in the transmission phase: simple, and structured where it was negotiated.

Source: NBD protocol, "Simple reply message", "Structured reply chunk message", "Structured reply types".
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import groupby
from operator import itemgetter
from typing import Protocol

from erofs_twisted.nbd.errors import WireError
from erofs_twisted.nbd.wire import (
    ALLOCATION_CONTEXT,
    CHUNK,
    ERROR_PAYLOAD,
    EXTENT,
    MAXIMUM_EXTENTS,
    OFFSET_DATA_CHUNK,
    SIMPLE_REPLY,
    SIMPLE_REPLY_MAGIC,
    STRUCTURED_REPLY_MAGIC,
    U32,
    ReplyFlag,
    ReplyType,
    StateFlag,
    text,
)


class Replies(Protocol):
    """Encodes replies; ``cookie`` is the request's."""

    def content(self, cookie: int, offset: int, length: int) -> bytes:
        """What goes before the ``length`` > 0 bytes that a read at ``offset`` returns, all in one."""

    def done(self, cookie: int) -> bytes:
        """Success, without content."""

    def error(self, cookie: int, error: WireError, message: str) -> bytes:
        """Failure; ``message`` reaches the client where the form has room for it."""


class SimpleReplies:
    """What every client understands; the Linux kernel only this."""

    def content(self, cookie: int, offset: int, length: int) -> bytes:
        return SIMPLE_REPLY.pack(SIMPLE_REPLY_MAGIC, 0, cookie)

    def done(self, cookie: int) -> bytes:
        return SIMPLE_REPLY.pack(SIMPLE_REPLY_MAGIC, 0, cookie)

    def error(self, cookie: int, error: WireError, message: str) -> bytes:
        return SIMPLE_REPLY.pack(SIMPLE_REPLY_MAGIC, error, cookie)


class StructuredReplies:
    """One chunk a reply, so each is the last."""

    def content(self, cookie: int, offset: int, length: int) -> bytes:
        return OFFSET_DATA_CHUNK.pack(STRUCTURED_REPLY_MAGIC, _DONE, _OFFSET_DATA, cookie, length + 8, offset)

    def done(self, cookie: int) -> bytes:
        return CHUNK.pack(STRUCTURED_REPLY_MAGIC, _DONE, ReplyType.NONE, cookie, 0)

    def error(self, cookie: int, error: WireError, message: str) -> bytes:
        said = text(message)
        return self._chunk(ReplyType.ERROR, cookie, ERROR_PAYLOAD.pack(error, len(said)) + said)

    def extents(self, cookie: int, extents: Iterable[tuple[int, bool]], *, only_one: bool) -> bytes:
        """The answer to NBD_CMD_BLOCK_STATUS: ``extents`` as `IExport.extents` has them."""
        merged = [
            (sum(length for length, _ in run), _HOLE if is_hole else 0)
            for is_hole, run in groupby(extents, key=itemgetter(1))
        ]
        limit = 1 if only_one else MAXIMUM_EXTENTS
        descriptors = b"".join(EXTENT.pack(*each) for each in merged[:limit])
        return self._chunk(ReplyType.BLOCK_STATUS, cookie, U32.pack(ALLOCATION_CONTEXT) + descriptors)

    def _chunk(self, kind: ReplyType, cookie: int, payload: bytes) -> bytes:
        return CHUNK.pack(STRUCTURED_REPLY_MAGIC, _DONE, kind, cookie, len(payload)) + payload


# Plain integers: an enumeration's members cost more to look up and to pack, for each read.
_DONE = int(ReplyFlag.DONE)
_OFFSET_DATA = int(ReplyType.OFFSET_DATA)
_HOLE = int(StateFlag.HOLE | StateFlag.ZERO)
