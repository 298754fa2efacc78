"""NBD's server side as a Twisted protocol."""

from __future__ import annotations

import socket

from twisted.internet.defer import Deferred
from twisted.internet.protocol import Protocol, connectionDone
from twisted.logger import Logger
from twisted.python.failure import Failure

from erofs_twisted.interfaces import HandedConnection
from erofs_twisted.nbd.handshake import Agreed, Ended, Handshake
from erofs_twisted.nbd.pages import DiskReaders
from erofs_twisted.nbd.serving import Serving


class NBDServerProtocol(Protocol):
    """One client, from its first byte to its last.

    It opens with a handshake, or in the transmission phase where all is agreed beforehand, as with a kernel.
    ``readers`` are those of the server.
    """

    _log = Logger()

    def __init__(self, opening: Handshake | Agreed, readers: DiskReaders) -> None:
        self._opening = opening
        self._readers = readers
        self._serving: Serving | None = None
        self._agreed: Agreed | None = None
        self._ended = False
        self._waiting: list[Deferred[None]] = []

    @property
    def is_serving(self) -> bool:
        """Whether the client is in the transmission phase."""
        return self._serving is not None and not self._ended

    def when_lost(self) -> Deferred[None]:
        """A Deferred, another one for each call, that fires when the connection is lost."""
        lost: Deferred[None] = Deferred()
        if self._ended:
            lost.callback(None)
        else:
            self._waiting.append(lost)
        return lost

    def shut_down(self) -> None:
        """Refuse what the client asks for from now on; once served what it has asked for, it is closed."""
        if self._serving is not None:
            self._serving.shut_down()
        elif isinstance(self._opening, Handshake):
            self._opening.shutting_down = True

    def withdraw(self) -> None:
        """After `shut_down`: wait for nothing that is still under way."""
        if self._serving is not None:
            self._serving.withdraw()
        else:
            self._lose_connection()

    def hold(self) -> Deferred[None]:
        """Take no more requests of a client that `is_serving`; a Deferred that fires when those under way
        are answered. It may be cancelled."""
        assert self._serving is not None
        return self._serving.hold()

    def hand_over(self) -> HandedConnection | None:
        """After `hold`: the connection for somebody else to serve; to this protocol it is lost. None, and
        nothing happens, where it is in no state for that."""
        assert self._serving is not None and self._agreed is not None
        if self._ended or (requests := self._serving.hand_over()) is None:
            return None
        sock: socket.socket = self.transport.release()  # type: ignore[union-attr]
        self.connectionLost()
        return HandedConnection(
            sock=sock,
            requests=requests,
            structured=self._agreed.structured,
            allocation=self._agreed.allocation,
        )

    def abort(self) -> None:
        """Close at once, whatever is still to be sent."""
        if self.transport is not None:
            self.transport.abortConnection()  # type: ignore[attr-defined]

    def connectionMade(self) -> None:
        if isinstance(self._opening, Handshake):
            self._send(self._opening.greeting)
        else:
            self._serve(self._opening)

    def dataReceived(self, data: bytes) -> None:
        if self._serving is not None:
            self._serving.receive(data)
            return
        assert isinstance(self._opening, Handshake)
        if self._opening.outcome is not None:
            return
        self._send(self._opening.receive(data))
        outcome = self._opening.outcome
        if isinstance(outcome, Agreed):
            self._serve(outcome).receive(self._opening.rest)
        elif isinstance(outcome, Ended):
            self._log.debug("the handshake ended: {reason}", reason=outcome.reason)
            self._lose_connection()

    def connectionLost(self, reason: Failure = connectionDone) -> None:
        self._ended = True
        if self._serving is not None:
            self._serving.lost()
        waiting, self._waiting = self._waiting, []
        for lost in waiting:
            lost.callback(None)

    def _serve(self, agreed: Agreed) -> Serving:
        self._agreed = agreed
        self._serving = Serving(
            agreed.export,
            self.transport,
            self._readers,
            structured=agreed.structured,
            allocation=agreed.allocation,
        )
        # From here on nothing needs to stand between the transport and what serves.
        self.dataReceived = self._serving.receive  # type: ignore[method-assign]
        return self._serving

    def _send(self, data: bytes) -> None:
        if data and self.transport is not None:
            self.transport.write(data)

    def _lose_connection(self) -> None:
        if self.transport is not None:
            self.transport.loseConnection()
