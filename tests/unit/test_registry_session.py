"""Redirects: where they are followed to, and what goes along."""

from __future__ import annotations

import itertools

from twisted.internet.defer import Deferred

from erofs_twisted.registry.errors import RegistryError, TransferFailed
from erofs_twisted.registry.session import Session
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
