"""The client's side of NBD, for tests: it writes what a test says, right or wrong, and reads the replies."""

from __future__ import annotations

import struct
from collections.abc import Iterable, Sequence

import attrs
from twisted.internet.testing import StringTransport

from erofs_twisted.interfaces import IExport
from erofs_twisted.nbd.handshake import Agreed, Handshake
from erofs_twisted.nbd.pages import DiskReaders
from erofs_twisted.nbd.protocol import NBDServerProtocol
from erofs_twisted.nbd.wire import (
    BASE_ALLOCATION,
    CHUNK,
    GREETING,
    IHAVEOPT,
    OPTION,
    OPTION_REPLY,
    OPTION_REPLY_MAGIC,
    REQUEST,
    REQUEST_MAGIC,
    SIMPLE_REPLY,
    SIMPLE_REPLY_MAGIC,
    STRUCTURED_REPLY_MAGIC,
    Command,
    OptionReply,
    ReplyType,
)
from tests.unit.threadless import HeldPool, ThreadlessReactor

OptionAnswer = tuple[int, int, bytes]
"""An option, the type of a reply to it, the reply's payload."""


def client_flags(flags: int = 3) -> bytes:
    return struct.pack(">I", flags)


def option(number: int, payload: bytes = b"", *, length: int | None = None, magic: int = IHAVEOPT) -> bytes:
    return OPTION.pack(magic, number, len(payload) if length is None else length) + payload


def string(value: bytes | str) -> bytes:
    encoded = value.encode() if isinstance(value, str) else value
    return struct.pack(">I", len(encoded)) + encoded


def ask(number: int, name: bytes | str = "", infos: Iterable[int] = ()) -> bytes:
    """NBD_OPT_INFO or NBD_OPT_GO."""
    wanted = [struct.pack(">H", each) for each in infos]
    return option(number, string(name) + struct.pack(">H", len(wanted)) + b"".join(wanted))


def meta_context(number: int, name: str = "", queries: Sequence[str] = (BASE_ALLOCATION,)) -> bytes:
    """NBD_OPT_LIST_META_CONTEXT or NBD_OPT_SET_META_CONTEXT."""
    asked = b"".join(string(each) for each in queries)
    return option(number, string(name) + struct.pack(">I", len(queries)) + asked)


def option_answers(data: bytes) -> list[OptionAnswer]:
    """Every reply to an option in ``data``, which must be nothing else."""
    found = []
    while data:
        magic, number, reply, length = OPTION_REPLY.unpack_from(data)
        assert magic == OPTION_REPLY_MAGIC, hex(magic)
        payload = data[OPTION_REPLY.size : OPTION_REPLY.size + length]
        assert len(payload) == length, "a reply is cut short"
        found.append((number, reply, payload))
        data = data[OPTION_REPLY.size + length :]
    return found


def types(data: bytes) -> list[OptionReply]:
    """Only the types of the replies to options in ``data``."""
    return [OptionReply(reply) for _, reply, _ in option_answers(data)]


def request(
    command: int,
    offset: int = 0,
    length: int = 0,
    *,
    cookie: int = 1,
    flags: int = 0,
    magic: int = REQUEST_MAGIC,
) -> bytes:
    return REQUEST.pack(magic, flags, command, cookie, offset, length)


def read(offset: int, length: int, *, cookie: int = 1, flags: int = 0) -> bytes:
    return request(Command.READ, offset, length, cookie=cookie, flags=flags)


@attrs.frozen
class Reply:
    """A reply in the transmission phase, whichever its form."""

    cookie: int
    error: int = 0
    content: bytes = b""
    offset: int | None = None
    message: str = ""
    extents: tuple[tuple[int, int], ...] = ()
    structured: bool = False


def simple_replies(data: bytes, lengths: dict[int, int]) -> list[Reply]:
    """Every reply in ``data``, all simple; ``lengths`` has how much each cookie's read asked for."""
    found = []
    while data:
        magic, error, cookie = SIMPLE_REPLY.unpack_from(data)
        assert magic == SIMPLE_REPLY_MAGIC, hex(magic)
        length = 0 if error else lengths.get(cookie, 0)
        content = data[SIMPLE_REPLY.size : SIMPLE_REPLY.size + length]
        assert len(content) == length, "a reply is cut short"
        found.append(Reply(cookie, error, content))
        data = data[SIMPLE_REPLY.size + length :]
    return found


def structured_replies(data: bytes) -> list[Reply]:
    """Every reply in ``data``, all structured, each of one chunk."""
    found = []
    while data:
        magic, flags, kind, cookie, length = CHUNK.unpack_from(data)
        assert magic == STRUCTURED_REPLY_MAGIC, hex(magic)
        assert flags == 1, "the only chunk of a reply is the last"
        payload = data[CHUNK.size : CHUNK.size + length]
        assert len(payload) == length, "a chunk is cut short"
        found.append(_chunk(ReplyType(kind), cookie, payload))
        data = data[CHUNK.size + length :]
    return found


def _chunk(kind: ReplyType, cookie: int, payload: bytes) -> Reply:
    if kind is ReplyType.NONE:
        assert payload == b""
        return Reply(cookie, structured=True)
    if kind is ReplyType.OFFSET_DATA:
        (offset,) = struct.unpack_from(">Q", payload)
        assert len(payload) > 8, "a chunk of content has content"
        return Reply(cookie, content=payload[8:], offset=offset, structured=True)
    if kind is ReplyType.BLOCK_STATUS:
        context, *numbers = struct.unpack(f">{len(payload) // 4}I", payload)
        assert context == 1
        extents = tuple(zip(numbers[::2], numbers[1::2], strict=True))
        return Reply(cookie, extents=extents, structured=True)
    assert kind is ReplyType.ERROR, kind
    error, length = struct.unpack_from(">IH", payload)
    assert len(payload) == 6 + length
    return Reply(cookie, error, message=payload[6:].decode(), structured=True)


class Client:
    """A client of an `NBDServerProtocol` whose transport is a string. ``pool`` has the threads that read
    files in."""

    def __init__(self, opening: Handshake | Agreed) -> None:
        self.pool = HeldPool()
        self.transport = StringTransport()
        self.protocol = NBDServerProtocol(opening, DiskReaders(ThreadlessReactor(), lambda: self.pool))
        self.protocol.makeConnection(self.transport)

    @classmethod
    def kernel(cls, export: IExport) -> Client:
        """One that starts in the transmission phase."""
        return cls(Agreed(export, structured=False, allocation=False))

    @classmethod
    def structured(cls, export: IExport) -> Client:
        """One that has negotiated all there is."""
        return cls(Agreed(export, structured=True, allocation=True))

    @classmethod
    def haggling(cls, exports: Sequence[IExport]) -> Client:
        """One that has the greeting and has sent its flags."""
        client = cls(Handshake(exports))
        assert len(client.received()) == GREETING.size
        client.send(client_flags())
        return client

    def send(self, *pieces: bytes) -> None:
        self.protocol.dataReceived(b"".join(pieces))

    def received(self) -> bytes:
        """What has come since this was called last."""
        data = self.transport.value()
        self.transport.clear()
        return data

    def exchange(self, *pieces: bytes) -> list[Reply]:
        """Send requests; return the replies, in the order in which they came."""
        self.send(*pieces)
        return self.replies(*pieces)

    def replies(self, *requests: bytes) -> list[Reply]:
        """The replies that have come, simple ones to ``requests``."""
        data = self.received()
        if data[:4] == struct.pack(">I", STRUCTURED_REPLY_MAGIC):
            return structured_replies(data)
        lengths = {}
        for each in requests:
            _, _, command, cookie, _, length = REQUEST.unpack_from(each)
            if command == Command.READ:
                lengths[cookie] = length
        return simple_replies(data, lengths)

    @property
    def is_closed(self) -> bool:
        """Whether the server has closed the connection."""
        return self.transport.disconnecting

    @property
    def is_cut_off(self) -> bool:
        """Whether it did so without waiting for anything."""
        return self.transport.disconnected
