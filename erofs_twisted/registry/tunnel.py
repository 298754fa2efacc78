"""A connection through a proxy's ``CONNECT``, as an endpoint: TLS on top of it is with the far end."""

from __future__ import annotations

from typing import Any

import attrs
from twisted.internet.defer import Deferred
from twisted.internet.defer import TimeoutError as TimedOut
from twisted.internet.error import NoProtocol
from twisted.internet.interfaces import (
    IAddress,
    IProtocol,
    IProtocolFactory,
    IReactorTime,
    IStreamClientEndpoint,
)
from twisted.internet.protocol import Factory, Protocol, connectionDone
from twisted.python.failure import Failure
from zope.interface import implementer

from erofs_twisted.registry.connect import ConnectReply, ReplyReader, connect_request
from erofs_twisted.registry.errors import InvalidHeader, TransferFailed, Unreachable
from erofs_twisted.registry.failures import NETWORK_FAILURES, is_cancellation
from erofs_twisted.registry.proxies import Proxy
from erofs_twisted.registry.proxyfailures import connection_failure, refusal
from erofs_twisted.steadyclock import unix_time

REPLY_TIMEOUT = 10.0
"""Seconds for a proxy to connect to the far end, and to say so."""


@implementer(IStreamClientEndpoint)
@attrs.frozen
class Tunnel:
    """Connects to ``target``, HOST:PORT, by way of ``proxy``, to which ``way`` leads."""

    _clock: IReactorTime
    _proxy: Proxy
    _way: IStreamClientEndpoint
    _target: str
    _user_agent: str

    def connect(self, protocolFactory: IProtocolFactory) -> Deferred[IProtocol]:
        """As `IStreamClientEndpoint.connect`. Fails with a `TransferFailed` that names the proxy."""
        return Deferred.fromCoroutine(self._connect(protocolFactory))

    async def _connect(self, factory: IProtocolFactory) -> IProtocol:
        request = connect_request(self._target, self._user_agent, self._proxy.credentials)
        try:
            opening = await self._way.connect(_OpeningFactory(request, factory))
            assert isinstance(opening, _Opening)
            return await opening.opened.addTimeout(REPLY_TIMEOUT, self._clock)
        except TimedOut as error:
            raise self._timed_out() from error
        except NETWORK_FAILURES as error:
            if is_cancellation(error):
                raise
            raise connection_failure(self._proxy, error) from error
        except InvalidHeader as error:
            raise TransferFailed(
                f"the proxy {self._proxy.url} answers CONNECT by {error} (is {self._proxy.variable} right?)"
            ) from error
        except _Refused as error:
            raise refusal(self._proxy, self._target, error.reply, unix_time(self._clock)) from None

    def _timed_out(self) -> Unreachable:
        return Unreachable(
            f"the proxy {self._proxy.url} did not connect us to {self._target} "
            f"within {REPLY_TIMEOUT:g} seconds",
            temporary=True,
        )


class _Refused(Exception):
    def __init__(self, reply: ConnectReply) -> None:
        super().__init__(reply.code)
        self.reply = reply


class _Opening(Protocol):
    """Asks the proxy, and when that has opened the tunnel, passes on all that comes to the protocol that is
    for its end, which has the same transport as this one."""

    def __init__(self, request: bytes, factory: IProtocolFactory, address: Any) -> None:
        self.opened: Deferred[IProtocol] = Deferred(lambda _: self._abort())
        self._request = request
        self._factory = factory
        self._address = address
        self._reader = ReplyReader()
        self._protocol: IProtocol | None = None

    def connectionMade(self) -> None:
        assert self.transport is not None
        self.transport.write(self._request)

    def dataReceived(self, data: bytes) -> None:
        if self._protocol is not None:
            self._protocol.dataReceived(data)
        elif not self.opened.called:
            self._look_at(data)

    def connectionLost(self, reason: Failure = connectionDone) -> None:
        if self._protocol is not None:
            self._protocol.connectionLost(reason)
        elif not self.opened.called:
            self.opened.errback(reason)

    def _look_at(self, data: bytes) -> None:
        try:
            reply = self._reader.feed(data)
        except InvalidHeader:
            self._abort()
            self.opened.errback()
            return
        if reply is not None and reply.is_open:
            self._open(reply.rest)
        elif reply is not None:
            self._abort()
            self.opened.errback(_Refused(reply))

    def _open(self, rest: bytes) -> None:
        protocol = self._factory.buildProtocol(self._address)
        if protocol is None:
            self._abort()
            self.opened.errback(NoProtocol())
            return
        assert self.transport is not None
        self._protocol = protocol
        protocol.makeConnection(self.transport)
        self.opened.callback(protocol)
        if rest:
            protocol.dataReceived(rest)

    def _abort(self) -> None:
        assert self.transport is not None
        getattr(self.transport, "abortConnection", self.transport.loseConnection)()


class _OpeningFactory(Factory):
    noisy = False

    def __init__(self, request: bytes, factory: IProtocolFactory) -> None:
        self._request = request
        self._factory = factory

    def doStart(self) -> None:
        self._factory.doStart()

    def doStop(self) -> None:
        self._factory.doStop()

    def buildProtocol(self, addr: IAddress | None) -> _Opening:
        return _Opening(self._request, self._factory, addr)
