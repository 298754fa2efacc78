"""Getting in: what is asked for, when, how often, and where credentials go."""

from __future__ import annotations

import base64
import json
from typing import Any

from twisted.internet.defer import CancelledError, Deferred, gatherResults
from twisted.internet.error import ConnectionRefusedError
from twisted.trial.unittest import SynchronousTestCase

from erofs_twisted.registry.auth import Authorizer
from erofs_twisted.registry.credentials import Credentials
from erofs_twisted.registry.errors import AccessDenied, TransferFailed
from erofs_twisted.registry.keychain import Given
from erofs_twisted.registry.session import Answer, Session
from erofs_twisted.registry.urls import Origin
from tests.unit.fakehttp import FakeRequest, fake_transport

REGISTRY = "https://r.example"
URL = f"{REGISTRY}/v2/a/blobs/x"
REALM = "https://auth.example/token"
SCOPE = "repository:a:pull"
BEARER = f'Bearer realm="{REALM}",service="r.example",scope="{SCOPE}"'
ALICE = Credentials("alice", "secret")
ALICES = "Basic " + base64.b64encode(b"alice:secret").decode()


class AuthTests(SynchronousTestCase):
    """Against a registry that accepts what is in ``self.accepted`` and challenges with ``self.challenge``."""

    def setUp(self) -> None:
        self.agent, self.clock, self.transport = fake_transport(self.answer)
        self.accepted: set[str | None] = set()
        self.challenge = BEARER
        self.refusal = 401
        self.granted = 0
        self.lifetime: Any = 100
        self.session = self.make_session()

    def make_session(self, credentials: Credentials | None = None, registry: str = REGISTRY) -> Session:
        origin = Origin.of(registry)
        self.authorizer = Authorizer(self.transport, origin, SCOPE, Given(credentials))
        self.session = Session(self.transport, origin, self.authorizer)
        return self.session

    def answer(self, request: FakeRequest) -> None:
        if request.url.startswith(REALM):
            self.grant(request)
        elif request.headers.get("authorization") in self.accepted:
            request.respond(200, b"content")
        else:
            headers = {"WWW_Authenticate": self.challenge} if self.challenge else {}
            request.respond(self.refusal, b"", **headers)

    def grant(self, request: FakeRequest) -> None:
        self.granted += 1
        token = f"token-{self.granted}"
        self.accepted.add(f"Bearer {token}")
        request.respond(200, json.dumps({"token": token, "expires_in": self.lifetime}).encode())

    def get(self, url: str = URL) -> Deferred[Answer]:
        return Deferred.fromCoroutine(self.session.get(url, {}, 10))

    def status(self) -> int:
        return int(self.successResultOf(self.get()).response.code)

    def hold_tokens(self) -> list[FakeRequest]:
        """From now on the token server does not answer by itself; its requests gather in the list."""
        held: list[FakeRequest] = []
        self.grant_later = self.grant
        self.grant = held.append  # type: ignore[method-assign]
        return held


class AnonymousTests(AuthTests):
    def test_an_open_registry_is_asked_once_and_without_authorization(self) -> None:
        self.accepted.add(None)
        self.assertEqual(200, self.status())
        self.assertEqual([URL], self.agent.urls)
        self.assertNotIn("authorization", self.agent.last.headers)

    def test_credentials_are_not_volunteered(self) -> None:
        self.accepted.add(None)
        self.make_session(ALICE)
        self.status()
        self.assertNotIn("authorization", self.agent.last.headers)


class BasicTests(AuthTests):
    def setUp(self) -> None:
        super().setUp()
        self.challenge = 'Basic realm="r"'
        self.accepted.add(ALICES)

    def test_credentials_are_sent_when_asked_for(self) -> None:
        self.make_session(ALICE)
        self.assertEqual(200, self.status())

    def test_they_are_sent_at_once_from_then_on(self) -> None:
        self.make_session(ALICE)
        self.status()
        self.status()
        self.assertEqual(3, len(self.agent.requests))

    def test_without_credentials_the_options_are_named(self) -> None:
        error = self.failureResultOf(self.get(), AccessDenied).value
        self.assertIn("--username and --password-file", str(error))

    def test_wrong_credentials_are_tried_once(self) -> None:
        self.make_session(Credentials("alice", "wrong"))
        self.assertEqual(401, self.status())
        self.assertEqual(2, len(self.agent.requests))

    def test_wrong_credentials_are_not_tried_again_by_the_next_request(self) -> None:
        self.make_session(Credentials("alice", "wrong"))
        self.status()
        self.failureResultOf(self.get(), AccessDenied)
        self.assertEqual(3, len(self.agent.requests))

    def test_schemes_that_we_do_not_speak_are_named(self) -> None:
        self.challenge = "Negotiate, NTLM"
        error = self.failureResultOf(self.get(), AccessDenied).value
        self.assertIn("negotiate, ntlm", str(error))

    def test_bearer_is_preferred_also_on_one_line(self) -> None:
        self.challenge = f'Basic realm="r", {BEARER}'
        self.make_session(ALICE)
        self.status()
        self.assertEqual("Bearer token-1", self.agent.last.headers["authorization"])


class BearerTests(AuthTests):
    def test_a_token_is_fetched_and_used(self) -> None:
        self.assertEqual(200, self.status())
        asked = "?service=r.example&scope=repository%3Aa%3Apull"
        self.assertEqual([URL, REALM + asked, URL], self.agent.urls)

    def test_a_token_is_used_again(self) -> None:
        self.status()
        self.status()
        self.assertEqual(1, self.granted)

    def test_an_anonymous_token_is_fetched_without_authorization(self) -> None:
        self.status()
        self.assertNotIn("authorization", self.agent.requests[1].headers)

    def test_credentials_go_to_the_token_server_and_not_to_the_registry(self) -> None:
        self.make_session(ALICE)
        self.status()
        sent = [request.headers.get("authorization") for request in self.agent.requests]
        self.assertEqual([None, ALICES, "Bearer token-1"], sent)

    def test_without_a_scope_in_the_challenge_our_own_is_asked_for(self) -> None:
        self.challenge = f'Bearer realm="{REALM}"'
        self.status()
        self.assertEqual(f"{REALM}?scope=repository%3Aa%3Apull", self.agent.urls[1])

    def test_a_401_fetches_a_new_token(self) -> None:
        self.status()
        self.accepted.clear()
        self.assertEqual(200, self.status())
        self.assertEqual(2, self.granted)

    def test_a_403_fetches_a_new_token_too(self) -> None:
        self.status()
        self.accepted.clear()
        self.refusal, self.challenge = 403, ""
        self.assertEqual(200, self.status())
        self.assertEqual(2, self.granted)

    def test_a_403_without_a_token_is_the_answer(self) -> None:
        self.refusal = 403
        self.assertEqual(403, self.status())
        self.assertEqual(0, self.granted)

    def test_a_token_that_is_refused_is_not_fetched_in_a_loop(self) -> None:
        self.grant = lambda request: request.respond(200, b'{"token":"useless"}')  # type: ignore[assignment]
        self.assertEqual(401, self.status())
        self.assertEqual(3, len(self.agent.requests))

    def test_a_wider_scope_is_asked_for_first_and_the_old_one_kept(self) -> None:
        self.status()
        self.accepted.clear()
        self.challenge = f'Bearer realm="{REALM}",scope="repository:b:pull",error="insufficient_scope"'
        self.assertEqual(200, self.status())
        asked = self.agent.urls[-2]
        self.assertEqual(f"{REALM}?scope=repository%3Ab%3Apull&scope=repository%3Aa%3Apull", asked)

    def test_several_scopes_in_a_challenge_are_asked_for_one_by_one(self) -> None:
        self.challenge = f'Bearer realm="{REALM}",scope="repository:b:pull  repository:a:pull,push"'
        self.status()
        asked = f"{REALM}?scope=repository%3Ab%3Apull&scope=repository%3Aa%3Apull%2Cpush"
        self.assertEqual(asked, self.agent.urls[1])

    def test_a_branch_asks_for_its_own_scopes_too_and_first_where_it_need_not_be_told(self) -> None:
        for before in (False, True):
            self.make_session()
            if before:
                self.status()
            self.session = self.session.apart("repository:b:pull")
            self.agent.requests.clear()
            self.assertEqual(200, self.status())
            wanted = ["repository%3Aa%3Apull", "repository%3Ab%3Apull"]
            scopes = "&".join(f"scope={scope}" for scope in (reversed(wanted) if before else wanted))
            (asked,) = [url for url in self.agent.urls if url.startswith(REALM)]
            self.assertTrue(asked.endswith(scopes), asked)

    def test_however_many_requests_wait_one_token_is_fetched(self) -> None:
        held = self.hold_tokens()
        waiting = [self.get() for _ in range(20)]
        self.assertEqual(1, len(held))
        self.grant_later(held[0])
        answers = self.successResultOf(gatherResults(waiting))
        self.assertEqual([200] * 20, [answer.response.code for answer in answers])
        self.assertEqual(1, len(held))

    def test_however_many_requests_are_refused_one_token_is_fetched(self) -> None:
        self.status()
        late: list[FakeRequest] = []
        self.agent.answer = late.append
        waiting = [self.get() for _ in range(5)]
        self.agent.answer = self.answer
        self.accepted.clear()
        for request in late:
            self.answer(request)
        self.successResultOf(gatherResults(waiting))
        self.assertEqual(2, self.granted)

    def test_who_leaves_does_not_disturb_those_who_wait(self) -> None:
        held = self.hold_tokens()
        first, second = self.get(), self.get()
        first.cancel()
        self.failureResultOf(first, CancelledError)
        self.assertFalse(held[0].is_cancelled)
        self.grant_later(held[0])
        self.assertEqual(200, self.successResultOf(second).response.code)

    def test_when_the_last_has_left_the_fetch_ends(self) -> None:
        held = self.hold_tokens()
        waiting = [self.get(), self.get()]
        for each in waiting:
            each.cancel()
            self.failureResultOf(each, CancelledError)
        self.assertTrue(held[0].is_cancelled)

    def test_after_all_have_left_a_token_can_still_be_fetched(self) -> None:
        held = self.hold_tokens()
        first = self.get()
        first.cancel()
        self.failureResultOf(first, CancelledError)
        second = self.get()
        self.grant_later(held[1])
        self.assertEqual(200, self.successResultOf(second).response.code)

    def test_a_failure_reaches_all_who_wait(self) -> None:
        held = self.hold_tokens()
        waiting = [self.get(), self.get()]
        held[0].fail(ConnectionRefusedError())
        for each in waiting:
            self.assertTrue(self.failureResultOf(each, TransferFailed).value.temporary)

    def test_an_old_token_is_renewed_behind_the_request(self) -> None:
        self.status()
        self.clock.advance(76)
        held = self.hold_tokens()
        self.assertEqual(200, self.status())
        self.assertEqual("Bearer token-1", self.agent.last.headers["authorization"])
        self.grant_later(held[0])
        self.status()
        self.assertEqual("Bearer token-2", self.agent.last.headers["authorization"])

    def test_a_renewal_that_fails_disturbs_nobody(self) -> None:
        self.status()
        self.clock.advance(76)
        held = self.hold_tokens()
        self.status()
        held[0].respond(503)
        self.assertEqual(200, self.status())
        self.assertEqual([], self.flushLoggedErrors())

    def test_a_young_token_is_not_renewed(self) -> None:
        self.status()
        self.clock.advance(74)
        self.status()
        self.assertEqual(1, self.granted)

    def test_an_expired_token_is_not_sent(self) -> None:
        self.status()
        self.clock.advance(101)
        self.status()
        self.assertEqual("Bearer token-2", self.agent.last.headers["authorization"])
        self.assertEqual(2, self.granted)

    def test_closing_ends_a_renewal(self) -> None:
        self.status()
        self.clock.advance(76)
        held = self.hold_tokens()
        self.status()
        self.authorizer.close()
        self.assertTrue(held[0].is_cancelled)

    def test_a_token_server_without_tls_is_refused(self) -> None:
        self.challenge = 'Bearer realm="http://auth.example/token"'
        self.make_session(ALICE)
        self.assertIn("not https", str(self.failureResultOf(self.get(), AccessDenied).value))
        self.assertEqual([URL], self.agent.urls)

    def test_a_token_server_without_tls_is_fine_for_a_registry_without_tls(self) -> None:
        self.challenge = 'Bearer realm="http://auth.example/token"'
        self.make_session(registry="http://r.example")
        got = self.get("http://r.example/x")
        self.assertEqual("http://auth.example/token?scope=repository%3Aa%3Apull", self.agent.urls[1])
        got.addErrback(lambda _: None)

    def test_a_clouds_metadata_service_is_no_token_server(self) -> None:
        self.challenge = 'Bearer realm="https://169.254.169.254/latest"'
        self.assertIn("private address", str(self.failureResultOf(self.get(), AccessDenied).value))

    def test_a_realm_that_is_no_url_is_refused(self) -> None:
        for realm in ("", "token", "file:///etc/passwd"):
            self.challenge = f'Bearer realm="{realm}"'
            self.failureResultOf(self.get(), AccessDenied)

    def test_a_token_server_that_wants_credentials_names_the_options(self) -> None:
        self.grant = lambda request: request.respond(401)  # type: ignore[assignment]
        error = self.failureResultOf(self.get(), AccessDenied).value
        self.assertIn("--username and --password-file", str(error))

    def test_a_token_server_that_is_overloaded_is_a_temporary_failure(self) -> None:
        self.grant = lambda request: request.respond(503, Retry_After="5")  # type: ignore[assignment]
        error = self.failureResultOf(self.get(), TransferFailed).value
        self.assertEqual((True, 5), (error.temporary, error.retry_after))

    def test_a_token_server_that_sends_too_much_is_cut_off(self) -> None:
        self.grant = lambda request: request.respond(200, b"x" * 100_000)  # type: ignore[assignment]
        self.failureResultOf(self.get(), TransferFailed)

    def test_a_renewal_that_fails_is_not_repeated_by_each_request(self) -> None:
        self.status()
        self.clock.advance(76)
        asked: list[FakeRequest] = []

        def fail(request: FakeRequest) -> None:
            asked.append(request)
            request.respond(503)

        self.grant = fail  # type: ignore[method-assign]
        for _ in range(100):
            self.status()
            self.clock.advance(0.2)
        self.assertLess(len(asked), 5)

    def test_a_scope_that_the_user_has_not_is_named(self) -> None:
        self.challenge = f'Bearer realm="{REALM}",scope="repository:b:push",error="insufficient_scope"'
        self.grant = lambda request: request.respond(200, b'{"token":"useless"}')  # type: ignore[assignment]
        answer = self.successResultOf(self.get())
        error = self.successResultOf(Deferred.fromCoroutine(self.session.refusal(answer, 10)))
        self.assertIn("does not reach as far as 'repository:b:push'", str(error))
