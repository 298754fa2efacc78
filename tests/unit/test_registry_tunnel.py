"""The way through a proxy, without a network: a test is the proxy."""

from __future__ import annotations

import socket
from typing import Any

import attrs
from OpenSSL import SSL
from twisted.internet.address import IPv4Address, IPv6Address
from twisted.internet.defer import CancelledError, Deferred
from twisted.internet.error import (
    ConnectingCancelledError,
    ConnectionDone,
    ConnectionRefusedError,
    DNSLookupError,
    NoProtocol,
)
from twisted.internet.interfaces import (
    IHostnameResolver,
    IHostResolution,
    IProtocol,
    IProtocolFactory,
    IResolutionReceiver,
    IStreamClientEndpoint,
    ITCPTransport,
)
from twisted.internet.protocol import Factory, Protocol, connectionDone
from twisted.internet.task import Clock
from twisted.internet.testing import MemoryReactorClock, StringTransport
from twisted.python.failure import Failure
from twisted.trial.unittest import SynchronousTestCase
from twisted.web.client import ResponseNeverReceived
from twisted.web.http_headers import Headers
from zope.interface import implementer

from erofs_twisted.registry.errors import AccessDenied, TransferFailed, Unreachable
from erofs_twisted.registry.keepalive import KeptAlive
from erofs_twisted.registry.proxies import Proxies, Proxy
from erofs_twisted.registry.proxyagent import PlainProxyAgent
from erofs_twisted.registry.tls import TLSPolicy
from erofs_twisted.registry.transport import Transport
from erofs_twisted.registry.tunnel import REPLY_TIMEOUT, Tunnel
from tests.unit.fakehttp import FakeAgent

PROXY = Proxy.parse("http://us3r:tops3cret@proxy.example:3128", "https_proxy")
PLAIN = Proxy.parse("http://us3r:tops3cret@proxy.example:3128", "http_proxy")
OPEN = b"HTTP/1.1 200 Connection established\r\n\r\n"


class Remembering(Protocol):
    """What comes, and why nothing more does."""

    def __init__(self) -> None:
        self.data = b""
        self.reason: Failure | None = None

    def dataReceived(self, data: bytes) -> None:
        self.data += data

    def connectionLost(self, reason: Failure = connectionDone) -> None:
        self.reason = reason


@implementer(IStreamClientEndpoint)
@attrs.define(eq=False)
class Way:
    """An endpoint at whose other end is the test."""

    transport: Any = attrs.field(factory=StringTransport)
    protocol: Any = None
    is_cancelled: bool = False
    _factory: Any = None
    _connected: Deferred[Any] = attrs.field(init=False)

    def connect(self, protocolFactory: IProtocolFactory) -> Deferred[IProtocol]:
        self._factory = protocolFactory
        self._connected = Deferred(self._cancel)
        return self._connected

    def _cancel(self, connected: Deferred[Any]) -> None:
        self.is_cancelled = True
        connected.errback(ConnectingCancelledError(None))

    def come_about(self) -> None:
        self.protocol = self._factory.buildProtocol(None)
        self.protocol.makeConnection(self.transport)
        self._connected.callback(self.protocol)

    def fail(self, error: BaseException) -> None:
        self._connected.errback(error)


class TunnelTests(SynchronousTestCase):
    def setUp(self) -> None:
        self.clock = Clock()
        self.way = Way()
        self.tunnel = Tunnel(self.clock, PROXY, self.way, "a.example:443", "erofs-twisted/1")
        self.factory = Factory.forProtocol(Remembering)

    def connect(self) -> Deferred[Any]:
        return self.tunnel.connect(self.factory)

    def failure(self, *pieces: bytes) -> TransferFailed:
        connecting = self.connect()
        self.way.come_about()
        for piece in pieces:
            self.way.protocol.dataReceived(piece)
        return self.error(connecting)

    def error(self, connecting: Deferred[Any]) -> TransferFailed:
        error = self.failureResultOf(connecting, TransferFailed).value
        assert isinstance(error, TransferFailed)
        self.assertNotIsInstance(error, AccessDenied)  # that would be the registry's word
        self.assertIn("proxy http://proxy.example:3128", str(error))
        for secret in ("us3r", "tops3cret", "dXMzcjp0b3BzM2NyZXQ="):
            self.assertNotIn(secret, f"{error!r} {error.__cause__!r} {error.__context__!r}")
        self.assertEqual([], self.clock.getDelayedCalls())
        return error

    def test_neither_user_nor_password_is_in_its_repr(self) -> None:
        self.assertIn("proxy.example", repr(self.tunnel))
        self.assertNotIn("tops3cret", repr(self.tunnel))
        self.assertNotIn("us3r", repr(self.tunnel))

    def test_the_protocol_begins_when_the_proxy_has_opened_the_tunnel(self) -> None:
        connecting = self.connect()
        self.way.come_about()
        self.assertTrue(self.way.transport.value().startswith(b"CONNECT a.example:443 HTTP/1.1\r\n"))
        self.assertIn(b"Proxy-Authorization: Basic dXMzcjp0b3BzM2NyZXQ=", self.way.transport.value())
        self.way.protocol.dataReceived(OPEN[:20])
        self.assertNoResult(connecting)
        self.way.protocol.dataReceived(OPEN[20:])
        protocol = self.successResultOf(connecting)
        self.assertIsInstance(protocol, Remembering)
        self.assertIs(self.way.transport, protocol.transport)
        self.assertEqual([], self.clock.getDelayedCalls())

    def test_what_comes_behind_the_reply_is_the_protocols(self) -> None:
        connecting = self.connect()
        self.way.come_about()
        self.way.protocol.dataReceived(OPEN + b"first ")
        self.way.protocol.dataReceived(b"HTTP/1.1 407 is no reply now\r\n\r\n")
        protocol = self.successResultOf(connecting)
        self.assertEqual(b"first HTTP/1.1 407 is no reply now\r\n\r\n", protocol.data)

    def test_the_end_of_the_connection_is_the_protocols(self) -> None:
        connecting = self.connect()
        self.way.come_about()
        self.way.protocol.dataReceived(OPEN)
        protocol = self.successResultOf(connecting)
        reason = Failure(ConnectionDone())
        self.way.protocol.connectionLost(reason)
        self.assertIs(reason, protocol.reason)

    def test_407_without_basic_is_said(self) -> None:
        error = self.failure(b"HTTP/1.1 407 No\r\nProxy-Authenticate: Negotiate\r\n\r\n")
        self.assertFalse(error.temporary)
        self.assertIn("negotiate", str(error))

    def test_407_says_that_what_the_variable_holds_is_wrong(self) -> None:
        error = self.failure(b'HTTP/1.1 407 No\r\nProxy-Authenticate: Basic realm="x"\r\n\r\n')
        self.assertFalse(error.temporary)
        self.assertIn("refuses the user and password in https_proxy", str(error))
        self.assertTrue(self.way.transport.disconnecting)

    def test_401_is_the_proxys_too_when_it_is_asked_for_a_tunnel(self) -> None:
        error = self.failure(b"HTTP/1.0 401 No\r\nWWW-Authenticate: Basic realm=x\r\n\r\n")
        self.assertIn("refuses the user and password in https_proxy", str(error))

    def test_407_says_where_user_and_password_go(self) -> None:
        self.tunnel = attrs.evolve(self.tunnel, proxy=attrs.evolve(PROXY, credentials=None))
        for fields in (b"", b"Proxy-Authenticate: Basic realm=x\r\n", b"Proxy-Authenticate: ((\r\n"):
            error = self.failure(b"HTTP/1.1 407 No\r\n" + fields + b"\r\n")
            self.assertIn("https_proxy=http://USER:PASSWORD@proxy.example:3128", str(error))

    def test_what_the_proxy_forbids_is_permanent_and_the_way_around_is_said(self) -> None:
        for code in (400, 403, 404, 405, 501, 301, 101):
            error = self.failure(f"HTTP/1.1 {code} Filtered\x01\r\n\r\n".replace("\x01", "\t").encode())
            self.assertFalse(error.temporary, code)
            self.assertIn(f"a.example:443: {code} Filtered (NO_PROXY", str(error))

    def test_a_far_end_that_the_proxy_cannot_reach_may_come_back(self) -> None:
        for code in (500, 502, 503, 504, 429):
            error = self.failure(f"HTTP/1.1 {code} Away\r\nRetry-After: 7\r\n\r\n".encode())
            self.assertIsInstance(error, Unreachable)
            self.assertEqual((True, 7.0), (error.temporary, error.retry_after))
            self.assertIn(f"a.example:443: {code} Away", str(error))

    def test_what_is_no_http_is_permanent(self) -> None:
        error = self.failure(b"SSH-2.0-OpenSSH")
        self.assertFalse(error.temporary)
        self.assertIn("is https_proxy right?", str(error))
        self.assertTrue(self.way.transport.disconnecting)

    def test_what_comes_after_a_refusal_is_not_looked_at(self) -> None:
        self.failure(b"HTTP/1.1 403 No\r\n\r\n", OPEN)

    def test_a_proxy_that_cannot_be_reached_is_said_and_may_come_back(self) -> None:
        for cause in (ConnectionRefusedError("refused"), DNSLookupError("no such name")):
            connecting = self.connect()
            self.way.fail(cause)
            error = self.error(connecting)
            self.assertIsInstance(error, Unreachable)
            self.assertTrue(error.temporary)
            self.assertIn("https_proxy names it", str(error))
            self.assertIn(str(cause), str(error))

    def test_a_proxy_that_hangs_up_may_do_better_the_next_time(self) -> None:
        connecting = self.connect()
        self.way.come_about()
        self.way.protocol.connectionLost(Failure(ConnectionDone()))
        self.assertTrue(self.error(connecting).temporary)

    def test_what_tls_to_the_proxy_finds_wrong_stays_wrong(self) -> None:
        for reason, said in (
            ("certificate verify failed", "certificate verify failed"),
            ("wrong version number", "https_proxy=http://proxy.example:3128 says so"),
        ):
            connecting = self.connect()
            self.way.come_about()
            self.way.protocol.connectionLost(Failure(SSL.Error([("SSL routines", "", reason)])))
            error = self.error(connecting)
            self.assertFalse(error.temporary)
            self.assertIn(said, str(error))

    def test_a_proxy_that_says_nothing_is_given_up(self) -> None:
        connecting = self.connect()
        self.way.come_about()
        self.clock.advance(REPLY_TIMEOUT - 1)
        self.assertNoResult(connecting)
        self.clock.advance(1)
        error = self.error(connecting)
        self.assertIsInstance(error, Unreachable)
        self.assertIn("within 10 seconds", str(error))
        self.assertTrue(self.way.transport.disconnecting)
        self.way.protocol.connectionLost(Failure(ConnectionDone()))

    def test_cancelling_while_it_connects_ends_that(self) -> None:
        connecting = self.connect()
        connecting.cancel()
        self.failureResultOf(connecting, ConnectingCancelledError)
        self.assertTrue(self.way.is_cancelled)

    def test_cancelling_while_the_proxy_thinks_closes_the_connection(self) -> None:
        connecting = self.connect()
        self.way.come_about()
        connecting.cancel()
        self.failureResultOf(connecting, CancelledError)
        self.assertTrue(self.way.transport.disconnecting)
        self.assertEqual([], self.clock.getDelayedCalls())
        self.way.protocol.dataReceived(OPEN)
        self.way.protocol.connectionLost(Failure(ConnectionDone()))

    def test_a_factory_without_a_protocol_closes_the_connection(self) -> None:
        self.factory.buildProtocol = lambda addr: None  # type: ignore[method-assign]
        connecting = self.connect()
        self.way.come_about()
        self.way.protocol.dataReceived(OPEN)
        self.failureResultOf(connecting, NoProtocol)
        self.assertTrue(self.way.transport.disconnecting)


class PlainProxyTests(SynchronousTestCase):
    """Requests for http URLs."""

    def setUp(self) -> None:
        self.direct, self.proxied = FakeAgent(), FakeAgent()
        environ = {"http_proxy": "http://us3r:tops3cret@proxy.example:3128", "no_proxy": "b.example"}
        self.agent = PlainProxyAgent(self.direct, self.proxied, Proxies.from_environment(environ))

    def request(self, url: str) -> Deferred[Any]:
        return self.agent.request(b"GET", url.encode(), Headers({"Range": ["bytes=0-1"]}))

    def test_an_http_url_goes_to_the_proxy_as_a_whole_with_credentials_for_it(self) -> None:
        self.request("http://a.example/v2/?x=1")
        self.assertEqual((["http://a.example/v2/?x=1"], []), (self.proxied.urls, self.direct.urls))
        headers = self.proxied.last.headers
        self.assertEqual("Basic dXMzcjp0b3BzM2NyZXQ=", headers["proxy-authorization"])
        self.assertEqual("bytes=0-1", headers["range"])

    def test_all_else_goes_elsewhere_without_credentials(self) -> None:
        for url in ("https://a.example/", "http://b.example/", "http://localhost:5000/"):
            self.request(url)
            self.assertEqual(url, self.direct.last.url)
            self.assertNotIn("proxy-authorization", self.direct.last.headers)
        self.assertEqual([], self.proxied.urls)

    def test_the_registrys_answers_are_passed_on(self) -> None:
        for code in (200, 401, 403, 503):
            answer = self.request("http://a.example/")
            response = self.proxied.last.respond(code)
            self.assertIs(response, self.successResultOf(answer))

    def test_407_is_the_proxys_and_no_answer(self) -> None:
        answer = self.request("http://a.example/")
        response = self.proxied.last.respond(407, None, Proxy_Authenticate="Basic")
        error = self.failureResultOf(answer, TransferFailed).value
        self.assertIn("the proxy http://proxy.example:3128 refuses", str(error))
        self.assertNotIsInstance(error, AccessDenied)
        self.assertTrue(response.is_aborted)

    def test_a_proxy_that_cannot_be_reached_is_said(self) -> None:
        answer = self.request("http://a.example/")
        self.proxied.last.fail(ConnectionRefusedError())
        error = self.failureResultOf(answer, Unreachable).value
        self.assertIn("the proxy http://proxy.example:3128", str(error))
        self.assertIn("http_proxy names it", str(error))

    def test_cancelling_is_no_failure_of_the_proxy(self) -> None:
        answer = self.request("http://a.example/")
        answer.cancel()
        self.failureResultOf(answer, ResponseNeverReceived)
        self.assertTrue(self.proxied.last.is_cancelled)


@implementer(ITCPTransport)
class TCPTransport(StringTransport):
    """Writes down what its socket is told."""

    def __init__(self) -> None:
        super().__init__()
        self.told: list[tuple[int, int, int]] = []
        self.is_kept_alive = False

    def setTcpKeepAlive(self, enabled: bool) -> None:
        self.is_kept_alive = enabled

    def setTcpNoDelay(self, enabled: bool) -> None:
        """It makes no difference here."""

    def getHandle(self) -> TCPTransport:
        return self

    def setsockopt(self, level: int, option: int, value: int) -> None:
        self.told.append((level, option, value))


class KeepAliveTests(SynchronousTestCase):
    def test_the_kernel_is_told_to_probe(self) -> None:
        way = Way(TCPTransport())
        connecting = KeptAlive(way).connect(Factory.forProtocol(Remembering))
        way.come_about()
        self.assertIs(way.protocol, self.successResultOf(connecting))
        self.assertTrue(way.transport.is_kept_alive)
        expected = {socket.TCP_KEEPIDLE: 30, socket.TCP_KEEPINTVL: 10, socket.TCP_KEEPCNT: 3}
        self.assertEqual(
            {(socket.IPPROTO_TCP, option, value) for option, value in expected.items()},
            set(way.transport.told),
        )

    def test_what_is_no_tcp_connection_is_left_alone(self) -> None:
        way = Way()
        connecting = KeptAlive(way).connect(Factory.forProtocol(Remembering))
        way.come_about()
        self.assertIs(way.protocol, self.successResultOf(connecting))


@implementer(IHostnameResolver)
class TwoAddresses:
    """Every host has one of either kind."""

    def resolveHostName(
        self, resolutionReceiver: IResolutionReceiver, hostName: str, portNumber: int = 0, *more: object
    ) -> IHostResolution:
        resolution: Any = hostName
        resolutionReceiver.resolutionBegan(resolution)
        resolutionReceiver.addressResolved(IPv6Address("TCP", "2001:db8::1", portNumber))
        resolutionReceiver.addressResolved(IPv4Address("TCP", "192.0.2.1", portNumber))
        resolutionReceiver.resolutionComplete()
        return resolution


class RouteTests(SynchronousTestCase):
    """Where a `Transport` connects to, over sockets that are not there."""

    def ask(self, url: str, **proxies: Proxy) -> tuple[int, bytes]:
        """The port that was connected to, and what was sent there first."""
        reactor = MemoryReactorClock()
        transport = Transport.over_sockets(reactor, TLSPolicy(), proxies=Proxies(**proxies))
        answer = Deferred.fromCoroutine(transport.get(url, {}, 10))
        ((_, port, factory, _, _),) = reactor.tcpClients
        protocol = factory.buildProtocol(None)
        wire = TCPTransport()
        protocol.makeConnection(wire)
        self.assertTrue(wire.is_kept_alive)
        answer.addErrback(lambda _: None)
        answer.cancel()
        return port, wire.value()

    def test_without_proxies_hosts_are_asked_themselves(self) -> None:
        port, sent = self.ask("http://a.example:5000/x")
        self.assertEqual(5000, port)
        self.assertTrue(sent.startswith(b"GET /x HTTP/1.1\r\n"), sent)

    def test_an_https_url_is_asked_through_a_tunnel(self) -> None:
        port, sent = self.ask("https://a.example/x", https=PROXY)
        self.assertEqual(3128, port)
        self.assertTrue(sent.startswith(b"CONNECT a.example:443 HTTP/1.1\r\n"), sent)
        self.assertIn(b"User-Agent: erofs-twisted/", sent)

    def test_an_address_of_ipv6_is_in_brackets(self) -> None:
        _, sent = self.ask("https://[2001:db8::1]:5000/x", https=PROXY)
        self.assertTrue(sent.startswith(b"CONNECT [2001:db8::1]:5000 HTTP/1.1\r\n"), sent)

    def test_an_http_url_is_asked_of_the_proxy_as_a_whole(self) -> None:
        port, sent = self.ask("http://a.example/x", http=PLAIN)
        self.assertEqual(3128, port)
        self.assertTrue(sent.startswith(b"GET http://a.example/x HTTP/1.1\r\n"), sent)
        self.assertIn(b"Host: a.example\r\n", sent)
        self.assertIn(b"Proxy-Authorization: Basic ", sent)

    def test_the_proxy_of_one_scheme_is_not_that_of_the_other(self) -> None:
        self.assertEqual(443, self.ask("https://a.example/x", http=PLAIN)[0])
        self.assertEqual(80, self.ask("http://a.example/x", https=PROXY)[0])

    def test_a_second_address_is_tried_when_the_first_says_nothing(self) -> None:
        for proxies in (Proxies(), Proxies(http=PLAIN)):
            reactor = MemoryReactorClock()
            reactor.installNameResolver(TwoAddresses())
            transport = Transport.over_sockets(reactor, TLSPolicy(), proxies=proxies)
            answer = Deferred.fromCoroutine(transport.get("http://a.example/x", {}, 10))
            self.assertEqual(["2001:db8::1"], [client[0] for client in reactor.tcpClients])
            reactor.advance(0.3)
            self.assertEqual(
                ["2001:db8::1", "192.0.2.1"], [client[0] for client in reactor.tcpClients], proxies
            )
            answer.addErrback(lambda _: None)
            answer.cancel()

    def test_a_proxy_that_speaks_tls_gets_no_word_in_the_clear(self) -> None:
        secure = attrs.evolve(PROXY, scheme="https")
        for url in ("https://a.example/x", "http://a.example/x"):
            port, sent = self.ask(url, http=secure, https=secure)
            self.assertEqual((3128, b"\x16\x03"), (port, sent[:2]), "a TLS handshake")
