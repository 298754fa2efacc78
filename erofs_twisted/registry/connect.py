"""``CONNECT`` (RFC 9110, section 9.3.6): the request for a tunnel, and the reply to it. No I/O."""

from __future__ import annotations

import re

import attrs

from erofs_twisted.registry.credentials import Credentials
from erofs_twisted.registry.errors import InvalidHeader

MAX_HEAD = 16 * 1024
"""Bytes of a reply, up to the end of its head."""

_END = b"\r\n\r\n"
_STATUS = re.compile(rb"HTTP/1\.[01] ([1-5][0-9]{2})(?: ([^\x00-\x08\x0a-\x1f\x7f]*))?")
_FIELD = re.compile(rb"([!#$%&'*+.^_`|~0-9A-Za-z-]+):[ \t]*([^\x00-\x08\x0a-\x1f\x7f]*)")
_BEGINNING = b"HTTP/1."


@attrs.frozen
class ConnectReply:
    """The head of a proxy's reply. ``rest`` is what came behind it: where `is_open`, the tunnel's bytes."""

    code: int
    phrase: str
    fields: tuple[tuple[str, str], ...]
    rest: bytes = attrs.field(repr=False)

    @property
    def is_open(self) -> bool:
        return 200 <= self.code < 300

    def values(self, name: str) -> list[str]:
        """Of all header fields of a name."""
        return [value for key, value in self.fields if key.lower() == name.lower()]


def connect_request(target: str, user_agent: str, credentials: Credentials | None) -> bytes:
    """The head that asks for a tunnel to ``target``, HOST:PORT."""
    lines = [f"CONNECT {target} HTTP/1.1", f"Host: {target}", f"User-Agent: {user_agent}"]
    if credentials is not None:
        lines.append(f"Proxy-Authorization: {credentials.authorization()}")
    return ("\r\n".join(lines) + "\r\n\r\n").encode("ascii")


@attrs.define
class ReplyReader:
    """Takes a proxy's bytes as they come, until there is a reply."""

    _received: bytearray = attrs.field(factory=bytearray, repr=False, init=False)

    def feed(self, data: bytes) -> ConnectReply | None:
        """The reply, once its head has come; interim ones (1xx) are passed over. Raises `InvalidHeader`."""
        received = self._received
        received += data
        while True:
            if received[: len(_BEGINNING)] != _BEGINNING[: len(received)]:
                raise InvalidHeader(f"no reply in HTTP/1: {bytes(received[:20])!r}")
            end = received.find(_END, 0, MAX_HEAD)
            if end < 0:
                if len(received) >= MAX_HEAD:
                    raise InvalidHeader(f"a reply whose head has more than {MAX_HEAD} bytes")
                return None
            reply = _parse(bytes(received[:end]), bytes(received[end + len(_END) :]))
            if reply.code == 101 or reply.code >= 200:
                return reply
            del received[: end + len(_END)]


def _parse(head: bytes, rest: bytes) -> ConnectReply:
    first, *lines = head.split(b"\r\n")
    status = _STATUS.fullmatch(first)
    if status is None:
        raise InvalidHeader(f"a reply with the status line {first[:60]!r}")
    fields = []
    for line in lines:
        field = _FIELD.fullmatch(line)
        if field is None:
            raise InvalidHeader(f"a reply with the header {line[:60]!r}")
        fields.append((field[1].decode("ascii"), field[2].decode("latin-1").rstrip(" \t")))
    phrase = (status[2] or b"").decode("latin-1")
    return ConnectReply(int(status[1]), phrase, tuple(fields), rest)
