"""Redirects: where they are followed to, and what goes along."""

from __future__ import annotations

import itertools

from twisted.internet.defer import Deferred
from twisted.internet.error import ConnectionRefusedError

from erofs_twisted.registry.errors import RegistryError, TransferFailed, Unreachable
from erofs_twisted.registry.session import Answer, Session
from erofs_twisted.registry.urls import Origin
from tests.unit.fakehttp import FakeRequest
from tests.unit.test_registry_auth import REGISTRY, URL, AuthTests


class RedirectTests(AuthTests):
    def setUp(self) -> None:
        super().setUp()
        self.routes: dict[str, str] = {}

    def answer(self, request: FakeRequest) -> None:
        if request.url in self.routes:
            request.respond(307, b"gone", Location=self.routes[request.url])
        elif request.url.startswith("https://cdn.example/"):
            request.respond(206, b"content")
        else:
            super().answer(request)

    def test_a_redirect_is_followed_without_authorization(self) -> None:
        self.status()
        self.routes[URL] = "https://cdn.example/b?sig=1"
        answer = self.successResultOf(self.get())
        self.assertEqual(
            (206, "https://cdn.example/b?sig=1", True), (answer.response.code, answer.url, answer.redirected)
        )
        self.assertEqual("Bearer token-1", self.agent.requests[-2].headers["authorization"])
        self.assertNotIn("authorization", self.agent.last.headers)

    def test_a_redirect_within_the_registry_keeps_the_authorization(self) -> None:
        self.status()
        self.routes[URL] = "/v2/elsewhere"
        self.assertEqual(200, self.status())
        self.assertEqual("Bearer token-1", self.agent.last.headers["authorization"])

    def test_another_port_is_another_host(self) -> None:
        self.status()
        self.routes[URL] = "https://r.example:444/x"
        self.status()
        self.assertNotIn("authorization", self.agent.last.headers)

    def test_a_401_from_elsewhere_fetches_no_token(self) -> None:
        self.routes[URL] = "https://other.example/x"
        self.assertEqual(401, self.status())
        self.assertEqual(0, self.granted)

    def test_the_range_goes_along(self) -> None:
        self.routes[URL] = "https://cdn.example/b"
        self.successResultOf(Deferred.fromCoroutine(self.session.get(URL, {"Range": "bytes=0-1"}, 10)))
        self.assertEqual("bytes=0-1", self.agent.last.headers["range"])

    def test_ten_redirects_are_followed(self) -> None:
        self.chain(10)
        self.assertEqual(206, self.status())

    def test_eleven_redirects_are_not(self) -> None:
        self.chain(11)
        self.assertIn("more than 10", str(self.failureResultOf(self.get(), TransferFailed).value))

    def chain(self, count: int) -> None:
        urls = [
            URL,
            *(f"https://hop.example/{number}" for number in range(1, count)),
            "https://cdn.example/b",
        ]
        self.routes.update(itertools.pairwise(urls))

    def test_a_host_that_is_away_is_told_from_one_that_only_leads_there(self) -> None:
        self.routes[URL] = "https://away.example/x"
        away = self.agent.answer

        def answer(request: FakeRequest) -> None:
            if "away" in request.url:
                request.fail(ConnectionRefusedError())
            else:
                away(request)

        self.agent.answer = answer
        behind = self.failureResultOf(self.get(), TransferFailed).value
        first = self.failureResultOf(self.get("https://away.example/x"), TransferFailed).value
        self.assertEqual([False, True], [isinstance(error, Unreachable) for error in (behind, first)])
        self.assertTrue(behind.temporary and first.temporary)

    def test_a_redirect_out_of_tls_is_refused(self) -> None:
        self.routes[URL] = "http://cdn.example/b?secret"
        error = self.failureResultOf(self.get(), TransferFailed).value
        self.assertIn("--plain-http", str(error))
        self.assertNotIn("secret", str(error))

    def test_a_redirect_out_of_tls_is_followed_where_plain_http_is_asked_for(self) -> None:
        self.routes[URL] = "http://cdn.example/b"
        self.session = Session(self.transport, Origin.of(REGISTRY), self.authorizer, plain_http=True)
        self.successResultOf(self.get())
        self.assertEqual("http://cdn.example/b", self.agent.last.url)

    def test_a_redirect_that_leads_nowhere_is_refused(self) -> None:
        for location in ("", "gopher://x/"):
            self.routes[URL] = location
            self.failureResultOf(self.get(), RegistryError)
            self.assertEqual(URL, self.agent.last.url)


class OtherMethodTests(AuthTests):
    """What changes something goes where a GET would go, body and all, unless that would make it a GET."""

    def setUp(self) -> None:
        super().setUp()
        self.location = ""
        self.redirection = 307

    def answer(self, request: FakeRequest) -> None:
        if request.url == URL and self.location:
            request.respond(self.redirection, b"", Location=self.location)
        elif request.url == self.location:
            request.respond(201)
        else:
            super().answer(request)

    def put(self) -> Deferred[Answer]:
        return Deferred.fromCoroutine(self.session.request("PUT", URL, {"Content-Type": "x/y"}, 10, b"body"))

    def test_a_body_is_sent_again_with_the_token_that_was_asked_for(self) -> None:
        self.assertEqual(200, self.successResultOf(self.put()).response.code)
        sent = [request for request in self.agent.requests if request.url == URL]
        self.assertEqual([("PUT", b"body")] * 2, [(request.method, request.body) for request in sent])
        self.assertEqual(["x/y"] * 2, [request.headers["content-type"] for request in sent])
        self.assertNotIn("authorization", sent[0].headers)
        self.assertEqual("Bearer token-1", sent[1].headers["authorization"])

    def test_a_redirect_that_keeps_the_method_takes_the_body_along_and_no_authorization(self) -> None:
        self.status()
        self.location = "https://cdn.example/b"
        self.successResultOf(self.put())
        last = self.agent.last
        self.assertEqual(("PUT", "https://cdn.example/b", b"body"), (last.method, last.url, last.body))
        self.assertNotIn("authorization", last.headers)

    def test_a_redirect_that_may_change_the_method_is_an_answer_like_any_other(self) -> None:
        self.location = "https://cdn.example/b"
        for self.redirection in (301, 302, 303):
            self.assertEqual(self.redirection, self.successResultOf(self.put()).response.code)
            self.assertEqual(URL, self.agent.last.url)
