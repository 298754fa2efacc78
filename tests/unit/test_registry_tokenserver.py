"""The exchange with a token server: which form, with what, and what it refuses."""

from __future__ import annotations

import base64
import json
from typing import Any
from urllib.parse import parse_qs

from twisted.internet.defer import Deferred
from twisted.trial.unittest import SynchronousTestCase

from erofs_twisted.registry.credentials import Credentials, Identity, IdentityToken, RegistryToken
from erofs_twisted.registry.errors import AccessDenied, TransferFailed
from erofs_twisted.registry.tokens import Token
from erofs_twisted.registry.tokenserver import DENIED_SECONDS, TokenServer
from tests.unit.fakehttp import FakeRequest, fake_transport

REALM = "https://auth.example/token"
SCOPES = ("repository:a:pull", "repository:b:pull")
ALICE = Credentials("alice", "secret & more")
LOGIN = IdentityToken("identity")


class TokenServerTests(SynchronousTestCase):
    def setUp(self) -> None:
        self.agent, self.clock, transport = fake_transport(self.answer)
        self.lacks = ""
        """The method that it does not speak."""
        self.rotates = 0
        self.status = 200
        self.server = TokenServer(transport, REALM, "r.example")

    def answer(self, request: FakeRequest) -> None:
        if request.method == self.lacks:
            request.respond(405)
        elif self.status != 200:
            request.respond(self.status, b'{"error":"invalid_grant","error_description":"too old"}')
        else:
            fields: dict[str, Any] = {"access_token": "t", "expires_in": 300}
            if self.rotates:
                fields["refresh_token"] = f"rotated-{len(self.agent.requests)}"
            request.respond(200, json.dumps(fields).encode())

    def exchange(self, held: Identity | None) -> Token:
        return self.successResultOf(Deferred.fromCoroutine(self.server.exchange(held, SCOPES)))

    def refusal(self, held: Identity | None, kind: type[Exception]) -> str:
        return str(
            self.failureResultOf(Deferred.fromCoroutine(self.server.exchange(held, SCOPES)), kind).value
        )

    @property
    def form(self) -> dict[str, list[str]]:
        return parse_qs(self.agent.last.body.decode(), strict_parsing=True)

    @property
    def methods(self) -> list[str]:
        return [request.method for request in self.agent.requests]

    def test_an_identity_token_is_posted_as_a_refresh_token(self) -> None:
        self.assertEqual("t", self.exchange(LOGIN).value)
        self.assertEqual(["POST"], self.methods)
        self.assertEqual(REALM, self.agent.last.url)
        self.assertNotIn("authorization", self.agent.last.headers)
        self.assertEqual("application/x-www-form-urlencoded", self.agent.last.headers["content-type"])
        self.assertEqual(
            {
                "grant_type": ["refresh_token"],
                "refresh_token": ["identity"],
                "client_id": ["erofs-twisted"],
                "service": ["r.example"],
                "scope": [" ".join(SCOPES)],
            },
            self.form,
        )

    def test_what_the_server_gives_in_its_place_is_used_from_then_on(self) -> None:
        self.rotates = True
        for expected in ("identity", "rotated-1", "rotated-2"):
            self.exchange(LOGIN)
            self.assertEqual([expected], self.form["refresh_token"])

    def test_a_new_login_counts_more_than_what_was_given_for_the_old_one(self) -> None:
        self.rotates = True
        self.exchange(LOGIN)
        self.exchange(IdentityToken("newer"))
        self.assertEqual(["newer"], self.form["refresh_token"])

    def test_a_server_without_the_post_form_gets_it_as_a_password(self) -> None:
        self.lacks = "POST"
        self.exchange(LOGIN)
        sent = base64.b64decode(self.agent.last.headers["authorization"].split()[1])
        self.assertEqual((["POST", "GET"], b"<token>:identity"), (self.methods, sent))

    def test_name_and_password_go_by_get(self) -> None:
        self.exchange(ALICE)
        self.assertEqual(["GET"], self.methods)
        self.assertEqual(ALICE.authorization(), self.agent.last.headers["authorization"])

    def test_several_scopes_are_parameters_of_their_own(self) -> None:
        self.exchange(None)
        query = parse_qs(self.agent.last.url.partition("?")[2])
        self.assertEqual({"service": ["r.example"], "scope": list(SCOPES)}, query)

    def test_a_server_without_the_get_form_is_posted_the_password(self) -> None:
        self.lacks = "GET"
        self.exchange(ALICE)
        self.assertEqual(["GET", "POST"], self.methods)
        self.assertEqual(["password"], self.form["grant_type"])
        self.assertEqual((["alice"], ["secret & more"]), (self.form["username"], self.form["password"]))

    def test_the_form_that_was_understood_is_used_at_once_from_then_on(self) -> None:
        for self.lacks, held in (("GET", ALICE), ("POST", LOGIN)):
            self.server = TokenServer(self.server._transport, REALM, "r.example")
            self.exchange(held)
            before = len(self.agent.requests)
            self.exchange(held)
            self.assertEqual(before + 1, len(self.agent.requests))

    def test_without_credentials_nothing_is_posted(self) -> None:
        self.lacks = "GET"
        self.refusal(None, TransferFailed)
        self.assertEqual(["GET"], self.methods)

    def test_a_server_that_is_not_there_is_asked_in_both_forms_once(self) -> None:
        self.status = 404
        self.refusal(ALICE, TransferFailed)
        self.assertEqual(["GET", "POST"], self.methods)

    def test_a_registrys_own_token_is_exchanged_for_nothing(self) -> None:
        self.assertEqual("own", self.exchange(RegistryToken("own")).value)
        self.assertEqual([], self.methods)

    def test_an_identity_token_that_is_over_says_to_log_in_again(self) -> None:
        for self.status in (400, 401):
            self.clock.advance(DENIED_SECONDS)
            text = self.refusal(LOGIN, AccessDenied)
            self.assertIn("log in again", text)
            self.assertIn("invalid_grant: too old", text)

    def test_a_wrong_password_is_tried_once(self) -> None:
        self.status = 401
        self.assertIn("refuses this user name and password", self.refusal(ALICE, AccessDenied))
        self.assertEqual(["GET"], self.methods)

    def test_however_often_it_is_tried_what_is_denied_is_asked_for_seldom(self) -> None:
        self.status = 401
        said = {self.refusal(ALICE, AccessDenied) for _ in range(100)}
        self.assertEqual((1, 1), (len(self.agent.requests), len(said)))
        self.clock.advance(DENIED_SECONDS)
        self.status = 200
        self.assertEqual("t", self.exchange(ALICE).value)

    def test_another_user_is_not_denied_for_that(self) -> None:
        self.status = 401
        self.refusal(ALICE, AccessDenied)
        self.status = 200
        self.exchange(Credentials("alice", "another"))

    def test_a_server_that_is_overloaded_denies_nothing(self) -> None:
        self.status = 503
        self.refusal(ALICE, TransferFailed)
        self.status = 200
        self.exchange(ALICE)

    def test_no_secret_is_in_a_message_or_shows(self) -> None:
        self.rotates = True
        shown = repr(self.exchange(LOGIN)) + repr(self.server)
        for self.status in (400, 401, 404, 503):
            shown += self.refusal(LOGIN, Exception) + self.refusal(ALICE, Exception)
        for secret in ("identity'", "rotated-", "secret"):
            self.assertNotIn(secret, shown)
