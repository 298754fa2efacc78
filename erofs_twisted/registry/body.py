"""Bodies of responses, taken as they come, with a time limit of their own.

An agent's time limit ends with the headers, and its responses can only be read to their end. Here a body that
stalls fails, and one that is no longer wanted is cut off at once.
"""

from __future__ import annotations

from collections.abc import Callable

from twisted.internet.defer import Deferred
from twisted.internet.interfaces import IDelayedCall, IReactorTime
from twisted.internet.protocol import Protocol, connectionDone
from twisted.python.failure import Failure
from twisted.web.client import ResponseDone
from twisted.web.http import PotentialDataLoss
from twisted.web.iweb import UNKNOWN_LENGTH, IResponse

from erofs_twisted.registry.errors import TransferFailed
from erofs_twisted.registry.failures import broken_off

Taker = Callable[[bytes], bool]
"""Takes the next piece of a body and says whether it wants more."""

SMALL_BODY = 64 * 1024
"""Bytes of an unwanted body that are cheaper to read than a new connection would be."""


def receive(response: IResponse, take: Taker, clock: IReactorTime, stall_timeout: float) -> Deferred[None]:
    """Give the body to ``take``, piece by piece; fires at its end, or when ``take`` wants no more.

    Fails with a temporary `TransferFailed` if the body breaks off, or if nothing comes for ``stall_timeout``
    seconds; with whatever ``take`` raises. Then, when cancelled and when ``take`` has enough the connection
    is closed at once.
    """
    body = _Body(take, clock, stall_timeout)
    response.deliverBody(body)
    return body.finished


def read_body(response: IResponse, limit: int, clock: IReactorTime, stall_timeout: float) -> Deferred[bytes]:
    """The whole body. Fails like `receive`, and with `TransferFailed` if it has more than ``limit`` bytes."""
    pieces: list[bytes] = []
    received = 0

    def take(data: bytes) -> bool:
        nonlocal received
        received += len(data)
        if received > limit:
            raise TransferFailed(f"the answer has more than the {limit} bytes that are allowed")
        pieces.append(data)
        return True

    return receive(response, take, clock, stall_timeout).addCallback(lambda _: b"".join(pieces))


async def discard(response: IResponse, clock: IReactorTime, stall_timeout: float) -> None:
    """Have done with a body that nobody wants, and keep its connection if that is cheap."""
    length = response.length
    left = 0 if length != UNKNOWN_LENGTH and length > SMALL_BODY else SMALL_BODY

    def take(data: bytes) -> bool:
        nonlocal left
        left -= len(data)
        return left >= 0

    if left == 0:
        abandon(response)
        return
    try:
        await receive(response, take, clock, stall_timeout)
    except TransferFailed:
        return


def abandon(response: IResponse) -> None:
    """Close the connection of a response whose body was not asked for."""
    response.deliverBody(_Abort())


class _Abort(Protocol):
    def connectionMade(self) -> None:
        _abort(self)


class _Body(Protocol):
    def __init__(self, take: Taker, clock: IReactorTime, stall_timeout: float) -> None:
        self.finished: Deferred[None] = Deferred(lambda _: self._stop())
        self._take = take
        self._clock = clock
        self._stall_timeout = stall_timeout
        self._timer: IDelayedCall | None = None
        self._done = False

    def connectionMade(self) -> None:
        self._timer = self._clock.callLater(self._stall_timeout, self._stalled)

    def dataReceived(self, data: bytes) -> None:
        if self._done:
            return
        if self._timer is not None:
            self._timer.reset(self._stall_timeout)
        try:
            wants_more = self._take(data)
        except Exception:  # noqa: BLE001 - whatever went wrong belongs to who awaits the body
            self._stop()
            self.finished.errback(Failure())
            return
        if not wants_more and not self._done:
            self._stop()
            self.finished.callback(None)

    def connectionLost(self, reason: Failure = connectionDone) -> None:
        if self._done:
            return
        self._finish()
        if reason.check(ResponseDone, PotentialDataLoss):
            self.finished.callback(None)
        else:
            self.finished.errback(broken_off(reason))

    def _stalled(self) -> None:
        self._timer = None
        self._stop()
        self.finished.errback(
            TransferFailed(f"nothing came for {self._stall_timeout:g} seconds", temporary=True)
        )

    def _finish(self) -> None:
        self._done = True
        timer, self._timer = self._timer, None
        if timer is not None and timer.active():
            timer.cancel()

    def _stop(self) -> None:
        self._finish()
        _abort(self)


def _abort(protocol: Protocol) -> None:
    # What a body's protocol has for a transport only knows loseConnection, which over TLS waits for the
    # peer's farewell, behind all the rest of the body. So reach for the connection itself.
    proxy = protocol.transport
    connection = getattr(proxy, "_producer", None) or proxy
    if connection is not None:
        getattr(connection, "abortConnection", connection.loseConnection)()
