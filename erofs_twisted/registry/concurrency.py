"""A limit of requests at a time for each origin, and so of connections: each request has one to itself."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import attrs
from twisted.internet.defer import Deferred, DeferredSemaphore
from twisted.internet.interfaces import IProtocol
from twisted.internet.protocol import Protocol, connectionDone
from twisted.python.components import proxyForInterface
from twisted.python.failure import Failure
from twisted.web.http_headers import Headers
from twisted.web.iweb import IAgent, IBodyProducer, IResponse
from zope.interface import implementer

from erofs_twisted.registry.urls import Origin

CONNECTIONS = 40
"""To one origin at a time: the 32 ranges of a queue, and some for tokens, manifests and traces."""


@implementer(IAgent)
@attrs.frozen
class LimitedAgent:
    """Makes up to ``limit`` requests of an origin at a time; others wait for their turn, in order.

    A request is over with the end of its answer's body, however that comes about. Cancelling one that waits
    gives up its place.
    """

    _agent: IAgent
    _limit: int = CONNECTIONS
    _turns: dict[Origin, DeferredSemaphore] = attrs.field(factory=dict, init=False)
    """Of the origins that have requests."""

    def request(
        self,
        method: bytes,
        uri: bytes,
        headers: Headers | None = None,
        bodyProducer: IBodyProducer | None = None,
    ) -> Deferred[IResponse]:
        return Deferred.fromCoroutine(self._request(method, uri, headers, bodyProducer))

    async def _request(
        self, method: bytes, uri: bytes, headers: Headers | None, body: IBodyProducer | None
    ) -> IResponse:
        origin = _origin(b"/".join(uri.split(b"/", 3)[:3]))
        turns = self._turns.setdefault(origin, DeferredSemaphore(self._limit))
        await turns.acquire()
        try:
            response = await self._agent.request(method, uri, headers, body)
        except BaseException:
            self._release(origin, turns)
            raise
        return _Counted(response, lambda: self._release(origin, turns))

    def _release(self, origin: Origin, turns: DeferredSemaphore) -> None:
        turns.release()  # where another request waits, it goes on within this
        if turns.tokens == turns.limit and self._turns.get(origin) is turns:
            del self._turns[origin]


@lru_cache(maxsize=64)
def _origin(root: bytes) -> Origin:
    return Origin.of(root.decode("ascii"))


class _Counted(proxyForInterface(IResponse)):  # type: ignore[misc]
    """An answer of which it is told when its body has ended."""

    def __init__(self, response: IResponse, ended: Callable[[], None]) -> None:
        super().__init__(response)
        self._ended = ended

    def deliverBody(self, protocol: IProtocol) -> None:
        self.original.deliverBody(_CountedBody(protocol, self._ended))


class _CountedBody(Protocol):
    def __init__(self, protocol: IProtocol, ended: Callable[[], None]) -> None:
        self._protocol = protocol
        self._ended = ended

    def connectionMade(self) -> None:
        assert self.transport is not None
        self._protocol.makeConnection(self.transport)

    def dataReceived(self, data: bytes) -> None:
        self._protocol.dataReceived(data)

    def connectionLost(self, reason: Failure = connectionDone) -> None:
        self._ended()
        self._protocol.connectionLost(reason)
