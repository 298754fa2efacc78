"""A transport for UNIX sockets that sends spans of files without a copy through this process."""

from __future__ import annotations

import errno
import os
import socket
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from twisted.internet.abstract import FileDescriptor
from twisted.internet.address import UNIXAddress
from twisted.internet.defer import Deferred
from twisted.internet.error import ConnectionAborted, ConnectionLost
from twisted.internet.interfaces import IProtocol, ITransport
from twisted.internet.main import CONNECTION_DONE, CONNECTION_LOST
from twisted.logger import Logger
from twisted.python.failure import Failure
from zope.interface import Attribute, implementer

from erofs_twisted.interfaces import FileSpan, Segment

TURN = 4 << 20
"""Bytes that a transport sends before others get their turn, however fast its peer takes them."""

SEND_BUFFER = 1 << 20
"""Bytes that the kernel is asked to hold for the peer: with few, each piece wakes up both sides."""

LATE = 0.1
"""Seconds after which it is no longer taken for granted that what waits for the peer is still in memory."""

Sendable = Segment | bytearray

_SO_SNDBUFFORCE = 32  # <asm-generic/socket.h>; the socket module has no name for it


class ISpanTransport(ITransport):
    """A transport that takes spans of files too."""

    bring: Callable[[FileSpan], Deferred[Any] | None] | None = Attribute(
        "None, or what a `FileSpan` is given to that the peer has made wait, before it is sent: it returns "
        "None if the span is still in memory, else a Deferred that fires when it is again."
    )

    def write_segments(segments: Sequence[Sendable]) -> None:
        """Send ``segments`` in order, at once as far as the peer takes them.

        Where a `FileSpan` cannot be read in full when its turn comes, the connection is lost: what went
        before it cannot be taken back. Like ``write``, this does nothing when the connection is lost already,
        and never calls the protocol's ``connectionLost`` itself.
        """


@implementer(ISpanTransport)
class SpanTransport(FileDescriptor):
    """One end of a UNIX stream socket.

    Unlike Twisted's own transports it sends within ``write``, and it asks a streaming producer to pause as
    soon as anything is left over. Its parameters are those that `twisted.internet.unix.Port` gives.
    """

    bufferSize = 16 << 10  # of requests: enough for hundreds, few enough to be a fair share of the reactor
    reactor: Any
    bring: Callable[[FileSpan], Deferred[Any] | None] | None = None
    _log = Logger()

    def __init__(
        self,
        sock: socket.socket,
        protocol: IProtocol,
        client: object = None,
        server: object = None,
        sessionno: int = 0,
        reactor: Any = None,
    ) -> None:
        super().__init__(reactor)
        sock.setblocking(False)
        _set_send_buffer(sock)
        self.socket = sock
        self._fd = sock.fileno()
        self.protocol = protocol
        self.connected = 1
        self._queue: deque[bytes | bytearray | memoryview | FileSpan] = deque()
        self._queued_since = 0.0
        self._bringing: Deferred[None] | None = None
        self._brought = False
        self._allowance = TURN
        self._failure: ConnectionLost | None = None
        self._aborted = False
        self.reactor.addReader(self)

    def fileno(self) -> int:
        return self.socket.fileno()

    def getHost(self) -> UNIXAddress:
        return UNIXAddress(self.socket.getsockname() or None)

    def getPeer(self) -> UNIXAddress:
        return UNIXAddress(self.socket.getpeername() or None)

    def logPrefix(self) -> str:
        return type(self.protocol).__name__

    def write(self, data: bytes) -> None:
        self.write_segments((data,))

    def writeSequence(self, iovec: Iterable[bytes]) -> None:
        self.write_segments(tuple(iovec))

    def write_segments(self, segments: Sequence[Sendable]) -> None:
        if not self.connected or self._writeDisconnected or self._aborted or self._failure:
            return
        goes_now = not self._queue
        self._enqueue(segments)
        if goes_now:
            self._send()
        if self._queue or self._failure:
            if goes_now:
                self._queued_since = self.reactor.seconds()
            self.reactor.addWriter(self)
            self._pause_producer()
        elif self.producer is not None and not self.streamingProducer:
            self.reactor.addWriter(self)  # only then is a pull producer asked for more

    def doRead(self) -> Exception | None:
        self._allowance = TURN
        try:
            data = self.socket.recv(self.bufferSize)
        except BlockingIOError:
            return None
        except OSError:
            return CONNECTION_LOST
        if not data:
            return CONNECTION_DONE
        self.protocol.dataReceived(data)
        return None

    def doWrite(self) -> Exception | None:
        if self._aborted:
            return None
        self._allowance = TURN
        if not self._failure and self._is_at_hand():
            self._send()
        if self._failure:
            return self._failure
        if self._queue:
            return None
        self.reactor.removeWriter(self)
        if self.producer is not None and (self.producerPaused or not self.streamingProducer):
            self.producerPaused = False
            self.producer.resumeProducing()  # type: ignore[attr-defined]
        elif self.disconnecting:
            return CONNECTION_DONE
        elif self._writeDisconnecting:
            self._writeDisconnected = True
            self.socket.shutdown(socket.SHUT_WR)
        return None

    def release(self) -> socket.socket:
        """Give the socket up, to whoever goes on with it. Only while nothing is queued; the protocol is told
        nothing."""
        assert not self._queue and not self.disconnected
        self._stop_bringing()
        self.reactor.removeReader(self)
        self.reactor.removeWriter(self)
        self.connected, self.disconnected = 0, 1
        return self.socket

    def abortConnection(self) -> None:
        """Lose the connection without sending what is still queued."""
        if self.disconnected or self._aborted:
            return
        self._aborted = True
        self._queue.clear()
        self._stop_bringing()
        self.reactor.removeReader(self)
        self.reactor.removeWriter(self)
        self.reactor.callLater(0, self.connectionLost, Failure(ConnectionAborted()))

    def connectionLost(self, reason: Failure) -> None:
        if self.disconnected:
            return
        super().connectionLost(reason)  # type: ignore[no-untyped-call]
        self._queue.clear()
        self._stop_bringing()
        try:
            self.socket.shutdown(socket.SHUT_RDWR)
        except OSError:
            self._log.debug("the peer was gone first")
        self.socket.close()
        self.protocol.connectionLost(reason)

    def _enqueue(self, segments: Sequence[Sendable]) -> None:
        """Queue ``segments``, neighbouring bytes as one: a call to the kernel costs more than a copy."""
        run: list[bytes | bytearray] = []
        for segment in segments:
            if isinstance(segment, FileSpan):
                if run:
                    self._queue.append(run[0] if len(run) == 1 else b"".join(run))
                    run = []
                self._queue.append(segment)
            elif segment:
                run.append(segment)
        if run:
            self._queue.append(run[0] if len(run) == 1 else b"".join(run))

    def _send(self) -> None:
        """Send until the queue is empty, the peer's buffer full, the turn over, or the connection lost."""
        queue = self._queue
        while queue and self._allowance > 0:
            head = queue[0]
            try:
                if isinstance(head, FileSpan):
                    sent = self._send_span(head)
                else:
                    sent = self._send_bytes(head, more=len(queue) > 1)
            except OSError as error:
                if error.errno not in (errno.EAGAIN, errno.ENOBUFS):
                    self._fail(error)
                return
            self._allowance -= sent

    def _is_at_hand(self) -> bool:
        """Whether what comes next can be sent without a wait for its disk; if not, it is sent when it can."""
        if self._bringing is not None:
            self.reactor.removeWriter(self)
            return False
        if self.bring is None or self.reactor.seconds() - self._queued_since <= LATE:
            return True
        head = self._queue[0] if self._queue else b""
        if not isinstance(head, FileSpan):
            self._allowance = len(head)
            return True
        self._allowance = min(head.length, SEND_BUFFER)
        if self._brought:  # so there is progress, even where memory is too short for what is to be sent
            self._brought = False
            return True
        bringing = self.bring(FileSpan(head.fd, head.offset, self._allowance))
        if bringing is None:
            return True
        self.reactor.removeWriter(self)
        self._bringing = bringing.addCallbacks(self._go_on, self._give_up)
        return False

    def _go_on(self, _: object) -> None:
        self._bringing, self._brought = None, True
        self.reactor.addWriter(self)

    def _give_up(self, failure: Failure) -> None:
        self._bringing = None
        if not self._aborted and not self.disconnected:
            assert failure.value is not None
            self._fail(failure.value)
            self.reactor.addWriter(self)

    def _stop_bringing(self) -> None:
        if self._bringing is not None:
            self._bringing.cancel()

    def _pause_producer(self) -> None:
        if self.producer is not None and self.streamingProducer and not self.producerPaused:
            self.producerPaused = True
            self.producer.pauseProducing()  # type: ignore[attr-defined]

    def _fail(self, error: BaseException) -> None:
        """Have the reactor lose the connection when it comes by next."""
        self._queue.clear()
        self._failure = CONNECTION_LOST
        if not isinstance(error, ConnectionError):
            self._failure = ConnectionLost(str(error))
            self._log.error("a client is cut off in the middle of a reply: {reason}", reason=str(error))

    def _send_bytes(self, data: bytes | bytearray | memoryview, *, more: bool) -> int:
        sent = self.socket.send(data, socket.MSG_MORE if more else 0)
        if sent == len(data):
            self._queue.popleft()
        else:
            self._queue[0] = memoryview(data)[sent:]
        return sent

    def _send_span(self, span: FileSpan) -> int:
        length = min(span.length, self._allowance)
        sent = os.sendfile(self._fd, span.fd, span.offset, length)
        if sent == 0:
            raise OSError(errno.EIO, f"file descriptor {span.fd} has no byte at {span.offset}")
        if sent == span.length:
            self._queue.popleft()
        else:
            self._queue[0] = FileSpan(span.fd, span.offset + sent, span.length - sent)
        return sent


def _set_send_buffer(sock: socket.socket) -> None:
    try:  # with CAP_NET_ADMIN, beyond the limit of net.core.wmem_max
        sock.setsockopt(socket.SOL_SOCKET, _SO_SNDBUFFORCE, SEND_BUFFER)
    except PermissionError:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER)
