"""Pushing to a repository: blobs from memory and from files, taken over from elsewhere, and manifests."""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

from twisted.internet.defer import CancelledError, Deferred
from twisted.trial.unittest import SynchronousTestCase

from erofs_twisted.registry.auth import Authorizer
from erofs_twisted.registry.content import PIECE, FileContent
from erofs_twisted.registry.credentials import Credentials
from erofs_twisted.registry.digest import Digest
from erofs_twisted.registry.errors import (
    AccessDenied,
    DigestMismatch,
    InvalidManifest,
    RegistryError,
    TransferFailed,
)
from erofs_twisted.registry.keychain import Given
from erofs_twisted.registry.manifest import MAX_MANIFEST, OCI_MANIFEST
from erofs_twisted.registry.repository import ATTEMPTS, PATIENCE, PAUSE, Repository
from erofs_twisted.registry.retry import Backoff
from erofs_twisted.registry.session import Session
from erofs_twisted.registry.urls import Origin
from tests.unit.fakehttp import FakeRequest, fake_transport
from tests.unit.threadless import HeldPool, ThreadlessReactor

HOST = "https://r.example"
REALM = "https://auth.example/token"
PUSH, BASE_PULL = "repository:team/app:pull,push", "repository:team/base:pull"
BLOB = os.urandom(PIECE * 2 + 1000)
DIGEST = Digest.of(BLOB)
ALICE = Credentials("alice", "secret")


class PushTestCase(SynchronousTestCase):
    """Against a registry that holds blobs by repository."""

    def setUp(self) -> None:
        self.reactor = ThreadlessReactor()
        self.agent, self.clock, self.transport = fake_transport(self.answer, clock=self.reactor)
        self.agent.early = self.answer_early
        self.pool = HeldPool(held=False)
        self.blobs: dict[str, dict[str, bytes]] = {"team/app": {}, "team/base": {}}
        self.manifests: dict[str, bytes] = {}
        self.upload_at = "/v2/team/app/blobs/uploads/7?state=a%2Fb"
        self.statuses: dict[str, list[int]] = {}
        """By ``METHOD kind``, kind being ``blob``, ``begin``, ``mount``, ``upload`` or ``manifest``: what is
        answered instead, one after the other."""
        self.early_statuses: dict[str, list[int]] = {}
        """The same, answered before the body is sent."""
        self.more: dict[str, str] = {}
        """Headers of such answers."""
        self.code = "DENIED"
        self.scopes: list[list[str]] = []
        """What each token was asked for."""
        self.granted: set[str] | None = None
        """What the token server gives; None: the registry wants no token."""
        self.challenge = ""
        """The scope that the registry names, in place of what it wants."""
        self.refuses_more = False
        """Does the token server give nothing to those who ask for too much?"""

    def repository(self, credentials: Credentials | None = ALICE) -> Repository:
        origin = Origin.of(HOST)
        authorizer = Authorizer(self.transport, origin, PUSH, Given(credentials))
        session = Session(self.transport, origin, authorizer).apart(PUSH)
        return Repository(session, f"{HOST}/v2/team/app", Backoff(random=lambda: 0.0))

    def push(self, content: Any = BLOB, mount_from: str | None = None) -> Deferred[Digest]:
        return Deferred.fromCoroutine(self.repository().push_blob(content, mount_from))

    def pushed(self, content: Any = BLOB, mount_from: str | None = None) -> None:
        pushing = self.push(content, mount_from)
        self.wait()
        self.assertEqual(DIGEST, self.successResultOf(pushing))
        self.assertEqual(BLOB, self.blobs["team/app"][DIGEST])

    def refused(self, kind: type[Exception], content: Any = BLOB) -> str:
        pushing = self.push(content)
        self.wait()
        self.assertEqual({}, self.blobs["team/app"])
        return str(self.failureResultOf(pushing, kind).value)

    def wait(self) -> None:
        for _ in range(ATTEMPTS):
            self.clock.advance(1)

    def file(self, content: bytes = BLOB, **claimed: Any) -> FileContent:
        directory = tempfile.TemporaryDirectory()
        self.addCleanup(directory.cleanup)
        path = Path(directory.name) / "layer.erofs"
        path.write_bytes(content)
        return FileContent(
            **{"file": str(path), "digest": DIGEST, "size": len(BLOB), "pool": self.pool, **claimed}
        )

    def asked(self) -> list[str]:
        return [self.kind(request) for request in self.agent.requests if not request.url.startswith(REALM)]

    def kind(self, request: FakeRequest) -> str:
        parts = urlsplit(request.url)
        if parts.query.startswith("mount="):
            return "POST mount"
        if "/manifests/" in parts.path:
            return f"{request.method} manifest"
        if request.method == "POST":
            return "POST begin"
        return f"{request.method} {'upload' if '/uploads/' in parts.path else 'blob'}"

    def answer_early(self, request: FakeRequest) -> None:
        statuses = self.early_statuses.get(self.kind(request))
        if statuses:
            request.respond(statuses.pop(0), **self.more)

    def answer(self, request: FakeRequest) -> None:
        query = parse_qs(urlsplit(request.url).query)
        if request.url.startswith(REALM):
            self.give_token(request, query["scope"])
            return
        kind = self.kind(request)
        if not self.lets_in(request, kind):
            return
        statuses = self.statuses.get(kind)
        if statuses:
            body = json.dumps({"errors": [{"code": self.code, "message": "as told"}]}).encode()
            request.respond(statuses.pop(0), body, **self.more)
            return
        name = urlsplit(request.url).path.rpartition("/")[2]
        match kind:
            case "HEAD blob" | "GET blob":
                request.respond(200 if name in self.blobs["team/app"] else 404)
            case "POST mount" if query["mount"][0] in self.blobs[query["from"][0]]:
                self.blobs["team/app"][query["mount"][0]] = self.blobs[query["from"][0]][query["mount"][0]]
                request.respond(201, Docker_Content_Digest=query["mount"][0])
            case "POST begin" | "POST mount":
                self.assertEqual(b"", request.body)
                request.respond(202, Location=self.upload_at)
            case "PUT upload":
                self.put_blob(request, query)
            case "PUT manifest":
                self.manifests[name] = request.body
                request.respond(201, Docker_Content_Digest=Digest.of(request.body))
            case _:
                request.respond(404)

    def put_blob(self, request: FakeRequest, query: dict[str, list[str]]) -> None:
        self.assertEqual(["a/b"], query["state"])
        self.assertEqual("application/octet-stream", request.headers["content-type"])
        (digest,) = query["digest"]
        if Digest.parse(digest).matches(request.body):
            self.blobs["team/app"][digest] = request.body
            request.respond(201)
        else:
            body = {"errors": [{"code": "DIGEST_INVALID", "message": "provided digest did not match"}]}
            request.respond(400, json.dumps(body).encode())

    def give_token(self, request: FakeRequest, scopes: list[str]) -> None:
        assert self.granted is not None
        self.scopes.append(scopes)
        if self.refuses_more and set(scopes) - self.granted:
            request.respond(403)
            return
        token = "|".join(scope for scope in scopes if scope in self.granted)
        request.respond(200, json.dumps({"token": token or "nothing"}).encode())

    def lets_in(self, request: FakeRequest, kind: str) -> bool:
        if self.granted is None or not request.url.startswith(HOST):
            return True
        wanted = [PUSH, BASE_PULL] if kind == "POST mount" else [PUSH]
        held = request.headers.get("authorization", "").removeprefix("Bearer ").split("|")
        if set(wanted) <= set(held):
            return True
        scope = self.challenge or " ".join(wanted)
        request.respond(401, WWW_Authenticate=f'Bearer realm="{REALM}",service="s",scope="{scope}"')
        return False


class BlobTests(PushTestCase):
    def test_a_blob_is_looked_for_begun_and_sent(self) -> None:
        self.pushed()
        self.assertEqual(["HEAD blob", "POST begin", "PUT upload"], self.asked())

    def test_a_file_is_sent_as_it_is(self) -> None:
        self.pushed(self.file())
        self.assertEqual(["HEAD blob", "POST begin", "PUT upload"], self.asked())

    def test_a_file_may_be_open_already_and_stays_so(self) -> None:
        file = self.file()
        assert isinstance(file.file, str)
        with open(file.file, "rb") as opened:
            opened.seek(100)
            self.pushed(FileContent(opened.fileno(), DIGEST, len(BLOB), self.pool))
            self.assertEqual(100, opened.tell())

    def test_a_file_by_its_path_is_closed_however_it_ends(self) -> None:
        self.statuses = {"PUT upload": [500]}
        self.early_statuses = {"PUT upload": [503]}
        before = os.listdir("/proc/self/fd")
        self.pushed(self.file())
        self.assertEqual(len(before), len(os.listdir("/proc/self/fd")))

    def test_an_empty_blob_is_one(self) -> None:
        for content in (b"", self.file(b"", digest=Digest.of(b""), size=0)):
            self.blobs["team/app"].clear()
            self.successResultOf(self.push(content))
            self.assertEqual({Digest.of(b""): b""}, self.blobs["team/app"])

    def test_a_blob_that_is_there_is_not_sent(self) -> None:
        self.blobs["team/app"][DIGEST] = BLOB
        self.pushed()
        self.assertEqual(["HEAD blob"], self.asked())

    def test_where_head_is_refused_get_is_asked_for_no_more_than_a_byte(self) -> None:
        for status in (405, 501):
            self.statuses = {"HEAD blob": [status] * 2}
            has = Deferred.fromCoroutine(self.repository().has_blob(DIGEST))
            self.assertIs(False, self.successResultOf(has))
            self.assertEqual("bytes=0-0", self.agent.last.headers["range"])
            self.blobs["team/app"][DIGEST] = BLOB
            has = Deferred.fromCoroutine(self.repository().has_blob(DIGEST))
            self.assertIs(True, self.successResultOf(has))
            self.blobs["team/app"].clear()

    def test_a_signed_url_that_is_not_for_head_is_got(self) -> None:
        statuses = [302, 302, 307, 307]

        def answer(request: FakeRequest) -> None:
            if request.url.startswith("https://cdn.example/"):
                request.respond(403 if request.method == "HEAD" else 206, b"x")
            else:
                request.respond(statuses.pop(0), Location="https://cdn.example/blob?signature=s")

        self.agent.answer = answer
        while statuses:
            has = Deferred.fromCoroutine(self.repository().has_blob(DIGEST))
            self.assertIs(True, self.successResultOf(has))

    def test_a_registry_that_does_not_say_whether_it_has_it_is_an_error(self) -> None:
        self.statuses = {"HEAD blob": [400]}
        self.assertIn("400", self.refused(TransferFailed))

    def test_where_the_upload_goes_may_be_another_host_without_authorization(self) -> None:
        self.granted = {PUSH}
        self.upload_at = "https://store.example/uploads/9?state=a%2Fb"
        self.pushed(self.file())
        self.assertTrue(self.agent.last.url.startswith("https://store.example/uploads/9?state=a%2Fb&digest="))
        self.assertNotIn("authorization", self.agent.last.headers)

    def test_an_upload_to_nowhere_or_out_of_tls_is_refused(self) -> None:
        for self.upload_at in ("", "http://r.example/uploads/7", "https://u:p@r.example/uploads/7"):
            self.refused(RegistryError)
        self.assertNotIn("PUT upload", self.asked())

    def test_an_upload_that_is_sent_elsewhere_is_sent_again_only_where_that_keeps_the_request(self) -> None:
        for status in (307, 308):
            self.blobs["team/app"].clear()
            self.early_statuses = {"PUT upload": [status]}
            there = "https://store.example/uploads/9?state=a%2Fb&digest="
            self.more = {"Location": f"{there}{DIGEST}"}
            self.pushed(self.file())
            self.assertTrue(self.agent.last.url.startswith(there))
        self.blobs["team/app"].clear()
        for status in (301, 302, 303):
            self.early_statuses = {"PUT upload": [status]}
            self.assertIn(str(status), self.refused(TransferFailed, self.file()))

    def test_a_registry_that_calls_it_something_else_is_an_error(self) -> None:
        self.statuses, self.more = {"PUT upload": [201]}, {"Docker_Content_Digest": Digest.of(b"other")}
        self.assertIn(DIGEST, self.refused(DigestMismatch))

    def test_a_name_of_another_kind_for_it_is_none(self) -> None:
        for name in (Digest.of(BLOB, "sha512"), "nonsense"):
            self.statuses, self.more = {"PUT upload": [201]}, {"Docker_Content_Digest": name}
            self.successResultOf(self.push())


class FaultTests(PushTestCase):
    def test_what_passes_at_any_step_begins_the_upload_anew(self) -> None:
        for step in ("HEAD blob", "POST begin", "PUT upload"):
            for content in (BLOB, self.file()):
                self.agent.requests.clear()
                self.blobs["team/app"].clear()
                self.statuses = {step: [503, 429]}
                self.pushed(content)
                self.assertEqual(3, self.asked().count(step))

    def test_what_goes_on_failing_is_given_up(self) -> None:
        for step in ("HEAD blob", "POST begin", "PUT upload"):
            self.statuses = {step: [500] * 100}
            self.assertIn("500", self.refused(TransferFailed))
            self.assertEqual(100 - ATTEMPTS, len(self.statuses[step]))

    def test_what_will_not_pass_is_not_tried_again(self) -> None:
        for step in ("POST begin", "PUT upload"):
            for status, kind in ((400, TransferFailed), (413, TransferFailed), (404, RegistryError)):
                self.statuses = {step: [status]}
                self.assertIn(f"{status}", self.refused(kind))

    def test_a_connection_that_breaks_begins_the_upload_anew(self) -> None:
        for step in ("HEAD blob", "POST begin", "PUT upload"):
            self.blobs["team/app"].clear()
            real, broken = self.answer, [step]

            def answer(request: FakeRequest, real: Any = real, broken: list[str] = broken) -> None:
                if broken == [self.kind(request)]:
                    broken.clear()
                    request.fail(ConnectionResetError())
                else:
                    real(request)

            self.agent.answer = answer
            self.pushed(self.file())

    def test_a_connection_that_breaks_within_the_body_begins_the_upload_anew(self) -> None:
        before = len(os.listdir("/proc/self/fd"))
        self.pool.held = True
        pushing = self.push(self.file())
        self.pool.work.pop(0)()
        broken = self.agent.last
        broken.producer.stopProducing()  # as the agent does
        broken.fail(ConnectionResetError())
        self.wait()
        self.pool.run()
        self.assertEqual(PIECE, len(broken.body))
        self.assertEqual(DIGEST, self.successResultOf(pushing))
        self.assertEqual(2, self.asked().count("POST begin"))
        self.assertEqual(before, len(os.listdir("/proc/self/fd")))

    def test_an_answer_that_was_lost_is_found_to_have_been_yes(self) -> None:
        real = self.answer

        def answer(request: FakeRequest) -> None:
            if self.kind(request) == "PUT upload":
                self.blobs["team/app"][DIGEST] = request.body
                request.fail(ConnectionResetError())
            else:
                real(request)

        self.agent.answer = answer
        self.pushed(self.file())
        self.assertEqual(1, self.asked().count("PUT upload"))

    def test_a_pause_that_the_registry_asks_for_is_made(self) -> None:
        self.statuses, self.more = {"POST begin": [429]}, {"Retry_After": "20"}
        pushing = self.push()
        self.clock.advance(19)
        self.assertNoResult(pushing)
        self.clock.advance(1)
        self.successResultOf(pushing)

    def test_a_pause_of_a_day_is_not(self) -> None:
        self.statuses, self.more = {"POST begin": [429]}, {"Retry_After": "86400"}
        pushing = self.push()
        self.clock.advance(PAUSE)
        self.successResultOf(pushing)

    def test_who_may_not_push_is_told_so_with_the_cure(self) -> None:
        for step in ("HEAD blob", "POST begin", "PUT upload"):
            self.statuses = {step: [403]}
            pushing = Deferred.fromCoroutine(self.repository(None).push_blob(BLOB))
            error = str(self.failureResultOf(pushing, AccessDenied).value)
            self.assertIn("DENIED: as told", error)
            self.assertIn("--username and --password-file", error)

    def test_secrets_in_an_uploads_url_are_not_shown(self) -> None:
        self.upload_at = "/v2/team/app/blobs/uploads/7?state=hidden"
        self.put_blob = lambda request, query: request.respond(413)  # type: ignore[method-assign]
        self.assertNotIn("hidden", self.refused(TransferFailed))


class FileTests(PushTestCase):
    def test_one_that_is_shorter_or_longer_than_it_was_is_said_before_it_is_sent(self) -> None:
        for content in (BLOB[:-1], BLOB + b"x"):
            file = self.file(content)
            error = self.refused(DigestMismatch, file)
            self.assertIn(f"layer.erofs has {len(content)} bytes, but had {len(BLOB)}", error)
            self.assertEqual(b"", self.agent.last.body)

    def test_one_that_is_cut_meanwhile_is_said(self) -> None:
        file = self.file()
        assert isinstance(file.file, str)
        self.pool.held = True
        pushing = self.push(file)
        self.pool.work.pop(0)()
        os.truncate(file.file, PIECE + 10)
        self.pool.run()
        self.assertIn("layer.erofs has", str(self.failureResultOf(pushing, DigestMismatch).value))

    def test_one_that_changed_is_found_out_by_the_registry(self) -> None:
        error = self.refused(DigestMismatch, self.file(bytes(len(BLOB))))
        self.assertIn("layer.erofs is no longer what the digest", error)
        self.assertIn("DIGEST_INVALID", error)
        self.assertEqual(1, self.asked().count("PUT upload"))

    def test_one_that_is_missing_or_no_file_is_said(self) -> None:
        self.assertIn("/nowhere cannot be read", self.refused(RegistryError, self.file(file="/nowhere")))
        self.assertIn("not a regular file", self.refused(RegistryError, self.file(file="/dev/null")))
        self.assertIn("not a regular file", self.refused(RegistryError, self.file(file="/")))

    def test_no_more_than_two_pieces_are_read_ahead_of_the_connection(self) -> None:
        self.pool.held = True
        pushing = self.push(self.file())
        request = self.agent.last
        self.assertEqual(b"", request.body)
        self.pool.work.pop(0)()
        self.assertEqual(BLOB[:PIECE], request.body)
        request.producer.pauseProducing()
        self.pool.run()
        self.assertEqual(BLOB[:PIECE], request.body)
        self.assertEqual([], self.pool.work)
        request.producer.resumeProducing()
        self.assertEqual(BLOB[: 2 * PIECE], request.body)
        self.pool.run()
        self.assertEqual(DIGEST, self.successResultOf(pushing))


class TimeTests(PushTestCase):
    def setUp(self) -> None:
        super().setUp()
        self.pool.held = True

    def test_an_upload_may_take_any_time_while_bytes_are_taken(self) -> None:
        pushing = self.push(self.file())
        request = self.agent.last
        for _ in range(3):
            self.clock.advance(PATIENCE - 1)
            self.pool.work.pop(0)()
            request.producer.pauseProducing()
            self.clock.advance(PATIENCE - 1)
            request.producer.resumeProducing()
        self.assertEqual(DIGEST, self.successResultOf(pushing))

    def test_an_upload_of_which_nothing_is_taken_begins_anew(self) -> None:
        pushing = self.push(self.file())
        request = self.agent.last
        self.pool.work.pop(0)()
        request.producer.pauseProducing()
        self.clock.advance(PATIENCE)
        self.assertTrue(request.is_cancelled)
        self.clock.advance(1)
        self.pool.run()
        self.assertEqual(DIGEST, self.successResultOf(pushing))
        self.assertEqual(2, self.asked().count("PUT upload"))

    def test_no_answer_to_all_of_it_is_waited_for_longer_but_not_for_ever(self) -> None:
        self.agent.answer = lambda request: (
            None if self.kind(request) == "PUT upload" else self.answer(request)
        )
        self.push(self.file()).addErrback(lambda _: None)
        self.pool.run()
        request = self.agent.last
        self.clock.advance(PATIENCE)
        self.assertFalse(request.is_cancelled)
        self.clock.advance(1)
        self.assertTrue(request.is_cancelled)

    def test_to_cancel_ends_the_request_and_closes_the_file(self) -> None:
        before = len(os.listdir("/proc/self/fd"))
        pushing = self.push(self.file())
        self.pool.work.pop(0)()
        pushing.cancel()
        self.failureResultOf(pushing, CancelledError)
        self.assertTrue(self.agent.last.is_cancelled)
        self.pool.run()
        self.assertEqual(before, len(os.listdir("/proc/self/fd")))
        self.assertEqual([], self.clock.getDelayedCalls())


class TokenTests(PushTestCase):
    def test_pushing_is_asked_for_at_once_though_looking_takes_less(self) -> None:
        self.granted = {PUSH, "repository:team/app:pull"}
        self.challenge = "repository:team/app:pull"
        self.pushed()
        self.assertEqual([["repository:team/app:pull", PUSH]], self.scopes)

    def test_a_token_that_expires_in_the_middle_is_renewed_and_the_body_sent_again(self) -> None:
        for content in (BLOB, self.file()):
            self.agent.requests.clear()
            self.scopes.clear()
            self.blobs["team/app"].clear()
            self.granted = {PUSH}
            self.early_statuses = {"PUT upload": [401]}
            self.more = {"WWW_Authenticate": f'Bearer realm="{REALM}",service="s",scope="{PUSH}"'}
            self.pushed(content)
            self.assertEqual([[PUSH], [PUSH]], self.scopes)
            self.assertEqual(1, self.asked().count("POST begin"))

    def test_a_token_that_is_refused_after_all_of_it_was_sent_is_renewed_too(self) -> None:
        self.granted = {PUSH}
        self.statuses = {"PUT upload": [401]}
        self.more = {"WWW_Authenticate": f'Bearer realm="{REALM}",service="s",scope="{PUSH}"'}
        self.pushed(self.file())
        self.assertEqual(2, self.asked().count("PUT upload"))


class MountTests(PushTestCase):
    def setUp(self) -> None:
        super().setUp()
        self.blobs["team/base"][DIGEST] = BLOB

    def mounted(self, mount_from: str = "team/base") -> None:
        self.pushed(self.file(), mount_from)

    def test_a_blob_is_taken_over_without_being_sent(self) -> None:
        self.mounted()
        self.assertEqual(["HEAD blob", "POST mount"], self.asked())

    def test_a_registry_that_begins_an_upload_instead_gets_it(self) -> None:
        self.blobs["team/base"].clear()
        self.mounted()
        self.assertEqual(["HEAD blob", "POST mount", "PUT upload"], self.asked())

    def test_what_is_there_is_not_taken_over(self) -> None:
        self.blobs["team/app"][DIGEST] = BLOB
        self.mounted()
        self.assertEqual(["HEAD blob"], self.asked())

    def test_a_token_for_both_repositories_is_asked_for_new_scope_first(self) -> None:
        self.granted = {PUSH, BASE_PULL}
        self.mounted()
        self.assertEqual([[PUSH], [BASE_PULL, PUSH]], self.scopes)
        self.assertEqual(["HEAD blob", "HEAD blob", "POST mount"], self.asked())

    def test_a_challenge_that_names_only_one_of_them_is_enough(self) -> None:
        self.granted = {PUSH, BASE_PULL}
        for self.challenge in (PUSH, BASE_PULL):
            self.blobs["team/app"].clear()
            self.mounted()
            self.assertNotIn("PUT upload", self.asked())

    def test_who_may_not_read_the_other_repository_sends_the_blob(self) -> None:
        for self.refuses_more in (False, True):
            self.agent.requests.clear()
            self.blobs["team/app"].clear()
            self.granted = {PUSH}
            self.mounted()
            self.assertEqual(["POST begin", "PUT upload"], self.asked()[-2:])
            self.assertEqual([PUSH], self.scopes[0])
            self.assertEqual("Bearer " + PUSH, self.agent.last.headers["authorization"])

    def test_a_registry_that_refuses_to_has_the_blob_sent(self) -> None:
        for status in (400, 401, 403, 404, 405):
            self.blobs["team/app"].clear()
            self.statuses = {"POST mount": [status] * 2}
            self.mounted()
            self.assertEqual(["POST mount", "POST begin", "PUT upload"], self.asked()[-3:])

    def test_a_registry_that_is_busy_is_asked_again(self) -> None:
        self.statuses = {"POST mount": [503]}
        self.mounted()
        self.assertNotIn("PUT upload", self.asked())

    def test_without_a_repository_to_take_it_from_it_is_not_done_though_the_registry_says_so(self) -> None:
        self.statuses = {"POST begin": [201]}
        self.assertIn("201", self.refused(TransferFailed))


class ManifestTests(PushTestCase):
    DATA = b'{"schemaVersion": 2}'

    def push_manifest(self, data: bytes = DATA, tag: str | None = None) -> Deferred[Digest]:
        pushing = Deferred.fromCoroutine(self.repository().push_manifest(OCI_MANIFEST, data, tag))
        self.wait()
        return pushing

    def test_it_is_named_by_its_digest_and_by_a_tag_if_there_is_one(self) -> None:
        digest = Digest.of(self.DATA)
        self.assertEqual(digest, self.successResultOf(self.push_manifest()))
        self.assertEqual(digest, self.successResultOf(self.push_manifest(tag="v1")))
        self.assertEqual({digest: self.DATA, "v1": self.DATA}, self.manifests)
        self.assertEqual(OCI_MANIFEST, self.agent.last.headers["content-type"])

    def test_a_registry_that_calls_it_something_else_is_an_error(self) -> None:
        self.statuses, self.more = {"PUT manifest": [201]}, {"Docker_Content_Digest": Digest.of(b"other")}
        error = str(self.failureResultOf(self.push_manifest(), DigestMismatch).value)
        self.assertIn(Digest.of(b"other"), error)

    def test_a_registry_need_not_say_what_it_calls_it(self) -> None:
        self.statuses = {"PUT manifest": [201]}
        self.successResultOf(self.push_manifest())

    def test_what_passes_is_tried_again_and_what_does_not_is_said(self) -> None:
        self.statuses = {"PUT manifest": [500, 429]}
        self.successResultOf(self.push_manifest())
        self.code, self.statuses = "MANIFEST_BLOB_UNKNOWN", {"PUT manifest": [404]}
        error = self.failureResultOf(self.push_manifest(), RegistryError).value
        self.assertIn("MANIFEST_BLOB_UNKNOWN: as told", str(error))

    def test_one_that_no_registry_takes_is_not_sent(self) -> None:
        self.failureResultOf(self.push_manifest(bytes(MAX_MANIFEST + 1)), InvalidManifest)
        self.assertEqual([], self.agent.requests)
