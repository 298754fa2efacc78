"""HTTP without a network: an agent whose answers a test writes, down to when a body breaks off."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import attrs
from twisted.internet.defer import CancelledError, Deferred
from twisted.internet.error import ConnectionLost
from twisted.internet.interfaces import IProtocol
from twisted.internet.task import Clock
from twisted.python.failure import Failure
from twisted.web.client import RequestGenerationFailed, ResponseDone, ResponseFailed, ResponseNeverReceived
from twisted.web.http import RESPONSES
from twisted.web.http_headers import Headers
from twisted.web.iweb import UNKNOWN_LENGTH, IAgent, IBodyProducer, IResponse
from zope.interface import implementer

from erofs_twisted.interfaces import Tell, silent
from erofs_twisted.registry.transport import Transport


@implementer(IResponse)
@attrs.define(eq=False)
class FakeResponse:
    """An answer whose body a test sends in pieces, as a connection would bring it."""

    code: int
    headers: Headers
    length: Any = UNKNOWN_LENGTH
    version: Any = (b"HTTP", 1, 1)
    request: Any = None
    previousResponse: Any = None
    is_aborted: bool = False
    is_finished: bool = False
    _protocol: IProtocol | None = None
    _unread: list[bytes] = attrs.field(factory=list)
    _end: BaseException | None = None

    @property
    def phrase(self) -> bytes:
        return bytes(RESPONSES.get(self.code, b"Odd"))

    def setPreviousResponse(self, response: object) -> None:
        self.previousResponse = response

    def deliverBody(self, protocol: IProtocol) -> None:
        assert self._protocol is None, "the body is delivered once"
        self._protocol = protocol
        protocol.makeConnection(self)
        unread, self._unread = self._unread, []
        for data in unread:
            self.send(data)
        if self._end is not None:
            self._lose(self._end)

    def send(self, data: bytes) -> None:
        """A piece of the body arrives."""
        if self._protocol is None:
            self._unread.append(data)
        elif not self.is_aborted:
            self._protocol.dataReceived(data)

    def finish(self) -> None:
        """The body is complete."""
        self._lose(ResponseDone())

    def break_off(self) -> None:
        """The connection is lost within the body."""
        self._lose(ResponseFailed([Failure(ConnectionLost())]))

    def abortConnection(self) -> None:
        """What the body's protocol sees as its transport: close at once."""
        self.is_aborted = True
        self._lose(ResponseFailed([Failure(ConnectionLost())]))

    loseConnection = abortConnection

    def _lose(self, reason: BaseException) -> None:
        if self._protocol is None:
            self._end = reason
        elif not self.is_finished:
            self.is_finished = True
            self._protocol.connectionLost(Failure(reason))


@attrs.define(eq=False)
class FakeRequest:
    """A request that the agent was asked to make. It is answered once, now or later."""

    url: str
    headers: Mapping[str, str]
    method: str = "GET"
    body: bytes = b""
    producer: Any = None
    answer: Deferred[Any] = attrs.field(init=False)
    is_cancelled: bool = False
    response: FakeResponse | None = None

    def __attrs_post_init__(self) -> None:
        self.answer = Deferred(self._cancelled)

    def write(self, data: bytes) -> None:
        """What the body's producer sees as its consumer."""
        self.body += data

    def produce(self, producer: Any, whole: Callable[[FakeRequest], object]) -> None:
        """Take the body; ``whole`` is called once all of it is here."""
        self.producer = producer

        def done(_: object) -> None:
            assert producer.length == len(self.body)
            whole(self)

        def failed(failure: Failure) -> None:
            if not self.is_cancelled:
                self.fail(RequestGenerationFailed([failure]))

        producer.startProducing(self).addErrback(failed).addCallback(
            lambda _: None if self.answer.called else done(_)
        )

    def _cancelled(self, answer: Deferred[Any]) -> None:
        self.is_cancelled = True
        if self.producer is not None:
            self.producer.stopProducing()
        answer.errback(ResponseNeverReceived([Failure(CancelledError())]))  # as HTTP11ClientProtocol does

    def respond(
        self, code: int, body: bytes | None = b"", length: int | None = None, **headers: str
    ) -> FakeResponse:
        """Answer; ``headers`` have _ for -.

        A ``body`` of None is yet to be sent. ``length`` is what the headers claim, by default the truth.
        """
        named = Headers({name.replace("_", "-"): [value] for name, value in headers.items()})
        claimed: Any = UNKNOWN_LENGTH if body is None else len(body)
        self.response = FakeResponse(code, named, claimed if length is None else length)
        if body is not None:
            self.response.send(body)
            self.response.finish()
        self.answer.callback(self.response)
        return self.response

    def fail(self, error: BaseException) -> None:
        """No answer."""
        self.answer.errback(Failure(error))

    @property
    def range(self) -> tuple[int, int]:
        """The [start, stop) of its Range header."""
        first, last = self.headers["range"].removeprefix("bytes=").split("-")
        return int(first), int(last) + 1

    def respond_range(self, blob: bytes) -> FakeResponse:
        """Answer with the range that was asked for, all of it."""
        start, stop = self.range
        return self.respond(206, blob[start:stop], Content_Range=f"bytes {start}-{stop - 1}/{len(blob)}")


@implementer(IAgent)
@attrs.define(eq=False)
class FakeAgent:
    """Hands each request to ``answer``, which may answer it, or leave that to the test."""

    answer: Callable[[FakeRequest], object] = lambda request: None
    early: Callable[[FakeRequest], object] = lambda request: None
    """Sees a request before its body, and may answer it then."""
    requests: list[FakeRequest] = attrs.field(factory=list)

    def request(
        self,
        method: bytes,
        uri: bytes,
        headers: Headers | None = None,
        bodyProducer: IBodyProducer | None = None,
    ) -> Deferred[Any]:
        assert headers is not None
        flat = {
            name.decode().lower(): b", ".join(values).decode() for name, values in headers.getAllRawHeaders()
        }
        request = FakeRequest(uri.decode(), flat, method.decode())
        self.requests.append(request)
        self.early(request)
        if request.answer.called:
            return request.answer
        if bodyProducer is None:
            self.answer(request)
        else:
            request.produce(bodyProducer, self.answer)
        return request.answer

    @property
    def urls(self) -> list[str]:
        return [request.url for request in self.requests]

    @property
    def last(self) -> FakeRequest:
        return self.requests[-1]


def fake_transport(
    answer: Callable[[FakeRequest], object] | None = None,
    tell: Tell = silent,
    clock: Clock | None = None,
) -> tuple[FakeAgent, Clock, Transport]:
    """A transport over a `FakeAgent`, and the clock that both go by."""
    agent = FakeAgent(answer) if answer else FakeAgent()
    clock = Clock() if clock is None else clock
    clock.advance(1_700_000_000)
    return agent, clock, Transport.over_agent(clock, agent, tell)
