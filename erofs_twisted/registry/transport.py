"""HTTP as a registry's client needs it: no redirects, no decoding, bodies in memory, and a limit of time."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import attrs
from hyperlink import EncodedURL
from treq.client import HTTPClient
from twisted.internet.defer import CancelledError, Deferred, succeed
from twisted.internet.defer import TimeoutError as TimedOut
from twisted.internet.endpoints import HostnameEndpoint, wrapClientTLS
from twisted.internet.interfaces import IConsumer, IStreamClientEndpoint
from twisted.internet.task import deferLater
from twisted.python.failure import Failure
from twisted.web._newclient import HTTP11ClientProtocol
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
from erofs_twisted.registry.errors import TransferFailed
from erofs_twisted.registry.failures import NETWORK_FAILURES, is_cancellation, network_failure
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


class _Client(HTTP11ClientProtocol):
    """Takes the head of an answer in small pieces, since each line of it is cut off what came with it, and a
    long body in large ones, since each goes through a dozen calls."""

    def request(self, request: Any) -> Deferred[Any]:
        self._take(SMALL_PIECE)
        answer: Deferred[Any] = super().request(request)
        return answer

    def dataReceived(self, data: bytes) -> None:
        if len(data) >= SMALL_PIECE:
            self._take(PIECE)
        super().dataReceived(data)  # type: ignore[no-untyped-call]

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
        self, method: str, url: str, headers: Mapping[str, str], seconds: float, body: bytes = b""
    ) -> IResponse:
        """The answer to one request, whatever its status, within ``seconds``; its body is yet to be read.

        Who gets the answer must receive, discard or abandon its body. Raises `TransferFailed`.
        """
        began = self.clock.seconds()
        answer = self._client.request(
            method,
            _url(url),
            headers=Headers({"User-Agent": [USER_AGENT], **{name: [text] for name, text in headers.items()}}),
            data=BytesProducer(body) if body else None,
            allow_redirects=False,
            unbuffered=True,
            reactor=self.clock,
        )
        try:
            response = await answer.addTimeout(seconds, self.clock, _timed_out)
        except NETWORK_FAILURES as error:
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


def _timed_out(result: IResponse | Failure, seconds: float) -> IResponse:
    """What an agent's request comes to when its time is up: how it says that it was cancelled varies."""
    if isinstance(result, Failure):
        raise TimedOut(f"no answer within {seconds:g} seconds")
    return result
