"""One request, and one body: what is sent, what is refused, and when it is given up."""

from __future__ import annotations

from typing import Any

from OpenSSL import SSL
from treq.testing import RequestTraversalAgent
from twisted.internet.address import IPv4Address
from twisted.internet.defer import CancelledError, Deferred
from twisted.internet.error import (
    ConnectingCancelledError,
    ConnectionLost,
    ConnectionRefusedError,
    DNSLookupError,
)
from twisted.internet.task import Clock
from twisted.internet.testing import MemoryReactorClock, StringTransport
from twisted.python.failure import Failure
from twisted.trial.unittest import SynchronousTestCase
from twisted.web._newclient import Request as HTTPRequest
from twisted.web.client import URI, BrowserLikePolicyForHTTPS, ResponseNeverReceived
from twisted.web.http_headers import Headers
from twisted.web.resource import Resource
from twisted.web.server import Request

from erofs_twisted.registry.answers import errors_text, status_error
from erofs_twisted.registry.body import SMALL_BODY, abandon, discard, read_body, receive
from erofs_twisted.registry.content import _Producer
from erofs_twisted.registry.errors import AccessDenied, NotInRegistry, TransferFailed
from erofs_twisted.registry.transport import (
    MAX_HOSTS,
    PIECE,
    SMALL_PIECE,
    Transport,
    _Client,
    _Endpoints,
)
from erofs_twisted.registry.verdict import CertificateRefused
from tests.unit.fakehttp import FakeResponse, fake_transport

URL = "https://a.example/x?signature=secret"


class BodyTests(SynchronousTestCase):
    def setUp(self) -> None:
        self.agent, self.clock, self.transport = fake_transport(lambda request: request.respond(200, None))
        self.got: list[bytes] = []

    def respond(self, **how: Any) -> FakeResponse:
        got = Deferred.fromCoroutine(self.transport.get(URL, {}, 10))
        self.response = self.successResultOf(got)
        assert self.agent.last.response is not None
        return self.agent.last.response

    def take(self, data: bytes) -> bool:
        self.got.append(data)
        return data != b"enough"

    def receive(self) -> Deferred[None]:
        return receive(self.response, self.take, self.clock, 10)

    def test_pieces_are_given_as_they_come(self) -> None:
        sender = self.respond()
        done = self.receive()
        sender.send(b"one")
        sender.send(b"two")
        self.assertEqual([b"one", b"two"], self.got)
        self.assertNoResult(done)

    def test_it_ends_with_the_body(self) -> None:
        sender = self.respond()
        done = self.receive()
        sender.finish()
        self.assertIsNone(self.successResultOf(done))
        self.assertFalse(sender.is_aborted)

    def test_a_body_that_breaks_off_is_a_temporary_failure(self) -> None:
        sender = self.respond()
        done = self.receive()
        sender.break_off()
        self.assertTrue(self.failureResultOf(done, TransferFailed).value.temporary)

    def test_a_body_that_stalls_is_closed_and_a_temporary_failure(self) -> None:
        sender = self.respond()
        done = self.receive()
        self.clock.advance(9)
        sender.send(b"piece")
        self.clock.advance(9)
        self.assertNoResult(done)
        self.clock.advance(1)
        error = self.failureResultOf(done, TransferFailed).value
        self.assertTrue(error.temporary)
        self.assertIn("nothing came for 10 seconds", str(error))
        self.assertTrue(sender.is_aborted)

    def test_enough_closes_the_connection(self) -> None:
        sender = self.respond()
        done = self.receive()
        sender.send(b"enough")
        self.assertIsNone(self.successResultOf(done))
        self.assertTrue(sender.is_aborted)

    def test_what_the_taker_raises_closes_the_connection(self) -> None:
        sender = self.respond()
        done = receive(self.response, lambda data: bool(1 / 0), self.clock, 10)
        sender.send(b"x")
        self.failureResultOf(done, ZeroDivisionError)
        self.assertTrue(sender.is_aborted)

    def test_cancelling_closes_the_connection(self) -> None:
        sender = self.respond()
        done = self.receive()
        done.cancel()
        self.failureResultOf(done, CancelledError)
        self.assertTrue(sender.is_aborted)

    def test_no_timer_is_left_behind(self) -> None:
        endings = [
            lambda sender, done: sender.finish(),
            lambda sender, done: sender.break_off(),
            lambda sender, done: sender.send(b"enough"),
            lambda sender, done: done.cancel(),
        ]
        for end in endings:
            sender = self.respond()
            done = self.receive()
            end(sender, done)
            done.addErrback(lambda _: None)
            self.assertEqual([], self.clock.getDelayedCalls())

    def test_a_whole_body_is_read(self) -> None:
        sender = self.respond()
        body = read_body(self.response, 10, self.clock, 10)
        sender.send(b"12345")
        sender.send(b"67890")
        sender.finish()
        self.assertEqual(b"1234567890", self.successResultOf(body))

    def test_a_body_over_the_limit_is_refused_without_waiting_for_its_end(self) -> None:
        sender = self.respond()
        body = read_body(self.response, 10, self.clock, 10)
        sender.send(b"12345678901")
        self.assertFalse(self.failureResultOf(body, TransferFailed).value.temporary)
        self.assertTrue(sender.is_aborted)

    def test_a_small_body_is_discarded_and_its_connection_kept(self) -> None:
        sender = self.respond()
        done = Deferred.fromCoroutine(discard(self.response, self.clock, 10))
        sender.send(b"x" * 1000)
        sender.finish()
        self.successResultOf(done)
        self.assertFalse(sender.is_aborted)

    def test_a_large_body_is_discarded_with_its_connection(self) -> None:
        sender = self.respond()
        done = Deferred.fromCoroutine(discard(self.response, self.clock, 10))
        sender.send(b"x" * (SMALL_BODY + 1))
        self.successResultOf(done)
        self.assertTrue(sender.is_aborted)

    def test_a_body_that_says_it_is_large_is_not_even_begun(self) -> None:
        self.agent.answer = lambda request: request.respond(200, None, length=SMALL_BODY + 1)
        sender = self.respond()
        self.successResultOf(Deferred.fromCoroutine(discard(self.response, self.clock, 10)))
        self.assertTrue(sender.is_aborted)

    def test_an_abandoned_body_has_its_connection_closed(self) -> None:
        sender = self.respond()
        abandon(self.response)
        self.assertTrue(sender.is_aborted)


class TransportTests(SynchronousTestCase):
    def setUp(self) -> None:
        self.agent, self.clock, self.transport = fake_transport()

    def get(self, **headers: str) -> Deferred[Any]:
        return Deferred.fromCoroutine(self.transport.get(URL, headers, 10))

    def failure(self, error: BaseException) -> TransferFailed:
        got = self.get()
        self.agent.last.fail(error)
        failed = self.failureResultOf(got, TransferFailed).value
        assert isinstance(failed, TransferFailed)
        return failed

    def test_identity_is_asked_for_and_nothing_else(self) -> None:
        self.get(Range="bytes=0-1")
        self.assertEqual("identity", self.agent.last.headers["accept-encoding"])
        self.assertEqual("bytes=0-1", self.agent.last.headers["range"])

    def test_a_url_is_sent_as_it_is(self) -> None:
        for url in (
            "http://[::1]:5000/v2/",
            "https://my_bucket.s3.example/x%2f%2F?Signature=a~b*c'()%7e&flag&a==b;c",
        ):
            Deferred.fromCoroutine(self.transport.get(url, {}, 10))
            self.assertEqual(url, self.agent.last.url)

    def test_the_program_says_its_name(self) -> None:
        self.get()
        self.assertTrue(self.agent.last.headers["user-agent"].startswith("erofs-twisted/"))

    def test_a_compressed_body_is_refused_and_its_connection_closed(self) -> None:
        got = self.get()
        response = self.agent.last.respond(206, None, Content_Encoding="gzip")
        self.assertIn("gzip", str(self.failureResultOf(got, TransferFailed).value))
        self.assertTrue(response.is_aborted)

    def test_identity_may_be_named(self) -> None:
        got = self.get()
        self.agent.last.respond(206, b"x", Content_Encoding="identity")
        self.assertEqual(206, self.successResultOf(got).code)

    def test_a_redirect_is_an_answer_like_any_other(self) -> None:
        got = self.get()
        self.agent.last.respond(307, b"", Location="https://b.example/")
        self.assertEqual(307, self.successResultOf(got).code)
        self.assertEqual(1, len(self.agent.requests))

    def test_no_answer_in_time_is_a_temporary_failure(self) -> None:
        got = self.get()
        self.clock.advance(10)
        error = self.failureResultOf(got, TransferFailed).value
        self.assertTrue(error.temporary)
        self.assertIn("no answer within 10 seconds", str(error))
        self.assertTrue(self.agent.last.is_cancelled)

    def test_a_connection_that_is_cancelled_is_a_cancellation(self) -> None:
        got = self.get()
        self.agent.last.fail(ConnectingCancelledError(IPv4Address("TCP", "127.0.0.1", 1)))
        self.failureResultOf(got, CancelledError)

    def test_cancelling_withdraws_the_request(self) -> None:
        got = self.get()
        got.cancel()
        self.failureResultOf(got, CancelledError)
        self.assertTrue(self.agent.last.is_cancelled)

    def test_failures_of_the_network_are_temporary(self) -> None:
        for error in (
            ConnectionRefusedError(),
            DNSLookupError("no such host"),
            ResponseNeverReceived([Failure(ConnectionLost())]),
            ResponseNeverReceived([Failure(SSL.Error())]),
        ):
            with self.subTest(error=error):
                self.assertTrue(self.failure(error).temporary)

    def test_no_query_gets_into_a_message(self) -> None:
        self.assertNotIn("secret", str(self.failure(ConnectionRefusedError())))

    def test_a_certificate_that_is_refused_is_permanent_and_says_why(self) -> None:
        error = self.failure(ResponseNeverReceived([Failure(CertificateRefused("it has expired"))]))
        self.assertFalse(error.temporary)
        self.assertEqual("https://a.example/x?…: TLS failed: it has expired", str(error))

    def tls_failure(self, words: str) -> TransferFailed:
        return self.failure(ResponseNeverReceived([Failure(SSL.Error([("SSL routines", "", words)]))]))

    def test_what_a_server_finds_wrong_with_tls_is_permanent_and_names_the_cure(self) -> None:
        for words, said in (
            ("wrong version number", "--plain-http"),
            ("unsupported protocol", "1.2 is the oldest"),
            ("tlsv1 alert protocol version", "1.2 is the oldest"),
            ("tlsv13 alert certificate required", "wants a client certificate"),
            ("ssl/tls alert bad certificate", "NAME.cert with NAME.key"),
            ("ssl/tls alert handshake failure", "NAME.cert with NAME.key"),
            ("tlsv1 alert unknown ca", "authority of our client certificate"),
            ("tlsv1 unrecognized name", "unrecognized name"),
            ("something new", "TLS failed: something new"),
        ):
            with self.subTest(words=words):
                error = self.tls_failure(words)
                self.assertFalse(error.temporary)
                self.assertIn(said, str(error))
                self.assertIn(words, str(error))

    def test_what_is_damaged_on_the_way_is_temporary(self) -> None:
        for words in ("decryption failed or bad record mac", "tlsv1 alert internal error"):
            self.assertTrue(self.tls_failure(words).temporary)

    def test_what_is_no_failure_of_the_network_is_not_dressed_up_as_one(self) -> None:
        got = self.get()
        self.agent.last.fail(ZeroDivisionError())
        self.failureResultOf(got, ZeroDivisionError)

    def test_a_real_server_and_a_real_client_understand_each_other(self) -> None:
        class Page(Resource):
            isLeaf = True

            def render_GET(self, request: Request) -> bytes:
                encodings = request.requestHeaders.getRawHeaders(b"accept-encoding")
                return b" ".join(encodings or [])

        transport = Transport.over_agent(self.clock, RequestTraversalAgent(Page()))
        response = self.successResultOf(Deferred.fromCoroutine(transport.get("https://a.example/", {}, 10)))
        self.assertEqual(b"identity", self.successResultOf(read_body(response, 100, self.clock, 10)))

    def test_a_real_server_receives_a_body(self) -> None:
        class Page(Resource):
            isLeaf = True

            def render_PUT(self, request: Request) -> bytes:
                return b"received " + request.content.read()

        transport = Transport.over_agent(self.clock, RequestTraversalAgent(Page()))
        put = transport.request("PUT", "https://a.example/", {}, 10, b"a body")
        response = self.successResultOf(Deferred.fromCoroutine(put))
        body = self.successResultOf(read_body(response, 100, self.clock, 10))
        self.assertEqual(b"received a body", body)


class ConnectionTests(SynchronousTestCase):
    """Over sockets that are not there."""

    def test_a_host_is_worked_out_once_for_each_scheme_and_port(self) -> None:
        endpoints = _Endpoints(MemoryReactorClock(), BrowserLikePolicyForHTTPS())
        urls = (
            b"http://a.example/1",
            b"https://a.example/1",
            b"http://a.example:81/1",
            b"http://b.example/1",
        )
        first = [endpoints.endpointForURI(URI.fromBytes(url)) for url in urls]
        again = [endpoints.endpointForURI(URI.fromBytes(url.replace(b"/1", b"/2"))) for url in urls]
        self.assertEqual(first, again)
        self.assertEqual(4, len(set(map(id, first))))

    def test_however_many_hosts_there_are_only_some_are_kept(self) -> None:
        endpoints = _Endpoints(MemoryReactorClock(), BrowserLikePolicyForHTTPS())
        for number in range(3 * MAX_HOSTS):
            endpoints.endpointForURI(URI.fromBytes(f"http://host-{number}.example/".encode()))
        self.assertLessEqual(len(endpoints._known), MAX_HOSTS)

    def test_heads_are_taken_in_small_pieces_and_long_bodies_in_large_ones(self) -> None:
        client = _Client()
        transport: Any = StringTransport()
        client.makeConnection(transport)
        answer = client.request(HTTPRequest(b"GET", b"/", Headers({b"Host": [b"a"]}), None))
        self.assertEqual(SMALL_PIECE, transport.bufferSize)
        head = f"HTTP/1.1 200 OK\r\nContent-Length: {2 * SMALL_PIECE}\r\n\r\n".encode()
        client.dataReceived(head)
        self.assertEqual(SMALL_PIECE, transport.bufferSize)
        self.successResultOf(answer)
        client.dataReceived(bytes(SMALL_PIECE))
        self.assertEqual(PIECE, transport.bufferSize)


class EarlyAnswerTests(SynchronousTestCase):
    """What a server says before it has all of a request's body."""

    def setUp(self) -> None:
        self.quiet: list[object] = []
        self.client = _Client(self.quiet.append)
        self.wire: Any = StringTransport()
        self.wire.abortConnection = lambda: setattr(self.wire, "is_aborted", True)
        self.wire.is_aborted = False
        self.client.makeConnection(self.wire)
        self.extended: list[float] = []
        self.reads: list[Deferred[bytes]] = []
        self.producer = _Producer(self, 2000, self.extended.append, 60.0)  # type: ignore[arg-type]
        headers = Headers({b"Host": [b"a"]})
        self.answer = self.client.request(HTTPRequest(b"PUT", b"/", headers, self.producer, persistent=True))
        self.addCleanup(lambda: self.assertEqual([], self.quiet))

    def read(self, offset: int, length: int) -> Deferred[bytes]:
        """What the producer reads, when a test says so."""
        self.reads.append(Deferred())
        return self.reads[-1]

    def close(self) -> None:
        """What the producer reads from is closed."""
        self.is_closed = True

    def check(self, body: bytes) -> None:
        response = self.successResultOf(self.answer)
        self.assertEqual(401, response.code)
        got = read_body(response, 100, Clock(), 10)
        if not got.called:
            self.client.dataReceived(body)
        self.assertEqual(b"refused", self.successResultOf(got))
        self.assertTrue(self.wire.is_aborted)
        self.assertIsNone(self.wire.producer)
        self.reads[0].callback(bytes(2000))
        self.assertTrue(self.is_closed)
        self.assertNotIn(bytes(10), self.wire.value())
        self.client.connectionLost(Failure(ConnectionLost()))

    def test_it_counts_at_once_and_ends_the_connection(self) -> None:
        self.client.dataReceived(b"HTTP/1.1 401 No\r\nContent-Length: 7\r\n\r\nrefused")
        self.check(b"")

    def test_it_may_come_in_pieces(self) -> None:
        self.client.dataReceived(b"HTTP/1.1 401 No\r\nConte")
        self.assertNoResult(self.answer)
        self.client.dataReceived(b"nt-Length: 7\r\n\r\n")
        self.check(b"refused")

    def test_it_may_have_no_body(self) -> None:
        self.client.dataReceived(b"HTTP/1.1 401 No\r\nContent-Length: 0\r\n\r\n")
        self.assertEqual(401, self.successResultOf(self.answer).code)
        self.assertTrue(self.wire.is_aborted)

    def test_a_provisional_one_is_none(self) -> None:
        self.client.dataReceived(b"HTTP/1.1 100 Continue\r\n\r\n")
        self.assertNoResult(self.answer)
        self.reads[0].callback(bytes(2000))
        self.assertIn(bytes(2000), self.wire.value())
        self.client.dataReceived(b"HTTP/1.1 201 Created\r\nContent-Length: 0\r\n\r\n")
        self.assertEqual(201, self.successResultOf(self.answer).code)
        self.assertFalse(self.wire.is_aborted)
        self.assertEqual([self.client], self.quiet)
        self.quiet.clear()

    def test_an_answer_after_all_of_the_body_keeps_the_connection(self) -> None:
        self.reads[0].callback(bytes(2000))
        self.client.dataReceived(b"HTTP/1.1 401 No\r\nContent-Length: 0\r\n\r\n")
        self.assertEqual(401, self.successResultOf(self.answer).code)
        self.assertFalse(self.wire.is_aborted)
        self.assertEqual([self.client], self.quiet)
        self.quiet.clear()

    def test_to_cancel_the_answer_then_ends_the_connection(self) -> None:
        self.client.dataReceived(b"HTTP/1.1 401 No\r\nContent-Length: 7\r\n\r\n")
        abandon(self.successResultOf(self.answer))
        self.assertTrue(self.wire.is_aborted)


class StatusTests(SynchronousTestCase):
    def setUp(self) -> None:
        self.agent, self.clock, self.transport = fake_transport()

    def error(self, code: int, body: bytes = b"", **headers: str) -> Any:
        got = Deferred.fromCoroutine(self.transport.get(URL, {}, 10))
        self.agent.last.respond(code, body, **headers)
        response = self.successResultOf(got)
        return self.successResultOf(Deferred.fromCoroutine(status_error(response, URL, self.clock, 10)))

    def test_statuses_that_pass_are_temporary(self) -> None:
        for code in (408, 429, 499, 500, 502, 503, 504, 522):
            self.assertTrue(self.error(code).temporary, code)

    def test_other_statuses_are_permanent(self) -> None:
        for code in (400, 401, 403, 404, 405, 410, 416, 451, 501, 505, 204, 304):
            self.assertFalse(self.error(code).temporary, code)

    def test_errors_have_their_types(self) -> None:
        self.assertIsInstance(self.error(401), AccessDenied)
        self.assertIsInstance(self.error(403), AccessDenied)
        self.assertIsInstance(self.error(404), NotInRegistry)

    def test_the_registrys_own_words_are_passed_on(self) -> None:
        body = b'{"errors":[{"code":"NAME_UNKNOWN","message":"repository name not known"}]}'
        self.assertIn("NAME_UNKNOWN: repository name not known", str(self.error(404, body)))

    def test_plain_text_is_passed_on(self) -> None:
        self.assertIn("slow down", str(self.error(429, b"slow down\n", Content_Type="text/plain")))

    def test_the_title_of_a_proxys_page_is_told_unless_it_says_nothing_new(self) -> None:
        page = b"<html>\n<head><TITLE>400 No required SSL\n certificate was sent</TITLE></head>"
        said = str(self.error(400, page, Content_Type="text/html; charset=utf-8"))
        self.assertTrue(said.endswith(": 400 Bad Request: 400 No required SSL  certificate was sent"), said)
        for page in (b"<title>400 Bad Request</title>", b"<p>", b""):
            said = str(self.error(400, page, Content_Type="text/html"))
            self.assertTrue(said.endswith("…: 400 Bad Request"), said)

    def test_a_pause_asked_for_is_known(self) -> None:
        self.assertEqual(7, self.error(429, Retry_After="7").retry_after)
        self.assertIsNone(self.error(503).retry_after)

    def test_the_query_is_not_shown(self) -> None:
        self.assertNotIn("secret", str(self.error(404)))

    def test_what_a_registry_says_cannot_write_on_the_terminal(self) -> None:
        body = b'{"errors":[{"code":"X","message":"\\u001b[2J\\nfake line"}]}'
        said = str(self.error(404, body))
        self.assertNotIn("\x1b", said)
        self.assertNotIn("\n", said)

    def test_a_huge_explanation_is_not_read_to_its_end(self) -> None:
        self.assertIn("404 Not Found", str(self.error(404, b"x" * 1_000_000)))

    def test_odd_explanations_say_nothing(self) -> None:
        for body in (b"", b"[]", b"{}", b'{"errors":5}', b'{"errors":[5]}', b"<html>", b"\xff", b"[" * 9999):
            self.assertEqual("", errors_text(body), body[:20])
