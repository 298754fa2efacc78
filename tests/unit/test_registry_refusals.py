"""What is done about credentials that a registry or its token server no longer accepts."""

from __future__ import annotations

import json
from collections.abc import Callable

from twisted.internet.defer import Deferred, fail, gatherResults, succeed
from twisted.trial.unittest import SynchronousTestCase
from zope.interface import implementer

from erofs_twisted.registry.auth import Authorizer
from erofs_twisted.registry.credentials import Credentials, Identity, RegistryToken
from erofs_twisted.registry.errors import AccessDenied, TransferFailed
from erofs_twisted.registry.keychain import IKeychain
from erofs_twisted.registry.session import Answer, Session
from erofs_twisted.registry.urls import Origin
from tests.unit.fakehttp import FakeRequest, fake_transport

REGISTRY = "https://r.example"
URL = f"{REGISTRY}/v2/a/blobs/x"
REALM = "https://auth.example/token"
BASIC = 'Basic realm="r"'
BEARER = f'Bearer realm="{REALM}",service="r.example",scope="repository:a:pull"'
OLD, NEW = Credentials("alice", "old"), Credentials("alice", "new")


@implementer(IKeychain)
class ChangingKeychain:
    """Says the first of its ``identities`` until that is refused, then the next; the last one stays."""

    def __init__(self, *identities: Identity) -> None:
        self.identities = list(identities)
        self.asked = 0
        self.refusals: list[Identity] = []
        self.failure: Exception | None = None

    def credentials(self) -> Deferred[Identity | None]:
        self.asked += 1
        if self.failure is not None:
            return fail(self.failure)
        return succeed(self.identities[0] if self.identities else None)

    def refused(self, credentials: Identity) -> None:
        self.refusals.append(credentials)
        if credentials in self.identities[:-1]:
            self.identities.remove(credentials)


class RefusalTests(SynchronousTestCase):
    def setUp(self) -> None:
        self.agent, self.clock, self.transport = fake_transport(self.answer)
        self.accepted: set[str | None] = set()
        """Values of ``Authorization``, at the registry and at the token server."""
        self.challenge = BASIC
        self.refusal = 401

    def make(self, *identities: Identity) -> ChangingKeychain:
        self.keychain = ChangingKeychain(*identities)
        origin = Origin.of(REGISTRY)
        authorizer = Authorizer(self.transport, origin, "repository:a:pull", self.keychain)
        self.session = Session(self.transport, origin, authorizer)
        return self.keychain

    def answer(self, request: FakeRequest) -> None:
        authorization = request.headers.get("authorization")
        if authorization in self.accepted:
            token = f"token-{len(self.agent.requests)}"
            if request.url.startswith(REALM):
                self.accepted.add(f"Bearer {token}")
            request.respond(200, json.dumps({"token": token}).encode())
        else:
            # One who is not known yet is asked to log in; one who is known is refused.
            code = 401 if authorization is None else self.refusal
            challenged = code == 401 and not request.url.startswith(REALM)
            request.respond(code, b"", **({"WWW_Authenticate": self.challenge} if challenged else {}))

    def get(self) -> Deferred[Answer]:
        return Deferred.fromCoroutine(self.session.get(URL, {}, 10.0))

    def status(self) -> int:
        return int(self.successResultOf(self.get()).response.code)

    def replaced(self, accept: Callable[[Credentials], str | None]) -> None:
        """After a first request as `OLD`, only `NEW` is accepted."""
        self.accepted = {accept(OLD)}
        self.assertEqual(200, self.status())
        self.accepted = {accept(NEW)}


class PasswordTests(RefusalTests):
    def test_a_new_one_is_used_as_soon_as_the_old_one_is_refused(self) -> None:
        self.make(OLD, NEW)
        self.replaced(Credentials.authorization)
        self.assertEqual(200, self.status())
        self.assertEqual([OLD], self.keychain.refusals)

    def test_a_new_one_that_is_there_already_refuses_nothing(self) -> None:
        keychain = self.make(OLD)
        self.replaced(Credentials.authorization)
        keychain.identities = [NEW]
        self.assertEqual(200, self.status())
        self.assertEqual([], keychain.refusals)

    def test_a_refusal_by_403_asks_for_a_new_one_too(self) -> None:
        self.refusal = 403
        self.make(OLD, NEW)
        self.replaced(Credentials.authorization)
        self.assertEqual(200, self.status())

    def test_a_403_for_the_only_one_is_the_answer(self) -> None:
        self.refusal = 403
        self.make(OLD)
        self.replaced(Credentials.authorization)
        before = len(self.agent.requests)
        self.assertEqual(403, self.status())
        self.assertEqual(before + 1, len(self.agent.requests))

    def test_one_that_stays_wrong_is_sent_once(self) -> None:
        self.make(OLD)
        self.replaced(Credentials.authorization)
        before = len(self.agent.requests)
        self.failureResultOf(self.get(), AccessDenied)
        self.assertEqual(before + 1, len(self.agent.requests))

    def test_one_that_is_right_later_is_found_by_a_later_request(self) -> None:
        keychain = self.make(OLD)
        self.replaced(Credentials.authorization)
        self.failureResultOf(self.get(), AccessDenied)
        keychain.identities = [NEW]
        self.assertEqual(200, self.status())

    def test_however_many_are_refused_at_a_time_all_go_on(self) -> None:
        self.make(OLD, NEW)
        self.replaced(Credentials.authorization)
        late: list[FakeRequest] = []
        self.agent.answer = late.append
        waiting = [self.get() for _ in range(5)]
        self.agent.answer = self.answer
        for request in late:
            self.answer(request)
        answers = self.successResultOf(gatherResults(waiting))
        self.assertEqual([200] * 5, [answer.response.code for answer in answers])

    def test_a_keychain_that_fails_for_a_while_fails_the_request_for_a_while(self) -> None:
        keychain = self.make(OLD)
        keychain.failure = TransferFailed("the helper is away", temporary=True)
        self.assertTrue(self.failureResultOf(self.get(), TransferFailed).value.temporary)
        keychain.failure = None
        self.accepted = {OLD.authorization()}
        self.assertEqual(200, self.status())

    def test_a_token_in_place_of_a_password_is_said(self) -> None:
        self.make(RegistryToken("t"))
        error = self.failureResultOf(self.get(), AccessDenied).value
        self.assertIn("there is only a token", str(error))


class TokenServerTests(RefusalTests):
    def setUp(self) -> None:
        super().setUp()
        self.challenge = BEARER

    def test_a_password_that_it_refuses_is_asked_for_again(self) -> None:
        self.make(OLD, NEW)
        self.replaced(Credentials.authorization)
        self.assertEqual(200, self.status())
        self.assertEqual([OLD], self.keychain.refusals)

    def test_a_password_that_stays_wrong_is_sent_once(self) -> None:
        self.make(OLD)
        self.accepted = set()
        self.failureResultOf(self.get(), AccessDenied)
        self.assertEqual(1, sum(request.url.startswith(REALM) for request in self.agent.requests))

    def test_credentials_are_asked_for_with_each_token_and_not_with_each_request(self) -> None:
        self.make(OLD)
        self.accepted = {OLD.authorization()}
        for _ in range(3):
            self.assertEqual(200, self.status())
        self.assertEqual(1, self.keychain.asked)

    def test_a_registry_token_is_used_as_it_is(self) -> None:
        self.make(RegistryToken("rt"))
        self.accepted = {"Bearer rt"}
        self.assertEqual(200, self.status())
        self.assertEqual([URL, URL], self.agent.urls)

    def test_a_registry_token_that_is_refused_is_asked_for_again(self) -> None:
        self.make(RegistryToken("rt"), RegistryToken("newer"))
        self.accepted = {"Bearer rt"}
        self.assertEqual(200, self.status())
        self.accepted = {"Bearer newer"}
        self.assertEqual(200, self.status())
