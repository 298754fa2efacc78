"""The transmission phase, from the server's side, without I/O.

Source: NBD protocol, "Transmission phase", "Request types", "Error values", "Size constraints".
"""

from __future__ import annotations

from typing import NamedTuple

import attrs

from erofs_twisted.nbd.errors import FramingLost, WireError
from erofs_twisted.nbd.replies import Replies, SimpleReplies, StructuredReplies
from erofs_twisted.nbd.wire import MAXIMUM_PAYLOAD, REQUEST, REQUEST_MAGIC, Command, CommandFlag


class Read(NamedTuple):
    """Send the bytes at [offset, offset + length); 0 < length <= `MAXIMUM_PAYLOAD`, within the export."""

    cookie: int
    offset: int
    length: int


class Prefetch(NamedTuple):
    """Bring [offset, offset + length) near; length > 0, within the export."""

    cookie: int
    offset: int
    length: int


class BlockStatus(NamedTuple):
    """Say what [offset, offset + length) is made of; length > 0, within the export."""

    cookie: int
    offset: int
    length: int
    only_one: bool


class Answered(NamedTuple):
    """A request that needs nothing from the export; ``reply`` is all."""

    reply: bytes


class Disconnect(NamedTuple):
    """The client wants no more: finish what is under way, then close. No other request follows."""


Request = Read | Prefetch | BlockStatus | Answered | Disconnect


def encode_request(request: Read | Prefetch) -> bytes:
    """A request as the client sent it, but for a flag that changes nothing of what a read is answered."""
    command = Command.READ if isinstance(request, Read) else Command.CACHE
    return REQUEST.pack(REQUEST_MAGIC, 0, command, request.cookie, request.offset, request.length)


@attrs.frozen
class _Rule:
    """What a command may look like, on an export that is read-only."""

    flags: int = attrs.field(default=0, converter=int)  # ~ of a CommandFlag would know only its like
    """Those that may be set."""
    past_end: WireError | None = None
    """The error for a range that leaves the export; None where a command has no range."""
    writes: bool = False
    empty: bool = True
    """Whether a length of 0 is allowed."""


_RULES = {
    Command.READ: _Rule(flags=CommandFlag.DF, past_end=WireError.EINVAL),
    Command.WRITE: _Rule(past_end=WireError.ENOSPC, writes=True),
    Command.FLUSH: _Rule(),
    Command.TRIM: _Rule(past_end=WireError.EINVAL, writes=True),
    Command.CACHE: _Rule(past_end=WireError.EINVAL),
    Command.WRITE_ZEROES: _Rule(flags=CommandFlag.NO_HOLE, past_end=WireError.ENOSPC, writes=True),
    Command.BLOCK_STATUS: _Rule(flags=CommandFlag.REQ_ONE, past_end=WireError.EINVAL, empty=False),
}


class Transmission:
    """One client's requests to an export of ``size`` bytes.

    Give what the client sends to `feed`, in pieces of any size, and take its requests from `next_request` as
    fast as they can be dealt with. `replies` encodes the answers, which may go out in any order.
    """

    def __init__(self, size: int, *, structured: bool = False, allocation: bool = False) -> None:
        self.structured_replies = StructuredReplies()
        self.replies: Replies = self.structured_replies if structured else SimpleReplies()
        self._size = size
        self._structured = structured
        self._allocation = allocation
        self.ended = False
        """The client sent NBD_CMD_DISC."""
        self._shutting_down = False
        self._buffer = b""
        self._position = 0
        self._payload_left = 0
        self._reply_after_payload = b""
        self._plain_reads_end = size

    @property
    def backlog(self) -> int:
        """Bytes that were fed and not yet taken as requests."""
        return len(self._buffer) - self._position

    @property
    def rest(self) -> bytes | None:
        """What was fed and not yet taken; None where that is not where a request begins, or the end."""
        return None if self._payload_left or self.ended else self._buffer[self._position :]

    def feed(self, data: bytes) -> None:
        """Take bytes from the client."""
        if self._position < len(self._buffer):
            data = self._buffer[self._position :] + data
        self._buffer = data
        self._position = 0

    def shut_down(self) -> None:
        """Refuse every request from now on."""
        self._shutting_down = True
        self._plain_reads_end = -1

    def next_request(self) -> Request | None:
        """The next request, valid; None until more is fed. Raises `FramingLost`."""
        if self._payload_left or self.ended:
            return self._discard()
        position = self._position
        if len(self._buffer) - position < _REQUEST_SIZE:
            return None
        magic, flags, command, cookie, offset, length = _unpack_request(self._buffer, position)
        if magic != REQUEST_MAGIC:
            raise FramingLost(f"a request has the magic {magic:#010x}, which is not NBD's")
        self._position = position + _REQUEST_SIZE
        # The common case first, and without the table: it decides how many reads a second can be served.
        if (
            command == 0
            and flags == 0
            and 0 < length <= MAXIMUM_PAYLOAD
            and offset + length <= self._plain_reads_end
        ):
            return Read(cookie, offset, length)
        return self._consider(flags, command, cookie, offset, length)

    def _consider(self, flags: int, command: int, cookie: int, offset: int, length: int) -> Request | None:
        if command == Command.DISC:
            self.ended = True
            return Disconnect()
        refusal = self._refusal(flags, command, offset, length)
        if refusal is not None:
            reply = self.replies.error(cookie, *refusal)
            if command == Command.WRITE and length:
                self._payload_left = length
                self._reply_after_payload = reply
                return self._discard()
            return Answered(reply)
        if command == Command.BLOCK_STATUS:
            return BlockStatus(cookie, offset, length, bool(flags & CommandFlag.REQ_ONE))
        if length == 0 or command == Command.FLUSH:
            return Answered(self.replies.done(cookie))
        return Read(cookie, offset, length) if command == Command.READ else Prefetch(cookie, offset, length)

    def _refusal(self, flags: int, command: int, offset: int, length: int) -> tuple[WireError, str] | None:
        """Why a request is not carried out; None where it is."""
        if self._shutting_down:
            return WireError.ESHUTDOWN, "the server is shutting down"
        rule = _RULES.get(command)  # type: ignore[call-overload]
        if rule is None:
            return WireError.EINVAL, f"there is no command {command}"
        if flags & ~rule.flags or (flags & CommandFlag.DF and not self._structured):
            return WireError.EINVAL, f"flags {flags:#x} cannot be set on {_name(command)}"
        if rule.past_end is None and (offset or length):
            return WireError.EINVAL, f"{_name(command)} has no range"
        if rule.past_end is not None and offset + length > self._size:
            return rule.past_end, f"{offset} + {length} is past the end, {self._size}"
        if rule.writes:
            return WireError.EPERM, "the export is read-only"
        if length == 0 and not rule.empty:
            return WireError.EINVAL, f"{_name(command)} needs a length"
        if command == Command.READ and length > MAXIMUM_PAYLOAD:
            error = WireError.EOVERFLOW if self._structured else WireError.EINVAL
            return error, f"a read is at most {MAXIMUM_PAYLOAD} bytes, not {length}"
        if command == Command.BLOCK_STATUS and not self._allocation:
            return WireError.EINVAL, "no meta context was negotiated for this export"
        return None

    def _discard(self) -> Answered | None:
        """Read past a payload, or past all that comes after the end."""
        if self.ended:
            self._position = len(self._buffer)
            return None
        skipped = min(self._payload_left, self.backlog)
        self._payload_left -= skipped
        self._position += skipped
        return None if self._payload_left else Answered(self._reply_after_payload)


def _name(command: int) -> str:
    return f"NBD_CMD_{Command(command).name}"


_REQUEST_SIZE = REQUEST.size
_unpack_request = REQUEST.unpack_from
