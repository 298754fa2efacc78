"""Artifacts that refer to an image: listed and pushed, with the registry's help and without."""

from __future__ import annotations

import json
from typing import Any
from urllib.parse import parse_qs, urlsplit

from twisted.trial.unittest import SynchronousTestCase

from erofs_twisted.registry.client import RegistryStore
from erofs_twisted.registry.credentials import Credentials
from erofs_twisted.registry.digest import Digest
from erofs_twisted.registry.errors import AccessDenied, DigestMismatch, InvalidManifest, RegistryError
from erofs_twisted.registry.manifest import (
    MAX_MANIFEST,
    OCI_INDEX,
    OCI_MANIFEST,
    Descriptor,
    Manifest,
    ResolvedImage,
    parse_manifest,
)
from erofs_twisted.registry.platform import Platform
from erofs_twisted.registry.push import EMPTY, Artifact
from erofs_twisted.registry.reference import parse_reference
from erofs_twisted.registry.referrers import MAX_PAGES, fallback_tag
from erofs_twisted.registry.repository import ATTEMPTS
from erofs_twisted.registry.retry import Backoff
from tests.unit.fakehosts import fake_store
from tests.unit.fakehttp import FakeRequest, fake_transport
from tests.unit.test_registry_client import MANIFEST, describe, encode, index_of

BASE = "https://r.example/v2/team/app"
TYPE = "application/vnd.example.thing.v1+json"
SUBJECT = Digest.of(MANIFEST)
TAG = fallback_tag(SUBJECT)
THING = Artifact(TYPE, b'{"thing": 1}', {"made": "today"})
REALM = "https://auth.example/token"


def referrer(number: int, artifact_type: str = TYPE) -> dict[str, Any]:
    return describe(str(number).encode(), OCI_MANIFEST, artifactType=artifact_type)


class ReferrersTestCase(SynchronousTestCase):
    """Against a registry that keeps what is pushed to it, as two kinds of registries do: with the referrers
    API (``has_api``), and without."""

    has_api = False

    def setUp(self) -> None:
        self.agent, self.clock, self.transport = fake_transport(self.answer)
        self.blobs: dict[str, bytes] = {}
        self.manifests: dict[str, tuple[bytes, str]] = {SUBJECT: (MANIFEST, OCI_MANIFEST)}
        self.listed: list[dict[str, Any]] = []
        self.upload_at = "/v2/team/app/uploads/7?state=a%2Fb"
        self.statuses: dict[str, list[int]] = {}
        """By the beginning of ``METHOD path``: what is answered instead, one after the other."""
        self.wants: str | None = None
        """The scope without which a token lets nobody do anything but GET."""
        self.etag = '"1"'

    def store(self, credentials: Credentials | None = None) -> RegistryStore:
        backoff = Backoff(random=lambda: 0.0)
        return fake_store(self.transport, "r.example/team/app:1", credentials=credentials, backoff=backoff)

    def image(self) -> ResolvedImage:
        manifest = parse_manifest(MANIFEST)
        assert isinstance(manifest, Manifest)
        return ResolvedImage(parse_reference("r.example/team/app:1"), SUBJECT, manifest)

    def push(self, artifact: Artifact = THING, credentials: Credentials | None = None) -> Digest:
        pushed = self.store(credentials).push_referrer(self.image(), artifact)
        for _ in range(5):
            self.clock.advance(1)
        return self.successResultOf(pushed)

    def list(self) -> list[str]:
        found = self.successResultOf(self.store().referrers(SUBJECT, TYPE))
        return [descriptor.digest for descriptor in found]

    def asked(self) -> list[str]:
        return [f"{request.method} {urlsplit(request.url).path}" for request in self.agent.requests]

    def answer(self, request: FakeRequest) -> None:
        parts = urlsplit(request.url)
        asked = f"{request.method} {parts.path.removeprefix('/v2/team/app/')}"
        if request.url.startswith(REALM):
            scopes = parse_qs(parts.query)["scope"]
            request.respond(200, json.dumps({"token": "|".join(scopes)}).encode())
            return
        if self.wants and self.wants not in request.headers.get("authorization", ""):
            challenge = f'Bearer realm="{REALM}",service="s",scope="{self.wants}"'
            request.respond(401, b"", WWW_Authenticate=challenge)
            return
        for beginning, statuses in self.statuses.items():
            if asked.startswith(beginning) and statuses:
                request.respond(statuses.pop(0), b'{"errors":[{"code":"DENIED","message":"as told"}]}')
                return
        kind, _, name = asked.partition(" ")[2].partition("/")
        match request.method, kind:
            case "POST", "blobs":
                request.respond(202, b"", Location=self.upload_at)
            case "PUT", "uploads":
                (digest,) = parse_qs(parts.query)["digest"]
                assert Digest.parse(digest).matches(request.body)
                assert parse_qs(parts.query)["state"] == ["a/b"]
                self.blobs[digest] = request.body
                request.respond(201)
            case "PUT", "manifests":
                self.put_manifest(request, name)
            case "GET", "manifests" if name in self.manifests:
                body, media_type = self.manifests[name]
                request.respond(200, body, Content_Type=media_type, ETag=self.etag)
            case "GET", "blobs" if name in self.blobs:
                request.respond(200, self.blobs[name])
            case "GET", "referrers" if self.has_api:
                self.respond_list(request)
            case _:
                request.respond(404)

    def put_manifest(self, request: FakeRequest, name: str) -> None:
        self.manifests[name] = (request.body, request.headers["content-type"])
        document = json.loads(request.body)
        if self.has_api and document.get("subject"):
            entry = describe(request.body, OCI_MANIFEST, artifactType=document["artifactType"])
            self.listed.append(entry)
            request.respond(201, b"", OCI_Subject=document["subject"]["digest"])
        else:
            request.respond(201)

    def respond_list(self, request: FakeRequest) -> None:
        request.respond(200, index_of(*self.listed), Content_Type=OCI_INDEX)


class ListTests(ReferrersTestCase):
    has_api = True

    def test_the_registry_is_asked_for_those_of_the_type(self) -> None:
        self.listed = [referrer(1), referrer(2, "application/other"), referrer(3)]
        self.assertEqual([referrer(1)["digest"], referrer(3)["digest"]], self.list())
        (request,) = self.agent.requests
        self.assertEqual(f"/v2/team/app/referrers/{SUBJECT}", urlsplit(request.url).path)
        self.assertEqual({"artifactType": [TYPE]}, parse_qs(urlsplit(request.url).query))
        self.assertEqual(OCI_INDEX, request.headers["accept"])

    def serve_pages(self, count: int, after: str = "</v2/team/app/referrers/x?n={page}>; rel=next") -> None:
        """A list of ``count`` pages of one entry each; ``after`` is the link to the one with that number."""
        self.served = 0

        def respond_list(request: FakeRequest) -> None:
            self.served += 1
            headers = {"Content_Type": OCI_INDEX}
            if self.served < count:
                headers["Link"] = f'<{BASE}/other>; rel="prev", ' + after.format(page=self.served)
            request.respond(200, index_of(referrer(self.served)), **headers)

        self.patch(self, "respond_list", respond_list)

    def test_a_long_list_is_read_page_by_page(self) -> None:
        self.serve_pages(MAX_PAGES)
        self.assertEqual([referrer(1 + page)["digest"] for page in range(MAX_PAGES)], self.list())
        expected = [f"{BASE}/referrers/x?n={page}" for page in range(1, MAX_PAGES)]
        self.assertEqual(expected, self.agent.urls[1:])

    def test_a_list_without_end_is_an_error_after_many_pages(self) -> None:
        self.serve_pages(1_000_000)
        found = self.store().referrers(SUBJECT, TYPE)
        self.assertIn(f"more than {MAX_PAGES} pages", str(self.failureResultOf(found, RegistryError).value))
        self.assertEqual(MAX_PAGES, self.served)

    def test_a_list_of_large_pages_is_an_error_before_it_fills_the_memory(self) -> None:
        page = index_of(referrer(1)).ljust(MAX_MANIFEST)

        def respond_list(request: FakeRequest) -> None:
            request.respond(200, page, Content_Type=OCI_INDEX, Link="<?more>; rel=next")

        self.patch(self, "respond_list", respond_list)
        found = self.store().referrers(SUBJECT, TYPE)
        self.assertIn("bytes that are allowed", str(self.failureResultOf(found, RegistryError).value))
        self.assertEqual(5, len(self.agent.requests))

    def test_a_page_at_another_host_is_asked_for_without_credentials(self) -> None:
        self.wants = "repository:team/app:pull"
        self.serve_pages(2, "<https://elsewhere.example/v2/team/app/referrers/x>; rel=next")
        real = self.answer

        def answer(request: FakeRequest) -> None:
            if request.url.startswith("https://elsewhere.example/"):
                self.assertNotIn("authorization", request.headers)
                self.respond_list(request)
            else:
                real(request)

        self.agent.answer = answer
        self.assertEqual([referrer(1)["digest"], referrer(2)["digest"]], self.list())

    def test_a_page_without_tls_is_refused(self) -> None:
        self.serve_pages(2, "<http://r.example/v2/team/app/referrers/x>; rel=next")
        found = self.store().referrers(SUBJECT, TYPE)
        self.assertIn("--plain-http", str(self.failureResultOf(found, RegistryError).value))

    def test_a_later_page_that_fails_is_an_error_and_no_shorter_list(self) -> None:
        self.manifests[TAG] = (index_of(referrer(9)), OCI_INDEX)
        for status in (404, 500):
            self.serve_pages(2)
            self.statuses = {"GET referrers/x": [status]}
            found = self.store().referrers(SUBJECT, TYPE)
            self.assertIn(str(status), str(self.failureResultOf(found, RegistryError).value))

    def test_a_later_page_that_is_no_list_is_an_error(self) -> None:
        bodies = [index_of(referrer(1)), b"<html>"]

        def respond_list(request: FakeRequest) -> None:
            request.respond(200, bodies.pop(0), Content_Type=OCI_INDEX, Link="<?more>; rel=next")

        self.patch(self, "respond_list", respond_list)
        self.failureResultOf(self.store().referrers(SUBJECT, TYPE), InvalidManifest)

    def test_an_empty_list_is_one(self) -> None:
        self.assertEqual([], self.list())
        self.assertEqual(1, len(self.agent.requests))

    def test_a_filter_that_the_registry_says_it_applied_is_applied_again(self) -> None:
        def respond_list(request: FakeRequest) -> None:
            body = index_of(referrer(1, "application/other"), referrer(2))
            request.respond(200, body, Content_Type=OCI_INDEX, OCI_Filters_Applied="artifactType")

        self.patch(self, "respond_list", respond_list)
        self.assertEqual([referrer(2)["digest"]], self.list())

    def test_a_web_page_is_not_taken_for_a_list(self) -> None:
        def respond_list(request: FakeRequest) -> None:
            request.respond(200, b"<html>", Content_Type="text/html")

        self.patch(self, "respond_list", respond_list)
        self.manifests[TAG] = (index_of(referrer(1)), OCI_INDEX)
        self.assertEqual([referrer(1)["digest"]], self.list())

    def test_a_registry_that_refuses_is_an_error_in_its_own_words(self) -> None:
        self.statuses = {"GET referrers": [403]}
        found = self.store().referrers(SUBJECT, TYPE)
        self.assertIn("DENIED: as told", str(self.failureResultOf(found, AccessDenied).value))

    def test_what_a_refusal_teaches_is_not_used_for_the_image(self) -> None:
        store = self.store()
        amd64 = Platform.parse("linux/amd64")
        self.manifests["1"] = self.manifests[SUBJECT]
        self.wants = "repository:team/app:pull"
        self.successResultOf(store.resolve(amd64))
        self.wants = "repository:team/app:pull,delete"
        self.assertEqual((), self.successResultOf(store.referrers(SUBJECT, TYPE)))
        self.assertIn("delete", self.agent.last.headers["authorization"])
        self.wants = None
        self.successResultOf(store.resolve(amd64))
        self.assertEqual("Bearer repository:team/app:pull", self.agent.last.headers["authorization"])


class ListWithoutApiTests(ReferrersTestCase):
    def test_the_list_is_the_index_under_the_tag_made_of_the_digest(self) -> None:
        self.manifests[f"sha256-{SUBJECT.encoded}"] = (
            index_of(referrer(1), referrer(2, "application/other")),
            OCI_INDEX,
        )
        self.assertEqual([referrer(1)["digest"]], self.list())

    def test_a_registry_with_neither_has_none_and_costs_two_requests(self) -> None:
        self.assertEqual([], self.list())
        self.assertEqual(2, len(self.agent.requests))

    def test_registries_say_in_many_ways_that_they_lack_it(self) -> None:
        for status in (400, 404, 405, 406, 410, 501):
            self.statuses = {"GET referrers": [status]}
            self.assertEqual([], self.list())

    def test_an_image_under_that_tag_is_no_list(self) -> None:
        self.manifests[TAG] = (MANIFEST, OCI_MANIFEST)
        self.failureResultOf(self.store().referrers(SUBJECT, TYPE), InvalidManifest)

    def test_a_long_digest_makes_a_tag_that_is_a_tag(self) -> None:
        tag = fallback_tag(Digest.of(b"", "sha512"))
        self.assertEqual("sha512-" + Digest.of(b"", "sha512").encoded[:64], tag)


class FetchTests(ReferrersTestCase):
    def fetch(self, content: bytes, media_type: str, **more: Any) -> Any:
        size = more.get("size", len(content))
        return self.store().fetch(Descriptor(media_type, Digest.of(content), size))

    def test_manifests_and_blobs_are_fetched_from_where_they_are(self) -> None:
        self.blobs[Digest.of(b"blob")] = b"blob"
        self.assertEqual(b"blob", self.successResultOf(self.fetch(b"blob", TYPE)))
        self.assertEqual(MANIFEST, self.successResultOf(self.fetch(MANIFEST, OCI_MANIFEST)))

    def test_what_has_another_digest_or_size_is_refused(self) -> None:
        self.blobs[Digest.of(b"blob")] = b"BLOB"
        self.failureResultOf(self.fetch(b"blob", TYPE), DigestMismatch)
        self.failureResultOf(self.fetch(b"blob", TYPE, size=3), RegistryError)
        self.failureResultOf(self.fetch(b"blob", TYPE, size=1 << 40), RegistryError)


class PushTests(ReferrersTestCase):
    has_api = True

    def test_what_is_pushed_is_an_artifact_that_refers_to_the_image(self) -> None:
        digest = self.push()
        document = json.loads(self.manifests[digest][0])
        self.assertEqual(describe(MANIFEST, OCI_MANIFEST), document["subject"])
        self.assertEqual((TYPE, THING.annotations), (document["artifactType"], document["annotations"]))
        self.assertEqual([describe(THING.content, TYPE)], document["layers"])
        self.assertEqual(describe(EMPTY, "application/vnd.oci.empty.v1+json"), document["config"])
        self.assertEqual({Digest.of(EMPTY): EMPTY, Digest.of(THING.content): THING.content}, self.blobs)
        self.assertEqual([digest], self.list())

    def test_a_registry_that_keeps_the_list_is_left_to_it(self) -> None:
        self.push()
        self.assertNotIn(TAG, self.manifests)

    def test_an_upload_goes_wherever_the_registry_says(self) -> None:
        self.upload_at = "https://store.example/v2/team/app/uploads/9?state=a%2Fb"
        self.wants = "repository:team/app:pull,push"
        real = self.answer

        def answer(request: FakeRequest) -> None:
            if request.url.startswith("https://store.example/"):
                self.assertNotIn("authorization", request.headers)
                request.headers = {**request.headers, "authorization": self.wants or ""}
            real(request)

        self.agent.answer = answer
        self.push()
        self.assertEqual(2, len(self.blobs))

    def test_a_token_to_push_is_asked_for(self) -> None:
        self.wants = "repository:team/app:pull,push"
        self.push(credentials=Credentials("alice", "secret"))
        self.assertEqual(2, len(self.blobs))

    def test_what_passes_is_tried_again(self) -> None:
        self.statuses = {"POST blobs": [503], "PUT uploads": [500], "PUT manifests": [429]}
        digest = self.push()
        self.assertEqual([digest], self.list())

    def test_a_registry_that_goes_on_failing_is_given_up(self) -> None:
        self.statuses = {"POST blobs": [503] * 10}
        pushed = self.store().push_referrer(self.image(), THING)
        for _ in range(10):
            self.clock.advance(1)
        self.assertIn("503", str(self.failureResultOf(pushed, RegistryError).value))
        self.assertEqual(10 - ATTEMPTS, len(self.statuses["POST blobs"]))

    def test_who_may_not_push_is_told_so_with_the_cure(self) -> None:
        for where in ("POST blobs", "PUT uploads", "PUT manifests"):
            self.statuses = {where: [403]}
            pushed = self.store().push_referrer(self.image(), THING)
            error = str(self.failureResultOf(pushed, AccessDenied).value)
            self.assertIn("DENIED: as told", error)
            self.assertIn("--username and --password-file", error)
        self.wants = "repository:team/app:pull,push"
        self.statuses = {"POST blobs": [403, 403]}
        pushed = self.store(Credentials("alice", "secret")).push_referrer(self.image(), THING)
        self.assertIn("may not push", str(self.failureResultOf(pushed, AccessDenied).value))

    def test_an_upload_to_nowhere_or_out_of_tls_is_refused(self) -> None:
        for self.upload_at in ("", "http://r.example/v2/team/app/uploads/7"):
            self.failureResultOf(self.store().push_referrer(self.image(), THING), RegistryError)
        self.assertEqual({}, self.blobs)


class PushWithoutApiTests(ReferrersTestCase):
    def entries(self) -> list[dict[str, Any]]:
        return list(json.loads(self.manifests[TAG][0])["manifests"])

    def test_a_list_is_made(self) -> None:
        digest = self.push()
        (entry,) = self.entries()
        self.assertEqual(
            (digest, TYPE, OCI_MANIFEST), (entry["digest"], entry["artifactType"], entry["mediaType"])
        )
        self.assertEqual(THING.annotations, entry["annotations"])
        self.assertEqual(len(self.manifests[digest][0]), entry["size"])
        self.assertEqual(OCI_INDEX, self.manifests[TAG][1])
        self.assertEqual("*", self.agent.last.headers["if-none-match"])
        self.assertEqual([digest], self.list())

    def test_a_list_that_is_there_is_kept_word_for_word_and_added_to(self) -> None:
        other = {**referrer(1, "application/other"), "x-unknown": [1]}
        before = {**json.loads(index_of(other)), "annotations": {"a": "b"}}
        self.manifests[TAG] = (encode(before), OCI_INDEX)
        digest = self.push()
        after = json.loads(self.manifests[TAG][0])
        self.assertEqual({**before, "manifests": [other, after["manifests"][1]]}, after)
        self.assertEqual(digest, after["manifests"][1]["digest"])

    def test_what_is_listed_is_not_listed_twice(self) -> None:
        self.assertEqual(self.push(), self.push())
        self.assertEqual(1, len(self.entries()))

    def test_a_list_that_somebody_else_changed_meanwhile_is_read_again(self) -> None:
        self.manifests[TAG] = (index_of(referrer(1)), OCI_INDEX)
        self.statuses = {f"PUT manifests/{TAG}": [412]}
        self.push()
        self.assertEqual(2, len(self.entries()))
        conditions = [r.headers.get("if-match") for r in self.agent.requests if r.method == "PUT"]
        self.assertEqual(['"1"', '"1"'], [condition for condition in conditions if condition])

    def test_a_weak_tag_is_no_condition(self) -> None:
        self.manifests[TAG] = (index_of(referrer(1)), OCI_INDEX)
        self.etag = 'W/"1"'
        self.push()
        self.assertEqual(2, len(self.entries()))
        self.assertNotIn("if-match", self.agent.last.headers)

    def test_a_list_that_others_change_all_the_time_is_given_up(self) -> None:
        self.statuses = {f"PUT manifests/{TAG}": [412] * 100}
        pushed = self.store().push_referrer(self.image(), THING)
        for _ in range(10):
            self.clock.advance(1)
        self.assertIn("all the time", str(self.failureResultOf(pushed, RegistryError).value))

    def test_an_image_under_the_lists_tag_is_not_overwritten(self) -> None:
        self.manifests[TAG] = (MANIFEST, OCI_MANIFEST)
        pushed = self.store().push_referrer(self.image(), THING)
        self.assertIn("not a list", str(self.failureResultOf(pushed, InvalidManifest).value))
        self.assertEqual(MANIFEST, self.manifests[TAG][0])
