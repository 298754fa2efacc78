"""Serves exports to NBD clients: kernels and programs."""

from __future__ import annotations

import socket
from collections.abc import Iterable, Sequence
from typing import Any

from twisted.internet.defer import Deferred, DeferredList, execute, gatherResults, maybeDeferred
from twisted.internet.interfaces import IAddress, IListeningPort
from twisted.internet.protocol import Factory
from zope.interface import implementer

from erofs_twisted.interfaces import HandedConnection, IExport, INBDServer
from erofs_twisted.nbd.handshake import Agreed, Handshake
from erofs_twisted.nbd.pages import DiskReaders
from erofs_twisted.nbd.port import SpanPort
from erofs_twisted.nbd.protocol import NBDServerProtocol
from erofs_twisted.nbd.transport import SpanTransport

DRAIN = 5.0
"""Seconds that `NBDServer.stop` gives requests under way to be answered."""

HOLD = 0.2
"""Seconds that `NBDServer.hand_over` gives requests under way to be answered; then they are handed over."""

CLOSE = 1.0
"""Seconds that `NBDServer.stop` gives clients to take the last replies."""


@implementer(INBDServer)
class NBDServer:
    """Any number of exports, clients and listening sockets, on one ``reactor``."""

    def __init__(self, reactor: Any) -> None:
        self._reactor = reactor
        self._connections: set[NBDServerProtocol] = set()
        self._ports: list[SpanPort] = []
        self._readers = DiskReaders(reactor)

    def adopt(self, sock: socket.socket, export: IExport) -> Deferred[None]:
        return self.go_on(HandedConnection(sock=sock), export)

    def go_on(self, connection: HandedConnection, export: IExport) -> Deferred[None]:
        """Serve ``export`` on a connection that another server has handed over; as `adopt` otherwise."""
        agreed = Agreed(export, structured=connection.structured, allocation=connection.allocation)
        protocol = self._connection(agreed)
        lost = protocol.when_lost()
        protocol.makeConnection(  # type: ignore[no-untyped-call]
            SpanTransport(connection.sock, protocol, reactor=self._reactor)
        )
        if connection.requests:
            protocol.dataReceived(connection.requests)
        return lost

    def listen(self, path: str, exports: Sequence[IExport]) -> Deferred[IListeningPort]:
        return execute(self._listen, path, exports)

    def _listen(self, path: str, exports: Sequence[IExport]) -> IListeningPort:
        port = SpanPort(path, _Clients(self, exports), self._reactor)
        port.startListening()
        self._ports.append(port)
        return port

    async def hand_over(self) -> list[HandedConnection]:
        """Give the connections of the transmission phase up, for another server to `go_on` with; what cannot
        be given is closed. Then `stop`."""
        serving = [each for each in self._connections if each.is_serving]
        held = DeferredList([each.hold() for each in serving], consumeErrors=True)
        _ = held.addTimeout(HOLD, self._reactor, onTimeoutCancel=lambda result, timeout: None)
        await held
        handed = [each.hand_over() for each in serving]
        return [each for each in handed if each is not None]

    async def stop(self, drain: float = DRAIN) -> None:
        """Listen no longer, refuse new requests, and close every connection.

        Requests under way have ``drain`` seconds to be answered, clients `CLOSE` seconds more to take the
        answers. Ends when every connection is closed, and no thread reads for one, unless a disk holds it.
        """
        ports, self._ports = self._ports, []
        await gatherResults([maybeDeferred(port.stopListening) for port in ports], consumeErrors=True)
        for connection in list(self._connections):
            connection.shut_down()
        await self._lost([each for each in self._connections if each.is_serving], drain)
        for connection in list(self._connections):
            connection.withdraw()
        await self._lost(self._connections, CLOSE)
        for connection in list(self._connections):
            connection.abort()
        await self._lost(self._connections, None)
        await self._readers.stop()

    async def _lost(self, connections: Iterable[NBDServerProtocol], seconds: float | None) -> None:
        """Wait until ``connections`` are all lost, or ``seconds`` are over."""
        lost = DeferredList([each.when_lost() for each in connections], consumeErrors=True)
        if seconds is not None:
            _ = lost.addTimeout(seconds, self._reactor, onTimeoutCancel=lambda result, timeout: None)
        await lost

    def _connection(self, opening: Handshake | Agreed) -> NBDServerProtocol:
        protocol = NBDServerProtocol(opening, self._readers)
        self._connections.add(protocol)
        _ = protocol.when_lost().addCallback(lambda _: self._connections.discard(protocol))
        return protocol


class _Clients(Factory):
    """Makes a protocol for each client of a listening socket."""

    noisy = False

    def __init__(self, server: NBDServer, exports: Sequence[IExport]) -> None:
        self._server = server
        self._exports = exports

    def logPrefix(self) -> str:
        return "NBD server"

    def buildProtocol(self, addr: IAddress | None) -> NBDServerProtocol:
        return self._server._connection(Handshake(self._exports))
