"""The fixed newstyle handshake, from the server's side, without I/O.

Source: NBD protocol, "Newstyle negotiation", "Option types", "Metadata querying".
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Sequence

import attrs

from erofs_twisted.interfaces import IExport
from erofs_twisted.nbd.wire import (
    ALLOCATION_CONTEXT,
    BASE_ALLOCATION,
    CLIENT_FLAGS,
    EXPORT_NAME_PADDING,
    EXPORT_SIZE_AND_FLAGS,
    GREETING,
    IHAVEOPT,
    INFO_BLOCK_SIZE,
    INFO_EXPORT,
    MAX_STRING,
    MAXIMUM_PAYLOAD,
    MINIMUM_BLOCK,
    NBDMAGIC,
    OPTION,
    PREFERRED_BLOCK,
    U16,
    U32,
    ClientFlag,
    HandshakeFlag,
    Info,
    Option,
    OptionReply,
    TransmissionFlag,
    option_reply,
    text,
)

MAX_OPTIONS = 1024
"""A client may haggle about this many options, then it is sent away."""

MAX_OPTION_LENGTH = 64 << 10
"""The longest option that is looked at, in bytes; longer ones are read past and refused."""

_DISCARD = 64 << 10
_CLIENT_FLAGS = int(ClientFlag.FIXED_NEWSTYLE | ClientFlag.NO_ZEROES)  # ~ of a flag knows only its like


@attrs.frozen
class Agreed:
    """The handshake succeeded: the transmission phase begins."""

    export: IExport
    structured: bool
    """Structured replies were negotiated."""
    allocation: bool
    """The client may ask for base:allocation with NBD_CMD_BLOCK_STATUS."""


@attrs.frozen
class Ended:
    """The session is over without a transmission phase: close once the replies are sent."""

    reason: str


def transmission_flags(*, structured: bool) -> TransmissionFlag:
    """What every export of this server is: immutable, and good at prefetching."""
    flags = TransmissionFlag.HAS_FLAGS | TransmissionFlag.READ_ONLY
    flags |= TransmissionFlag.CAN_MULTI_CONN | TransmissionFlag.SEND_CACHE
    return flags | TransmissionFlag.SEND_DF if structured else flags


class Handshake:
    """One client's handshake.

    Send `greeting` first. Then give what the client sends to `receive`, in pieces of any size, and send what
    it returns, until `outcome` is set; bytes of the transmission phase that came along are in `rest`.
    """

    greeting = GREETING.pack(NBDMAGIC, IHAVEOPT, HandshakeFlag.FIXED_NEWSTYLE | HandshakeFlag.NO_ZEROES)

    def __init__(self, exports: Sequence[IExport]) -> None:
        self.outcome: Agreed | Ended | None = None
        self.shutting_down = False
        """Set it to have every further option refused."""
        self._exports = exports
        self._structured = False
        self._allocation_for: str | None = None
        self._chosen: Agreed | None = None
        self._received = bytearray()
        self._replies = bytearray()
        self._conversation = self._converse()
        self._wanted = next(self._conversation)

    @property
    def rest(self) -> bytes:
        return bytes(self._received)

    def receive(self, data: bytes) -> bytes:
        """Take bytes from the client; return those to send to it."""
        self._received += data
        while self.outcome is None and len(self._received) >= self._wanted:
            piece = bytes(self._received[: self._wanted])
            del self._received[: self._wanted]
            try:
                self._wanted = self._conversation.send(piece)
            except StopIteration as stop:
                self.outcome = stop.value
        replies = bytes(self._replies)
        self._replies.clear()
        return replies

    def _converse(self) -> Generator[int, bytes, Agreed | Ended]:
        """Yields how many bytes it wants next, is sent just those, and returns the outcome."""
        (client,) = CLIENT_FLAGS.unpack((yield CLIENT_FLAGS.size))
        if client & ~_CLIENT_FLAGS:
            return Ended(f"the client sent flags that were not offered: {client:#x}")
        for _ in range(MAX_OPTIONS):
            magic, option, length = OPTION.unpack((yield OPTION.size))
            if magic != IHAVEOPT:
                return Ended(f"an option has the magic {magic:#x}")
            if option == Option.EXPORT_NAME:
                return (yield from self._export_name(length, bool(client & ClientFlag.NO_ZEROES)))
            if not client & ClientFlag.FIXED_NEWSTYLE:
                return Ended("a client that did not ask for the fixed newstyle may only name an export")
            if option == Option.ABORT:
                self._replies += option_reply(option, OptionReply.ACK)
                return Ended("the client aborted")
            try:
                yield from self._option(option, length)
            except _Refused as refusal:
                self._replies += option_reply(option, refusal.reply, text(refusal.message))
            if self._chosen is not None:
                return self._chosen
        return Ended(f"the client sent {MAX_OPTIONS} options and chose no export")

    def _export_name(self, length: int, no_zeroes: bool) -> Generator[int, bytes, Agreed | Ended]:
        """NBD_OPT_EXPORT_NAME, to which no error can be replied."""
        if length > MAX_STRING:
            return Ended(f"the client named an export with {length} bytes")
        data = yield length
        if self.shutting_down:
            return Ended("the server is shutting down")
        try:
            name = _name(data)
            export = self._find(name)
        except _Refused as refusal:
            return Ended(refusal.message)
        flags = transmission_flags(structured=self._structured)
        self._replies += EXPORT_SIZE_AND_FLAGS.pack(export.size, flags)
        if not no_zeroes:
            self._replies += bytes(EXPORT_NAME_PADDING)
        return self._agreed(name, export)

    def _option(self, option: int, length: int) -> Generator[int, bytes, None]:
        """Any option with a proper reply; raises `_Refused` once the whole of the option was taken."""
        answer = self._answers.get(option)
        if answer is None or length > MAX_OPTION_LENGTH or self.shutting_down:
            yield from _discard(length)
            if self.shutting_down:
                raise _Refused(OptionReply.ERR_SHUTDOWN, "the server is shutting down")
            if answer is None:
                raise _Refused(OptionReply.ERR_UNSUP, "this server does not have that option")
            raise _Refused(OptionReply.ERR_TOO_BIG, f"at most {MAX_OPTION_LENGTH} bytes, not {length}")
        payload = _Payload((yield length))
        for reply, data in answer(self, payload):
            self._replies += option_reply(option, reply, data)

    def _list(self, payload: _Payload) -> _Answer:
        payload.end()
        for export in self._exports:
            name = text(export.name)
            yield OptionReply.SERVER, U32.pack(len(name)) + name + text(export.description)
        yield OptionReply.ACK, b""

    def _structured_reply(self, payload: _Payload) -> _Answer:
        payload.end()
        if self._structured:
            raise _invalid("structured replies are negotiated already")
        self._structured = True
        yield OptionReply.ACK, b""

    def _info(self, payload: _Payload) -> _Answer:
        yield from self._describe(payload)
        yield OptionReply.ACK, b""

    def _go(self, payload: _Payload) -> _Answer:
        name, export = yield from self._describe(payload)
        self._chosen = self._agreed(name, export)
        yield OptionReply.ACK, b""

    def _describe(self, payload: _Payload) -> Generator[tuple[OptionReply, bytes], None, tuple[str, IExport]]:
        name = payload.name()
        asked = {payload.u16() for _ in range(payload.u16())}
        payload.end()
        export = self._find(name)
        flags = transmission_flags(structured=self._structured)
        yield OptionReply.INFO, INFO_EXPORT.pack(Info.EXPORT, export.size, flags)
        if Info.NAME in asked:
            yield OptionReply.INFO, U16.pack(Info.NAME) + text(export.name)
        if Info.DESCRIPTION in asked:
            yield OptionReply.INFO, U16.pack(Info.DESCRIPTION) + text(export.description)
        if Info.BLOCK_SIZE in asked:
            sizes = INFO_BLOCK_SIZE.pack(Info.BLOCK_SIZE, MINIMUM_BLOCK, PREFERRED_BLOCK, MAXIMUM_PAYLOAD)
            yield OptionReply.INFO, sizes
        return name, export

    def _list_meta_context(self, payload: _Payload) -> _Answer:
        _, queries = self._meta_context_queries(payload)
        if not queries or {b"base:", BASE_ALLOCATION.encode()} & queries:
            yield OptionReply.META_CONTEXT, U32.pack(0) + BASE_ALLOCATION.encode()
        yield OptionReply.ACK, b""

    def _set_meta_context(self, payload: _Payload) -> _Answer:
        self._allocation_for = None  # also where the option fails
        name, queries = self._meta_context_queries(payload)
        if BASE_ALLOCATION.encode() in queries:
            self._allocation_for = name
            yield OptionReply.META_CONTEXT, U32.pack(ALLOCATION_CONTEXT) + BASE_ALLOCATION.encode()
        yield OptionReply.ACK, b""

    def _meta_context_queries(self, payload: _Payload) -> tuple[str, set[bytes]]:
        if not self._structured:
            raise _invalid("meta contexts need structured replies, which were not negotiated")
        name = payload.name()
        queries = {payload.string() for _ in range(payload.u32())}
        payload.end()
        self._find(name)
        return name, queries

    def _find(self, name: str) -> IExport:
        """The export of that name; '' is the first one where none has that name."""
        for export in self._exports:
            if export.name == name:
                return export
        if name == "" and self._exports:
            return self._exports[0]
        raise _Refused(OptionReply.ERR_UNKNOWN, f"there is no export {name!r}")

    def _agreed(self, name: str, export: IExport) -> Agreed:
        return Agreed(export, self._structured, self._structured and self._allocation_for == name)

    _answers: dict[int, Callable[[Handshake, _Payload], _Answer]] = {
        Option.LIST: _list,
        Option.INFO: _info,
        Option.GO: _go,
        Option.STRUCTURED_REPLY: _structured_reply,
        Option.LIST_META_CONTEXT: _list_meta_context,
        Option.SET_META_CONTEXT: _set_meta_context,
    }


_Answer = Iterator[tuple[OptionReply, bytes]]
"""The replies to one option, each with its payload."""


class _Refused(Exception):
    """An option is answered with an error."""

    def __init__(self, reply: OptionReply, message: str) -> None:
        super().__init__(message)
        self.reply = reply
        self.message = message


def _invalid(message: str) -> _Refused:
    return _Refused(OptionReply.ERR_INVALID, message)


def _discard(length: int) -> Generator[int, bytes, None]:
    while length > 0:
        piece = min(length, _DISCARD)
        yield piece
        length -= piece


def _name(data: bytes) -> str:
    if len(data) > MAX_STRING:
        raise _Refused(OptionReply.ERR_TOO_BIG, f"a name has at most {MAX_STRING} bytes, not {len(data)}")
    try:
        name = data.decode("utf-8")
    except UnicodeDecodeError:
        raise _invalid("the name of an export is UTF-8") from None
    if "\0" in name:
        raise _invalid("the name of an export has no NUL in it")
    return name


class _Payload:
    """An option's data, taken field by field; whatever does not fit is refused as invalid."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._taken = 0

    def take(self, length: int) -> bytes:
        start = self._taken
        if length > len(self._data) - start:
            raise _invalid(f"a field of {length} bytes in an option that has {len(self._data) - start} left")
        self._taken += length
        return self._data[start : self._taken]

    def u16(self) -> int:
        return int.from_bytes(self.take(U16.size), "big")

    def u32(self) -> int:
        return int.from_bytes(self.take(U32.size), "big")

    def string(self) -> bytes:
        value = self.take(self.u32())
        if len(value) > MAX_STRING:
            raise _Refused(OptionReply.ERR_TOO_BIG, f"a string has at most {MAX_STRING} bytes")
        return value

    def name(self) -> str:
        return _name(self.string())

    def end(self) -> None:
        left = len(self._data) - self._taken
        if left:
            raise _invalid(f"{left} bytes more than the option has fields")
