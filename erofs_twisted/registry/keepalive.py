"""TCP connections of which the kernel finds out when the other end is gone (tcp(7), ``TCP_KEEPIDLE``)."""

from __future__ import annotations

import socket
from typing import Any

import attrs
from twisted.internet.defer import Deferred
from twisted.internet.interfaces import IProtocol, IProtocolFactory, IStreamClientEndpoint, ITCPTransport
from zope.interface import implementer

PROBES = (("TCP_KEEPIDLE", 30), ("TCP_KEEPINTVL", 10), ("TCP_KEEPCNT", 3))
"""Seconds of silence before the first probe, seconds between probes, and how many go without an answer: a
minute in all, which is also how long a connection waits for its next request. Not all systems have them."""


@implementer(IStreamClientEndpoint)
@attrs.frozen
class KeptAlive:
    """The connections of an endpoint, which is one of TCP: TLS goes on top of this."""

    _endpoint: IStreamClientEndpoint

    def connect(self, protocolFactory: IProtocolFactory) -> Deferred[IProtocol]:
        return self._endpoint.connect(protocolFactory).addCallback(_keep_alive)


def _keep_alive(protocol: IProtocol) -> IProtocol:
    transport: Any = protocol.transport  # type: ignore[attr-defined]
    is_tcp: bool = ITCPTransport.providedBy(transport)
    if is_tcp:
        transport.setTcpKeepAlive(True)
        for name, value in PROBES:
            if hasattr(socket, name):
                transport.getHandle().setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
    return protocol
