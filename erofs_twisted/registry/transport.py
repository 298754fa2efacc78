"""HTTP as a registry's client needs it: no redirects, no decoding, and a limit of time."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import lru_cache, partial
from typing import Any

import attrs
from hyperlink import EncodedURL
from treq.client import HTTPClient
from twisted.internet.defer import CancelledError, Deferred, succeed
from twisted.internet.defer import TimeoutError as TimedOut
from twisted.internet.endpoints import HostnameEndpoint, wrapClientTLS
from twisted.internet.interfaces import IConsumer, IDelayedCall, IStreamClientEndpoint
from twisted.internet.task import deferLater
from twisted.python.failure import Failure
from twisted.web._newclient import HTTP11ClientProtocol
from twisted.web._newclient import Request as HTTPRequest
from twisted.web.client import (
    URI,
    Agent,
    HTTPConnectionPool,
    ProxyAgent,
    _HTTP11ClientFactory,
)
from twisted.web.http_headers import Headers
from twisted.web.iweb import IAgent, IAgentEndpointFactory, IBodyProducer, IPolicyForHTTPS, IResponse
from zope.interface import implementer

from erofs_twisted import __version__
from erofs_twisted.interfaces import Tell, silent
from erofs_twisted.registry.body import abandon
from erofs_twisted.registry.concurrency import LimitedAgent
from erofs_twisted.registry.errors import RegistryError, TransferFailed
from erofs_twisted.registry.failures import NETWORK_FAILURES, innermost, is_cancellation, network_failure
from erofs_twisted.registry.keepalive import KeptAlive
from erofs_twisted.registry.proxies import Proxies, Proxy, authority
from erofs_twisted.registry.proxyagent import PlainProxyAgent
from erofs_twisted.registry.tunnel import Tunnel
from erofs_twisted.registry.urls import redacted

USER_AGENT = f"erofs-twisted/{__version__}"
SMALL_PIECE, PIECE = 16 * 1024, 256 * 1024
"""Bytes that are taken from a connection at a time."""
CONNECT_TIMEOUT = 10.0
IDLE_CONNECTIONS = 32
"""Kept for each host: as many as there may be ranges in flight, or each range pays for a new connection."""
MAX_HOSTS = 64
"""Whose endpoints are kept."""
IDLE_SECONDS = 60
"""Shorter than the keep-alive of common servers (nginx: 75 s), so that they seldom close under a request."""

Extend = Callable[[float], None]
"""Says that a request made progress, and how many seconds from now the next may take."""
Sender = Callable[[Extend], IBodyProducer | None]
"""Makes the producer of a body, anew each time that the body is sent; None of an empty one."""
Body = bytes | Sender
"""What goes with a request: what is in memory, or what is made as it is sent."""


class _Client(HTTP11ClientProtocol):
    """Takes the head of an answer in small pieces, since each line of it is cut off what came with it, and a
    long body in large ones, since each goes through a dozen calls.

    An answer may come before all of a request's body went out: a token has expired, the upload is wanted
    elsewhere. Twisted would send the rest, and unless the answer is whole lose it when the server hangs up.
    Here it counts at once, nothing more is sent, and the connection is closed after it.
    """

    _is_early = False

    def request(self, request: Any) -> Deferred[Any]:
        self._take(SMALL_PIECE)
        answer: Deferred[Any] = super().request(request)
        return answer

    def dataReceived(self, data: bytes) -> None:
        if len(data) >= SMALL_PIECE:
            self._take(PIECE)
        request = self._currentRequest
        super().dataReceived(data)  # type: ignore[no-untyped-call]
        self._heed_early_answer(request)

    def _heed_early_answer(self, request: HTTPRequest | None) -> None:
        """After each piece of an answer; ``request`` is the one that it is to."""
        assert self.transport is not None
        if self._state == "TRANSMITTING_AFTER_RECEIVING_RESPONSE" and not self._is_early:
            self._stop_sending(request)
        elif self._state == "TRANSMITTING" and self._responseDeferred is not None:
            if not self._responseDeferred.called:
                return  # less than its head
            self._stop_sending(request)
            self._state = "WAITING"
            finished: Any = self._finishedRequest
            _ = self._responseDeferred.chainDeferred(finished)
        if self._is_early and self._state in ("QUIESCENT", "TRANSMITTING_AFTER_RECEIVING_RESPONSE"):
            # All of the answer is here. What is yet to be sent is of no use to anybody.
            self.transport.abortConnection()  # type: ignore[attr-defined]

    def _stop_sending(self, request: Any) -> None:
        assert self.transport is not None
        self._is_early = True
        request.persistent = False
        request.stopWriting()
        self.transport.unregisterProducer()  # type: ignore[attr-defined]

    def _take(self, size: int) -> None:
        transport = self.transport
        connection: Any = transport
        while (below := getattr(connection, "transport", None)) is not None:  # TLS has the real one below it
            connection = below
        if connection is not None:
            connection.bufferSize = size


class _ClientFactory(_HTTP11ClientFactory):
    """Reads in large pieces, and leaves no two lines in the log for each connection."""

    noisy = False

    def buildProtocol(self, addr: object) -> _Client:
        return _Client(self._quiescentCallback)  # type: ignore[no-untyped-call]


class _VerbatimURL(EncodedURL):
    """A URL that treq sends as it is. Hosts that are no IDNA names, ``[::1]`` among them, it would refuse."""

    def to_uri(self) -> _VerbatimURL:
        return self


@lru_cache(maxsize=64)
def _url(text: str) -> EncodedURL:
    """The same few, for thousands of requests."""
    return _VerbatimURL.from_text(text)


@implementer(IAgentEndpointFactory)
@attrs.frozen
class _Endpoints:
    """Where to connect to, worked out once for each host: its name alone is a tenth of a request's work."""

    _reactor: Any
    _policy: IPolicyForHTTPS
    _proxies: Proxies = attrs.field(factory=Proxies)
    _connect_timeout: float = CONNECT_TIMEOUT
    _known: dict[tuple[bytes, bytes, int], IStreamClientEndpoint] = attrs.field(factory=dict, init=False)

    def endpointForURI(self, uri: URI) -> IStreamClientEndpoint:
        key = uri.scheme, uri.host, uri.port
        endpoint = self._known.get(key)
        if endpoint is None:
            if len(self._known) >= MAX_HOSTS:
                self._known.clear()
            endpoint = self._way(uri)
            if uri.scheme == b"https":
                endpoint = wrapClientTLS(self._policy.creatorForNetloc(uri.host, uri.port), endpoint)
            self._known[key] = endpoint
        return endpoint

    def to_proxy(self, proxy: Proxy) -> IStreamClientEndpoint:
        host = proxy.host.encode("ascii")
        endpoint = self._over_tcp(host, proxy.port)
        if proxy.scheme == "https":
            return wrapClientTLS(self._policy.creatorForNetloc(host, proxy.port), endpoint)
        return endpoint

    def _way(self, uri: URI) -> IStreamClientEndpoint:
        """To where TLS begins, or HTTP."""
        target = authority(uri.host.decode("ascii"), uri.port)
        proxy = self._proxies.proxy_for(f"https://{target}/") if uri.scheme == b"https" else None
        if proxy is None:
            return self._over_tcp(uri.host, uri.port)
        return Tunnel(self._reactor, proxy, self.to_proxy(proxy), target, USER_AGENT)

    def _over_tcp(self, host: bytes, port: int) -> IStreamClientEndpoint:
        """By the address that answers first (RFC 8305, "Happy Eyeballs")."""
        return KeptAlive(HostnameEndpoint(self._reactor, host, port, timeout=self._connect_timeout))


@implementer(IAgent)
@attrs.frozen
class IdentityAgent:
    """Asks for bodies as they are, and refuses any other.

    treq adds ``Accept-Encoding: gzip`` and decodes what comes back, which makes a byte range of a blob
    garbage. So this sits below treq.
    """

    _agent: IAgent

    def request(
        self,
        method: bytes,
        uri: bytes,
        headers: Headers | None = None,
        bodyProducer: IBodyProducer | None = None,
    ) -> Deferred[IResponse]:
        own = Headers() if headers is None else headers.copy()
        own.setRawHeaders(b"Accept-Encoding", [b"identity"])
        return self._agent.request(method, uri, own, bodyProducer).addCallback(self._check, uri)

    def _check(self, response: IResponse, uri: bytes) -> IResponse:
        encodings = response.headers.getRawHeaders(b"Content-Encoding", [])
        if any(encoding.strip().lower() not in (b"", b"identity") for encoding in encodings):
            abandon(response)
            encoding = b", ".join(encodings).decode("latin-1")
            raise TransferFailed(
                f"{redacted(uri.decode('latin-1'))} sends Content-Encoding {encoding:.40}, "
                "though identity was asked for"
            )
        return response


@implementer(IBodyProducer)
class BytesProducer:
    """A body that is in memory, handed over at once. Twisted's own producer wants the global reactor."""

    def __init__(self, body: bytes) -> None:
        self.length = len(body)
        self._body = body

    def startProducing(self, consumer: IConsumer) -> Deferred[None]:
        consumer.write(self._body)
        return succeed(None)

    def pauseProducing(self) -> None:
        """Nothing is left to pause."""

    def resumeProducing(self) -> None:
        """Nothing is left to resume."""

    def stopProducing(self) -> None:
        """Nothing is left to stop."""


@attrs.frozen
class Transport:
    """Connections to a registry, its token server and its CDN, kept open between requests."""

    clock: Any
    """An IReactorTime; the reactor itself where there are sockets."""
    _client: HTTPClient
    _pool: HTTPConnectionPool | None = None
    tell: Tell = silent
    _proxies: Proxies = attrs.field(factory=Proxies)

    @classmethod
    def over_sockets(
        cls,
        reactor: Any,
        policy: IPolicyForHTTPS,
        *,
        proxies: Proxies | None = None,
        connect_timeout: float = CONNECT_TIMEOUT,
        tell: Tell = silent,
    ) -> Transport:
        """``policy`` says which https servers are trusted, proxies among them.

        Without ``proxies``, all are reached directly. Each connection has ``connect_timeout`` seconds.
        """
        pool = HTTPConnectionPool(reactor)
        pool._factory = _ClientFactory
        pool.maxPersistentPerHost = IDLE_CONNECTIONS
        pool.cachedConnectionTimeout = IDLE_SECONDS
        proxies = Proxies() if proxies is None else proxies
        endpoints = _Endpoints(reactor, policy, proxies, connect_timeout)
        agent: IAgent = Agent.usingEndpointFactory(reactor, endpoints, pool)
        if proxies.http is not None:
            proxied = ProxyAgent(endpoints.to_proxy(proxies.http), reactor, pool)
            agent = PlainProxyAgent(agent, proxied, proxies)
        return cls(reactor, HTTPClient(IdentityAgent(LimitedAgent(agent))), pool, tell, proxies)

    @classmethod
    def over_agent(cls, clock: Any, agent: IAgent, tell: Tell = silent) -> Transport:
        """Over any agent: a proxy's, or a test's."""
        return cls(clock, HTTPClient(IdentityAgent(agent)), tell=tell)

    async def get(self, url: str, headers: Mapping[str, str], seconds: float) -> IResponse:
        """`request` with GET."""
        return await self.request("GET", url, headers, seconds)

    async def request(
        self, method: str, url: str, headers: Mapping[str, str], seconds: float, body: Body = b""
    ) -> IResponse:
        """The answer to one request, whatever its status, within ``seconds``; its body is yet to be read.

        A `Sender` of the request's ``body`` may extend the time as it goes on. Who gets the answer must
        receive, discard or abandon its body. Raises `TransferFailed`, and what `RegistryError` the sender
        fails with.
        """
        began = self.clock.seconds()
        limit = _TimeLimit(self.clock)
        if isinstance(body, bytes):
            body = partial(_in_memory, body)
        answer: Deferred[Any] = self._client.request(
            method,
            _url(url),
            headers=Headers({"User-Agent": [USER_AGENT], **{name: [text] for name, text in headers.items()}}),
            data=body(limit.extend),
            allow_redirects=False,
            unbuffered=True,
            reactor=self.clock,
        )
        try:
            response = await limit.over(answer, seconds)
        except NETWORK_FAILURES as error:
            if isinstance(cause := innermost(error), RegistryError):
                raise cause from error
            if is_cancellation(error):
                raise CancelledError from error
            raise self._told(method, network_failure(error, url), began) from error
        except TransferFailed as error:  # a proxy's doing
            raise self._told(method, error, began) from error.__cause__
        if self.tell is not silent:
            proxy = self._proxies.proxy_for(url)
            asked = f" {headers['Range']}" if "Range" in headers else ""
            asked += f" by the proxy {proxy.url}" if proxy else ""
            phrase = response.phrase.decode("latin-1")
            self.tell(f"{method} {redacted(url)}{asked}: {response.code} {phrase} ({self._since(began)})")
        return response

    def _told(self, method: str, failure: TransferFailed, began: float) -> TransferFailed:
        if self.tell is not silent:
            self.tell(f"{method} {failure} ({self._since(began)})")
        return failure

    def _since(self, began: float) -> str:
        return f"{1000 * (self.clock.seconds() - began):.1f} ms"

    async def close(self) -> None:
        """Close the connections that wait for a next request."""
        if self._pool is not None:
            # We may run within the arrival of a response, whose connection joins the pool when we return.
            await deferLater(self.clock, 0)
            await self._pool.closeCachedConnections()


def _in_memory(body: bytes, extend: Extend) -> BytesProducer | None:
    return BytesProducer(body) if body else None


@attrs.define(eq=False)
class _TimeLimit:
    """Cancels a request when its time is up."""

    _clock: Any
    _seconds: float = attrs.field(init=False, default=0.0)
    _call: IDelayedCall | None = attrs.field(init=False, default=None)
    _is_over: bool = attrs.field(init=False, default=False)

    def over(self, answer: Deferred[IResponse], seconds: float) -> Deferred[IResponse]:
        """``answer``, which comes within ``seconds`` or fails."""
        self._seconds = seconds
        self._call = self._clock.callLater(seconds, self._expire, answer)
        return answer.addBoth(self._finish)

    def extend(self, seconds: float) -> None:
        """There is time again: ``seconds`` from now."""
        if self._call is not None and self._call.active():
            self._seconds = seconds
            self._call.reset(seconds)

    def _expire(self, answer: Deferred[IResponse]) -> None:
        self._is_over = True
        answer.cancel()

    def _finish(self, result: IResponse | Failure) -> IResponse | Failure:
        if self._call is not None and self._call.active():
            self._call.cancel()
        if self._is_over and isinstance(result, Failure):
            # How an agent says that it was cancelled varies.
            raise TimedOut(f"no answer within {self._seconds:g} seconds")
        return result
