"""A server on loopback that can be told to misbehave, for tests; a process of its own.

    python -m tests.faultregistry ORIGIN

The origin is the directory of an OCI layout: then every repository's name leads to its images, so that each
test can have a repository with faults, credentials and a log of requests of its own. Or it is the URL of a
real server, a registry's or a CDN's, that every request is passed on to. Of a CDN, which has no repositories,
all is in the one without a name. Bodies are held in memory.

It says its port on standard output, as a JSON object. Commands come as such objects, one a line, on standard
input, and each is answered by one:

    {"repository": NAME, "faults": [FAULT…], "user": "NAME:PASSWORD", "rate": RATE, "seed": SEED,
     "token_life": SECONDS}        from now on; see `tests.faults`. Where tokens have a life, each needs one
    {"requests": NAME}             those that came so far
    {"counts": NAME}               how many they were, how many met a fault, how many got a token; and
                                   connections, to all
    {"up": false}                  close the port and every connection; true opens it again

The end of standard input ends it.
"""

from __future__ import annotations

import base64
import json
import re
import sys
import time
from collections import defaultdict
from datetime import UTC, datetime
from email.utils import formatdate
from pathlib import Path
from typing import Any

import attrs
import treq
from twisted.internet import reactor as global_reactor
from twisted.internet import stdio
from twisted.internet.defer import Deferred
from twisted.internet.task import deferLater
from twisted.protocols.basic import LineOnlyReceiver
from twisted.protocols.policies import WrappingFactory
from twisted.web.client import Agent, FileBodyProducer, HTTPConnectionPool
from twisted.web.http import Request
from twisted.web.http_headers import Headers
from twisted.web.resource import Resource
from twisted.web.server import NOT_DONE_YET, Site
from zope.interface import Interface, implementer

from tests.faults import Fault, Script
from tests.images import TAG

PATH = re.compile(r"/v2/(?P<repository>.+)/(?P<kind>manifests|blobs|referrers)/(?P<reference>[^/]+)")
RANGE = re.compile(r"bytes=(\d+)-(\d+)")
HOP_BY_HOP = (b"connection", b"keep-alive", b"transfer-encoding", b"content-length", b"date", b"server")
FLUSHED = 0.02
"""Seconds after which what was written has left, and a reset takes none of it along."""


@attrs.frozen
class Content:
    """A right answer."""

    status: int
    headers: Headers
    body: bytes


class IOrigin(Interface):
    """Where right answers come from."""

    def get(request: Request, is_whole: bool) -> Deferred[Content]:
        """The answer to a request; with ``is_whole`` as if it had no Range."""


@implementer(IOrigin)
class LayoutOrigin:
    """``/v2/NAME/manifests/REFERENCE`` and ``/v2/NAME/blobs/DIGEST`` of a layout, for any name."""

    def __init__(self, layout: Path) -> None:
        self._blobs = layout / "blobs"
        index = json.loads((layout / "index.json").read_bytes())
        self._tags = {entry["annotations"][TAG]: entry["digest"] for entry in index["manifests"]}

    async def _get(self, request: Request, is_whole: bool) -> Content:
        path = PATH.fullmatch(request.path.decode())
        if path is None:
            return Content(200, Headers(), b"{}")
        digest = self._tags.get(path["reference"], path["reference"])
        file = self._blobs / digest.replace(":", "/")
        if path["kind"] == "referrers" or not file.is_file():
            return refusal(404)
        body = file.read_bytes()
        media_type = "application/octet-stream"
        if path["kind"] == "manifests":
            media_type = json.loads(body)["mediaType"]
        headers = Headers({"Content-Type": [media_type]})
        span = RANGE.fullmatch(request.getHeader("range") or "")
        if span is None or is_whole:
            return Content(200, headers, body)
        start, stop = int(span[1]), min(int(span[2]) + 1, len(body))
        headers.setRawHeaders("Content-Range", [f"bytes {start}-{stop - 1}/{len(body)}"])
        return Content(206, headers, body[start:stop])

    def get(self, request: Request, is_whole: bool) -> Deferred[Content]:
        """As `IOrigin.get`."""
        return Deferred.fromCoroutine(self._get(request, is_whole))


@implementer(IOrigin)
class ServerOrigin:
    """The server at ``url``, asked with the headers that came."""

    def __init__(self, reactor: Any, url: str) -> None:
        self._url = url.encode()
        pool = HTTPConnectionPool(reactor)
        pool._factory.noisy = False
        pool.maxPersistentPerHost = 64
        self._agent = Agent(reactor, pool=pool)
        self._whole: dict[bytes, Content] = {}

    def get(self, request: Request, is_whole: bool) -> Deferred[Content]:
        """As `IOrigin.get`. All of what has been asked for once is kept."""
        return Deferred.fromCoroutine(self._get(request, is_whole))

    async def _get(self, request: Request, is_whole: bool) -> Content:
        if is_whole and request.path in self._whole:
            return self._whole[request.path]
        headers = without(request.requestHeaders, *HOP_BY_HOP, *([b"range"] if is_whole else []))
        method = b"GET" if request.method == b"HEAD" else request.method
        body = FileBodyProducer(request.content) if method in (b"POST", b"PUT", b"PATCH") else None
        response = await self._agent.request(method, self._url + request.uri, headers, body)
        headers = without(response.headers, *HOP_BY_HOP)
        content = Content(response.code, headers, await treq.content(response))
        if is_whole and content.status == 200:
            self._whole[request.path] = content
        return content


def without(headers: Headers, *names: bytes) -> Headers:
    return Headers({name: lines for name, lines in headers.getAllRawHeaders() if name.lower() not in names})


def refusal(status: int) -> Content:
    body = json.dumps({"errors": [{"code": "TEST", "message": f"told to answer {status}"}]}).encode()
    return Content(status, Headers({"Content-Type": ["application/json"]}), body)


@attrs.define
class Repository:
    script: Script = attrs.field(factory=Script)
    user: str = ""
    token_life: float | None = None
    tokens: dict[str, float] = attrs.field(factory=dict)
    """Until when each is good, by `time.monotonic`."""
    requests: list[dict[str, Any]] = attrs.field(factory=list)

    def token(self) -> bytes:
        """A new one, as a token server's answer."""
        assert self.token_life is not None
        token = f"token-{len(self.tokens)}"
        self.tokens[token] = time.monotonic() + self.token_life
        issued_at = datetime.now(UTC).isoformat()
        return json.dumps({"token": token, "expires_in": self.token_life, "issued_at": issued_at}).encode()

    def challenge(self, name: str, port: int) -> str:
        if self.token_life is None:
            return 'Basic realm="test"'
        realm = f"http://127.0.0.1:{port}/token"
        return f'Bearer realm="{realm}",service="test",scope="repository:{name}:pull"'

    def lets_in(self, authorization: str | None) -> bool:
        if self.token_life is not None:
            kind, _, token = (authorization or "").partition(" ")
            return kind == "Bearer" and self.tokens.get(token, 0.0) > time.monotonic()
        return not self.user or authorization == "Basic " + base64.b64encode(self.user.encode()).decode()


class Registry(Resource):
    """What an origin has, and what is made of it."""

    isLeaf = True

    def __init__(self, reactor: Any, origin: Any) -> None:
        super().__init__()
        self._reactor = reactor
        self._origin = origin
        self.repositories: defaultdict[str, Repository] = defaultdict(Repository)

    def render(self, request: Request) -> Any:
        Deferred.fromCoroutine(self._answer(request)).addErrback(self._broken, request)
        return NOT_DONE_YET

    def _broken(self, failure: Any, request: Request) -> None:
        failure.printTraceback(sys.stderr)
        send(request, refusal(502))

    async def _answer(self, request: Request) -> None:
        request.notifyFinish().addErrback(lambda _: None)
        if request.path == b"/token":
            scope = request.args[b"scope"][0].decode()
            send(request, Content(200, Headers(), self.repositories[scope.split(":")[1]].token()))
            return
        path = PATH.fullmatch(request.path.decode())
        name, kind, reference = path.groups() if path else ("", "", "")
        repository = self.repositories[name]
        asked = request.getHeader("range")
        repository.requests.append({"kind": kind, "reference": reference, "range": asked})
        if not repository.lets_in(request.getHeader("authorization")):
            request.setHeader("WWW-Authenticate", repository.challenge(name, request.getHost().port))
            send(request, refusal(401))
            return
        span = RANGE.fullmatch(asked or "")
        fault = repository.script.next(kind, int(span[2]) + 1 - int(span[1]) if span else 0)
        if fault.delay:
            await deferLater(self._reactor, fault.delay)
        if fault.reset:
            request.transport.abortConnection()
        elif fault.status is not None:
            if fault.retry_after is not None:
                request.setHeader("Retry-After", retry_after(fault))
            send(request, refusal(fault.status))
        elif not fault.stall:
            self._send(request, await self._origin.get(request, fault.whole), fault)

    def _send(self, request: Request, content: Content, fault: Fault) -> None:
        headers, body = content.headers.copy(), content.body
        span = re.fullmatch(r"bytes (\d+)-(\d+)/(\d+)", headers.getRawHeaders("Content-Range", [""])[0])
        if span is not None:
            first, last = int(span[1]) + fault.shift, int(span[2]) + fault.shift
            headers.setRawHeaders("Content-Range", [f"bytes {first}-{last}/{span[3]}"])
            body += bytes(fault.surplus)
        if fault.tamper:
            body = body[:-1] + bytes([body[-1] ^ 1])
        changed = attrs.evolve(content, headers=headers, body=body)
        if fault.cut_after is None:
            send(request, changed, fault.trailing)
            return
        if not begin(request, changed, body[: fault.cut_after]):
            return
        if fault.cut_by == "fin":
            request.loseConnection()
        elif fault.cut_by == "reset":
            self._reactor.callLater(FLUSHED, request.transport.abortConnection)


def begin(request: Request, content: Content, body: bytes) -> bool:
    """Send the head of an answer and the beginning of its body; False if nobody is there any more."""
    if request._disconnected:
        return False
    request.setResponseCode(content.status)
    for name, lines in content.headers.getAllRawHeaders():
        request.responseHeaders.setRawHeaders(name, lines)
    request.setHeader("Content-Length", str(len(content.body)))
    request.write(body)
    return True


def send(request: Request, content: Content, trailing: int = 0) -> None:
    """Send all of an answer, and some bytes behind it that are no part of it."""
    if not begin(request, content, content.body):
        return
    if trailing:
        request.channel.transport.write(bytes(trailing))
    request.finish()


def retry_after(fault: Fault) -> str:
    """How a fault's ``Retry-After`` is spelt (RFC 9110, section 10.2.3)."""
    assert fault.retry_after is not None
    return (
        formatdate(time.time() + fault.retry_after, usegmt=True) if fault.retry_at else str(fault.retry_after)
    )


class Counted(WrappingFactory):
    """Counts connections."""

    noisy = False
    connections = 0

    def registerProtocol(self, p: Any) -> None:
        self.connections += 1
        super().registerProtocol(p)


class Commands(LineOnlyReceiver):
    """Standard input and output."""

    delimiter = b"\n"
    MAX_LENGTH = 1 << 20

    def __init__(self, reactor: Any, registry: Registry) -> None:
        self._reactor = reactor
        self._registry = registry
        self._site = Counted(Site(registry))

    def connectionMade(self) -> None:
        self._listen(0)
        self._number = self._port.getHost().port
        self._say(port=self._number)

    def lineReceived(self, line: bytes) -> None:
        match json.loads(line):
            case {
                "repository": name,
                "faults": faults,
                "user": user,
                "rate": rate,
                "seed": seed,
                "token_life": token_life,
            }:
                repository = self._registry.repositories[name]
                repository.script = Script([Fault(**fault) for fault in faults], rate, seed)
                repository.user = user
                repository.token_life = token_life
                self._say()
            case {"requests": name}:
                self._say(requests=self._registry.repositories[name].requests)
            case {"counts": name}:
                repository = self._registry.repositories[name]
                self._say(
                    requests=len(repository.requests),
                    hits=repository.script.hits,
                    tokens=len(repository.tokens),
                    connections=self._site.connections,
                )
            case {"up": False}:
                for connection in list(self._site.protocols):
                    connection.transport.abortConnection()
                self._port.stopListening().addCallback(lambda _: self._say())
            case {"up": True}:
                self._listen(self._number)
                self._say()

    def connectionLost(self, reason: Any = None) -> None:
        if self._reactor.running:
            self._reactor.stop()

    def _listen(self, number: int) -> None:
        self._port = self._reactor.listenTCP(number, self._site, interface="127.0.0.1")

    def _say(self, **fields: Any) -> None:
        self.sendLine(json.dumps(fields).encode())


def main(origin: str, reactor: Any = global_reactor) -> None:
    found: Any = ServerOrigin(reactor, origin) if origin.startswith("http:") else LayoutOrigin(Path(origin))
    commands = Commands(reactor, Registry(reactor, found))
    reactor.callWhenRunning(stdio.StandardIO, commands)
    # No handlers of its own: there is nothing to be done before a signal ends it.
    reactor.run(installSignalHandlers=False)


if __name__ == "__main__":
    main(*sys.argv[1:])
