"""A proxy of our own, on loopback and on the test's own reactor: it writes down what it is asked, and knows
names that no resolver knows."""

from __future__ import annotations

import base64
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import attrs
from twisted.internet import reactor as global_reactor
from twisted.internet.endpoints import HostnameEndpoint
from twisted.internet.protocol import Factory, Protocol, connectionDone
from twisted.internet.ssl import DefaultOpenSSLContextFactory
from twisted.python.failure import Failure

reactor: Any = global_reactor


@attrs.define(eq=False)
class ConnectProxy:
    """Listens from `start` to `stop`. ``hosts`` says which HOST:PORT stands for a HOST:PORT that it is asked
    for; ``user``, USER:PASSWORD, whom it serves; ``tls``, files for chain and key, makes it speak TLS.

    ``answers`` are status lines that it refuses with, one for each of the first requests.
    """

    hosts: Mapping[str, str] = attrs.field(factory=dict)
    user: str = ""
    tls: tuple[Path, Path] | None = None
    answers: list[str] = attrs.field(factory=list)
    heads: list[str] = attrs.field(init=False, factory=list)
    """Of all requests, as they came."""
    _port: Any = attrs.field(init=False)
    _connections: set[Any] = attrs.field(init=False, factory=set)

    def start(self) -> None:
        factory = Factory.forProtocol(lambda: _Client(self))
        factory.noisy = False
        if self.tls is None:
            self._port = reactor.listenTCP(0, factory, interface="127.0.0.1")
        else:
            chain, key = self.tls
            context = DefaultOpenSSLContextFactory(str(key), str(chain))
            self._port = reactor.listenSSL(0, factory, context, interface="127.0.0.1")

    async def stop(self) -> None:
        await self._port.stopListening()
        for connection in list(self._connections):
            connection.abortConnection()

    @property
    def port(self) -> int:
        return int(self._port.getHost().port)

    @property
    def targets(self) -> list[str]:
        """What was asked for: HOST:PORT, or a URL."""
        return [head.split(" ")[1] for head in self.heads]

    def lets_in(self, head: str) -> bool:
        expected = "proxy-authorization: basic " + base64.b64encode(self.user.encode()).decode()
        return not self.user or expected.lower() in head.lower().split("\r\n")


class _Side(Protocol):
    """One of two connections that are joined."""

    other: Any = None

    def dataReceived(self, data: bytes) -> None:
        self.other.transport.write(data)

    def connectionLost(self, reason: Failure = connectionDone) -> None:
        if self.other is not None:
            self.other.transport.loseConnection()


class _Client(_Side):
    def __init__(self, proxy: ConnectProxy) -> None:
        self._proxy = proxy
        self._received = b""

    def connectionMade(self) -> None:
        self._proxy._connections.add(self.transport)

    def connectionLost(self, reason: Failure = connectionDone) -> None:
        self._proxy._connections.discard(self.transport)
        super().connectionLost(reason)

    def dataReceived(self, data: bytes) -> None:
        if self.other is not None:
            super().dataReceived(data)
            return
        self._received += data
        head, end, rest = self._received.partition(b"\r\n\r\n")
        if end:
            self._received = b""
            self._ask(head.decode("latin-1"), rest)

    def _ask(self, head: str, rest: bytes) -> None:
        self._proxy.heads.append(head)
        if self._proxy.answers:
            self._refuse(self._proxy.answers.pop(0))
            return
        if not self._proxy.lets_in(head):
            self._refuse('407 Proxy Authentication Required\r\nProxy-Authenticate: Basic realm="test"')
            return
        method, target, _ = head.split("\r\n")[0].split(" ")
        path = ""
        if method != "CONNECT":
            target, _, path = target.removeprefix("http://").partition("/")
            target += "" if ":" in target else ":80"
        host, _, port = self._proxy.hosts.get(target, target).rpartition(":")
        far_end = HostnameEndpoint(reactor, host.strip("[]"), int(port))
        connecting = far_end.connect(Factory.forProtocol(_Side))
        if method == "CONNECT":
            connecting.addCallback(self._join, b"HTTP/1.1 200 Connection established\r\n\r\n", rest)
        else:
            connecting.addCallback(self._join, b"", _forwarded(method, path, head) + rest)
        connecting.addErrback(lambda _: self._refuse("502 Bad Gateway"))

    def _join(self, side: _Side, reply: bytes, request: bytes) -> None:
        assert self.transport is not None and side.transport is not None
        self.other, side.other = side, self
        self.transport.write(reply)
        side.transport.write(request)

    def _refuse(self, status: str) -> None:
        assert self.transport is not None
        self.transport.write(f"HTTP/1.1 {status}\r\nContent-Length: 0\r\n\r\n".encode())
        self.transport.loseConnection()


def _forwarded(method: str, path: str, head: str) -> bytes:
    """A request without what is for the proxy; its connection carries no other."""
    fields = [
        line for line in head.split("\r\n")[1:] if not line.lower().startswith(("proxy-", "connection:"))
    ]
    return "\r\n".join([f"{method} /{path} HTTP/1.1", *fields, "Connection: close", "", ""]).encode()
