"""A registry on loopback that can be told to misbehave, for tests; a process of its own.

    python -m tests.faultregistry LAYOUT

Every repository's name leads to the same images, those of an OCI layout, so that each test can have a
repository with faults, credentials and a log of requests of its own. It says its port on standard output, as
a JSON object. Commands come as such objects, one a line, on standard input, and each is answered by one:

    {"repository": NAME, "faults": [FAULT…], "user": "NAME:PASSWORD"}     from now on
    {"requests": NAME}                                                   those that came so far
    {"up": false}                  close the port and every connection; true opens it again

The end of standard input ends it.
"""

from __future__ import annotations

import base64
import json
import re
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

import attrs
from twisted.internet import reactor as global_reactor
from twisted.internet import stdio
from twisted.protocols.basic import LineOnlyReceiver
from twisted.protocols.policies import WrappingFactory
from twisted.web.http import Request
from twisted.web.resource import Resource
from twisted.web.server import NOT_DONE_YET, Site

from tests.images import TAG

PATH = re.compile(r"/v2/(?P<repository>.+)/(?P<kind>manifests|blobs|referrers)/(?P<reference>[^/]+)")
RANGE = re.compile(r"bytes=(\d+)-(\d+)")


@attrs.frozen(kw_only=True)
class Fault:
    """What happens to requests of one ``kind``, ``manifests``, ``blobs`` or ``referrers``, or of all.

    ``status`` is answered instead of the content; with ``stall`` nothing is, ever; after ``cut_after`` bytes
    of a body the connection ends; with ``tamper`` the body is another, of the same length. ``shift`` is added
    to what a partial answer says where it begins, ``surplus`` bytes follow its body, and with ``whole`` there
    is none, but all of the content. ``times`` is how many requests it hits, None all. The first fault that
    fits is taken.
    """

    kind: str = ""
    status: int | None = None
    stall: bool = False
    cut_after: int | None = None
    tamper: bool = False
    shift: int = 0
    surplus: int = 0
    whole: bool = False
    times: int | None = None


@attrs.define
class Repository:
    faults: list[Fault] = attrs.field(factory=list)
    user: str = ""
    requests: list[dict[str, Any]] = attrs.field(factory=list)

    def fault(self, kind: str) -> Fault:
        for index, fault in enumerate(self.faults):
            if fault.kind in ("", kind) and fault.times != 0:
                if fault.times is not None:
                    self.faults[index] = attrs.evolve(fault, times=fault.times - 1)
                return fault
        return Fault()

    def lets_in(self, authorization: str | None) -> bool:
        return not self.user or authorization == "Basic " + base64.b64encode(self.user.encode()).decode()


class Registry(Resource):
    """``/v2/NAME/manifests/REFERENCE`` and ``/v2/NAME/blobs/DIGEST``, for any name."""

    isLeaf = True

    def __init__(self, layout: Path) -> None:
        super().__init__()
        self._blobs = layout / "blobs"
        index = json.loads((layout / "index.json").read_bytes())
        self._tags = {entry["annotations"][TAG]: entry["digest"] for entry in index["manifests"]}
        self.repositories: defaultdict[str, Repository] = defaultdict(Repository)

    def render_GET(self, request: Request) -> Any:
        path = PATH.fullmatch(request.path.decode())
        if path is None:
            return b"{}"
        repository = self.repositories[path["repository"]]
        asked = request.getHeader("range")
        repository.requests.append({"kind": path["kind"], "reference": path["reference"], "range": asked})
        if not repository.lets_in(request.getHeader("authorization")):
            request.setHeader("WWW-Authenticate", 'Basic realm="test"')
            return answer(request, 401)
        fault = repository.fault(path["kind"])
        if fault.stall:
            return NOT_DONE_YET
        digest = self._tags.get(path["reference"], path["reference"])
        file = self._blobs / digest.replace(":", "/")
        if fault.status is not None or path["kind"] == "referrers" or not file.is_file():
            return answer(request, fault.status or 404)
        return self._content(request, file.read_bytes(), path["kind"], asked, fault)

    def _content(self, request: Request, body: bytes, kind: str, asked: str | None, fault: Fault) -> Any:
        media_type = "application/octet-stream"
        if kind == "manifests":
            media_type = json.loads(body)["mediaType"]
        request.setHeader("Content-Type", media_type)
        span = RANGE.fullmatch(asked or "")
        if span and not fault.whole:
            start, stop = int(span[1]), min(int(span[2]) + 1, len(body))
            request.setResponseCode(206)
            said, end = start + fault.shift, stop - 1 + fault.shift
            request.setHeader("Content-Range", f"bytes {said}-{end}/{len(body)}")
            body = body[start:stop] + bytes(fault.surplus)
        if fault.tamper:
            body = body[:-1] + bytes([body[-1] ^ 1])
        request.setHeader("Content-Length", str(len(body)))
        if fault.cut_after is None:
            return body
        request.write(body[: fault.cut_after])
        request.transport.loseConnection()
        return NOT_DONE_YET


def answer(request: Request, status: int) -> bytes:
    request.setResponseCode(status)
    request.setHeader("Content-Type", "application/json")
    return json.dumps({"errors": [{"code": "TEST", "message": f"told to answer {status}"}]}).encode()


class Commands(LineOnlyReceiver):
    """Standard input and output."""

    delimiter = b"\n"
    MAX_LENGTH = 1 << 20

    def __init__(self, reactor: Any, registry: Registry) -> None:
        self._reactor = reactor
        self._registry = registry
        self._site = WrappingFactory(Site(registry))

    def connectionMade(self) -> None:
        self._listen(0)
        self._number = self._port.getHost().port
        self._say(port=self._number)

    def lineReceived(self, line: bytes) -> None:
        match json.loads(line):
            case {"repository": name, "faults": faults, "user": user}:
                repository = self._registry.repositories[name]
                repository.faults = [Fault(**fault) for fault in faults]
                repository.user = user
                self._say()
            case {"requests": name}:
                self._say(requests=self._registry.repositories[name].requests)
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


def main(layout: str, reactor: Any = global_reactor) -> None:
    commands = Commands(reactor, Registry(Path(layout)))
    reactor.callWhenRunning(stdio.StandardIO, commands)
    reactor.run()


if __name__ == "__main__":
    main(*sys.argv[1:])
