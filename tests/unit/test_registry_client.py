"""From a reference to a resolved image, in a registry."""

from __future__ import annotations

import json
from typing import Any

from twisted.internet.defer import CancelledError, Deferred
from twisted.internet.error import ConnectionRefusedError
from twisted.trial.unittest import SynchronousTestCase
from zope.interface.verify import verifyObject

from erofs_twisted.interfaces import IImageStore
from erofs_twisted.registry.client import RegistryStore
from erofs_twisted.registry.credentials import Credentials
from erofs_twisted.registry.digest import Digest
from erofs_twisted.registry.errors import (
    AccessDenied,
    DigestMismatch,
    InvalidManifest,
    NotInRegistry,
    PlatformMissing,
    TransferFailed,
)
from erofs_twisted.registry.manifest import (
    MAX_MANIFEST,
    OCI_INDEX,
    OCI_MANIFEST,
    Descriptor,
    ResolvedImage,
)
from erofs_twisted.registry.platform import Platform
from tests.unit.fakehosts import fake_store
from tests.unit.fakehttp import FakeRequest, fake_transport

AMD64 = Platform.parse("linux/amd64")


def encode(document: dict[str, Any]) -> bytes:
    return json.dumps(document).encode()


def describe(data: bytes, media_type: str, **more: Any) -> dict[str, Any]:
    return {"mediaType": media_type, "digest": Digest.of(data), "size": len(data), **more}


def index_of(*entries: dict[str, Any]) -> bytes:
    return encode({"schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": list(entries)})


LAYER = b"layer"
MANIFEST = encode(
    {
        "schemaVersion": 2,
        "mediaType": OCI_MANIFEST,
        "config": describe(b"{}", "application/vnd.oci.image.config.v1+json"),
        "layers": [describe(LAYER, "application/vnd.erofs")],
        "annotations": {"made": "by hand"},
    }
)
INDEX = index_of(
    describe(b"other", OCI_MANIFEST, platform={"os": "linux", "architecture": "arm64"}),
    describe(MANIFEST, OCI_MANIFEST, platform={"os": "linux", "architecture": "amd64"}),
)


class ClientTests(SynchronousTestCase):
    """Against a registry that has ``self.documents``, by tag or digest: the body and its content type."""

    def setUp(self) -> None:
        self.agent, self.clock, self.transport = fake_transport(self.answer)
        self.documents: dict[str, tuple[bytes, str]] = {
            "1": (INDEX, OCI_INDEX),
            "plain": (MANIFEST, OCI_MANIFEST),
            Digest.of(MANIFEST): (MANIFEST, OCI_MANIFEST),
            Digest.of(INDEX): (INDEX, OCI_INDEX),
        }
        self.announced: str | None = None

    def answer(self, request: FakeRequest) -> None:
        document = self.documents.get(request.url.rpartition("/")[2])
        if document is None:
            request.respond(404, b'{"errors":[{"code":"MANIFEST_UNKNOWN","message":"manifest unknown"}]}')
        else:
            extra = {"Docker_Content_Digest": self.announced} if self.announced else {}
            request.respond(200, document[0], Content_Type=document[1], **extra)

    def store(
        self, text: str, credentials: Credentials | None = None, plain_http: bool = False
    ) -> RegistryStore:
        return fake_store(self.transport, text, credentials=credentials, plain_http=plain_http)

    def begin(self, text: str, **how: Any) -> Deferred[ResolvedImage]:
        return self.store(text, **how).resolve(AMD64)

    def resolve(self, text: str, **how: Any) -> ResolvedImage:
        return self.successResultOf(self.begin(text, **how))

    def refusal(self, text: str, kind: type[Exception], **how: Any) -> str:
        return str(self.failureResultOf(self.begin(text, **how), kind).value)


class ResolveTests(ClientTests):
    def test_it_is_an_image_store(self) -> None:
        self.assertTrue(verifyObject(IImageStore, self.store("r.example/a:1")))

    def test_a_manifest_is_resolved_in_one_request(self) -> None:
        image = self.resolve("r.example/a:plain")
        self.assertEqual(["https://r.example/v2/a/manifests/plain"], self.agent.urls)
        self.assertEqual(
            (Digest.of(MANIFEST), None, None), (image.digest, image.index_digest, image.platform)
        )
        self.assertEqual([Digest.of(LAYER)], [layer.digest for layer in image.layers])
        self.assertEqual({"made": "by hand"}, image.annotations)
        self.assertEqual(Digest.of(b"{}"), image.config.digest)

    def test_an_index_leads_to_the_platforms_manifest(self) -> None:
        image = self.resolve("r.example/a:1")
        self.assertEqual(Digest.of(MANIFEST), image.digest)
        self.assertEqual(Digest.of(INDEX), image.index_digest)
        self.assertEqual(AMD64, image.platform)
        self.assertEqual(["linux/arm64", "linux/amd64"], [str(platform) for platform in image.platforms])

    def test_every_kind_of_manifest_is_accepted(self) -> None:
        self.resolve("r.example/a:plain")
        accepted = self.agent.last.headers["accept"]
        for kind in ("oci.image.manifest", "oci.image.index", "docker.distribution.manifest.list"):
            self.assertIn(kind, accepted)

    def test_docker_hub_is_asked_at_its_api(self) -> None:
        self.resolve("app:plain")
        self.assertEqual(["https://registry-1.docker.io/v2/library/app/manifests/plain"], self.agent.urls)

    def test_a_pinned_manifest_is_asked_for_by_its_digest(self) -> None:
        image = self.resolve(f"r.example/a:1@{Digest.of(MANIFEST)}")
        self.assertEqual(Digest.of(MANIFEST), image.digest)
        self.assertTrue(self.agent.last.url.endswith(Digest.of(MANIFEST)))

    def test_a_pinned_index_is_followed(self) -> None:
        self.assertEqual(Digest.of(MANIFEST), self.resolve(f"r.example/a@{Digest.of(INDEX)}").digest)

    def test_an_index_in_an_index_is_followed(self) -> None:
        self.documents["nested"] = (index_of(describe(INDEX, OCI_INDEX)), OCI_INDEX)
        image = self.resolve("r.example/a:nested")
        self.assertEqual(Digest.of(self.documents["nested"][0]), image.index_digest)
        self.assertEqual(Digest.of(MANIFEST), image.digest)

    def test_indexes_are_not_followed_for_ever(self) -> None:
        data = INDEX
        for _ in range(5):
            data = index_of(describe(data, OCI_INDEX))
            self.documents[Digest.of(data)] = (data, OCI_INDEX)
        self.documents["deep"] = (data, OCI_INDEX)
        self.assertIn("indexes within", self.refusal("r.example/a:deep", InvalidManifest))

    def test_the_manifest_of_another_pin_is_refused(self) -> None:
        self.documents[Digest.of(b"pin")] = (MANIFEST, OCI_MANIFEST)
        self.assertIn("not sha256:", self.refusal(f"r.example/a@{Digest.of(b'pin')}", DigestMismatch))

    def test_another_manifest_than_the_indexs_is_refused(self) -> None:
        self.documents[Digest.of(MANIFEST)] = (MANIFEST.replace(b"hand", b"hook"), OCI_MANIFEST)
        self.refusal("r.example/a:1", DigestMismatch)

    def test_another_size_than_the_indexs_is_refused(self) -> None:
        self.documents[Digest.of(MANIFEST)] = (MANIFEST + b" ", OCI_MANIFEST)
        self.assertIn("its descriptor says", self.refusal("r.example/a:1", DigestMismatch))

    def test_a_manifest_that_is_not_what_the_registry_announced_is_refused(self) -> None:
        self.announced = Digest.of(b"something else")
        self.refusal("r.example/a:plain", DigestMismatch)

    def test_an_announcement_in_another_algorithm_is_checked_too(self) -> None:
        self.announced = Digest.of(MANIFEST, "sha512")
        self.assertEqual(self.announced, self.resolve("r.example/a:plain").digest)

    def test_an_announcement_that_cannot_be_read_does_not_matter(self) -> None:
        self.announced = "md5:5"
        self.assertEqual(Digest.of(MANIFEST), self.resolve("r.example/a:plain").digest)

    def test_an_index_that_names_a_huge_manifest_is_not_followed(self) -> None:
        entry = {**describe(b"x", OCI_MANIFEST), "size": MAX_MANIFEST + 1}
        self.documents["huge"] = (index_of(entry), OCI_INDEX)
        self.refusal("r.example/a:huge", InvalidManifest)
        self.assertEqual(1, len(self.agent.requests))

    def test_a_huge_manifest_is_cut_off(self) -> None:
        self.documents["huge"] = (b" " * (MAX_MANIFEST + 1), OCI_MANIFEST)
        self.assertIn("allowed", self.refusal("r.example/a:huge", TransferFailed))

    def test_what_is_no_manifest_is_refused_with_the_images_name(self) -> None:
        self.documents["bad"] = (b"<html>", "text/html")
        said = self.refusal("r.example/a:bad", InvalidManifest)
        self.assertIn("r.example/a:bad: ", said)
        self.assertIn("not JSON", said)

    def test_a_missing_platform_names_the_image_and_those_that_are_there(self) -> None:
        failed = self.store("r.example/a:1").resolve(Platform.parse("linux/s390x"))
        said = str(self.failureResultOf(failed, PlatformMissing).value)
        self.assertIn("r.example/a:1: ", said)
        self.assertIn("linux/arm64, linux/amd64", said)

    def test_a_missing_image_is_reported_in_the_registrys_words(self) -> None:
        self.assertIn("manifest unknown", self.refusal("r.example/a:gone", NotInRegistry))


class FailureTests(ClientTests):
    def test_a_temporary_error_is_tried_again(self) -> None:
        refuse = [503, 502]
        self.agent.answer = lambda request: request.respond(refuse.pop()) if refuse else self.answer(request)
        resolved = self.begin("r.example/a:plain")
        self.clock.pump([1, 1])
        self.assertEqual(Digest.of(MANIFEST), self.successResultOf(resolved).digest)

    def test_it_is_given_up_soon(self) -> None:
        self.agent.answer = lambda request: request.fail(ConnectionRefusedError())
        resolved = self.begin("r.example/a:plain")
        self.clock.pump([0.5] * 10)
        self.failureResultOf(resolved, TransferFailed)
        self.assertEqual(4, len(self.agent.requests))

    def test_a_private_image_names_the_options(self) -> None:
        challenge = 'Bearer realm="https://auth.example/token"'

        def answer(request: FakeRequest) -> None:
            if request.url.startswith("https://auth.example/"):
                request.respond(200, b'{"token":"anonymous"}')
            else:
                request.respond(401, b"", WWW_Authenticate=challenge)

        self.agent.answer = answer
        self.assertIn("--username and --password-file", self.refusal("r.example/a:1", AccessDenied))
        said = self.refusal("r.example/a:1", AccessDenied, credentials=Credentials("alice", "secret"))
        self.assertNotIn("--username", said)
        self.assertNotIn("alice", said)

    def test_cancelling_withdraws_the_request(self) -> None:
        self.agent.answer = lambda request: None
        resolved = self.begin("r.example/a:1")
        resolved.cancel()
        self.failureResultOf(resolved, CancelledError)
        self.assertTrue(self.agent.last.is_cancelled)
        self.assertEqual([], self.clock.getDelayedCalls())


class SchemeTests(ClientTests):
    def test_plain_http_is_spoken_on_request(self) -> None:
        self.resolve("r.example:5000/a:plain", plain_http=True)
        self.assertEqual(["http://r.example:5000/v2/a/manifests/plain"], self.agent.urls)

    def test_plain_http_is_spoken_to_this_machine(self) -> None:
        for host in ("localhost:5000", "127.0.0.1:5000", "[::1]:5000"):
            self.resolve(f"{host}/a:plain")
            self.assertEqual(f"http://{host}/v2/a/manifests/plain", self.agent.last.url)

    def test_a_server_on_this_machine_that_wants_tls_gets_it(self) -> None:
        self.agent.answer = lambda request: (
            self.answer(request) if request.url.startswith("https:") else request.respond(400, b"TLS!")
        )
        store = self.store("localhost:5000/a:plain")
        image = self.successResultOf(store.resolve(AMD64))
        self.assertEqual("https://localhost:5000/v2/a/manifests/plain", self.agent.last.url)
        store.blob(image.layers[0]).read(0, 1, lambda data: None).addErrback(lambda _: None)
        self.assertTrue(self.agent.last.url.startswith("https://localhost:5000/v2/a/blobs/"))

    def test_a_blob_finds_out_by_itself_where_no_manifest_was_asked_for(self) -> None:
        self.agent.answer = lambda request: (
            request.respond_range(LAYER)
            if request.url.startswith("https:")
            else request.respond(400, b"TLS!")
        )
        descriptor = Descriptor("application/vnd.erofs", Digest.of(LAYER), len(LAYER))
        blob = self.store("localhost:5000/a:plain").blob(descriptor)
        got: list[bytes] = []
        self.successResultOf(blob.read(1, 3, got.append))
        self.successResultOf(blob.read(0, 1, got.append))
        self.assertEqual(b"ayel", b"".join(got))
        self.assertEqual(["http", "https", "https"], [url.partition(":")[0] for url in self.agent.urls])

    def test_where_plain_http_is_asked_for_it_stays(self) -> None:
        self.agent.answer = lambda request: request.respond(400, b"TLS!")
        self.refusal("localhost:5000/a:plain", TransferFailed, plain_http=True)
        self.assertEqual(["http://localhost:5000/v2/a/manifests/plain"], self.agent.urls)


class BlobTests(ClientTests):
    def test_a_layer_is_read_from_the_same_repository(self) -> None:
        store = self.store("r.example/a/b:plain")
        layer = self.successResultOf(store.resolve(AMD64)).layers[0]
        got: list[bytes] = []
        self.agent.answer = lambda request: request.respond_range(LAYER)
        self.successResultOf(store.blob(layer).read(1, 3, got.append))
        self.assertEqual(f"https://r.example/v2/a/b/blobs/{layer.digest}", self.agent.last.url)
        self.assertEqual(b"aye", b"".join(got))

    def test_the_token_of_the_manifest_serves_the_blob(self) -> None:
        def answer(request: FakeRequest) -> None:
            if request.url.startswith("https://auth.example/"):
                request.respond(200, b'{"token":"t","expires_in":300}')
            elif request.headers.get("authorization") != "Bearer t":
                request.respond(401, b"", WWW_Authenticate='Bearer realm="https://auth.example/token"')
            elif "/blobs/" in request.url:
                request.respond_range(LAYER)
            else:
                self.answer(request)

        self.agent.answer = answer
        store = self.store("r.example/a:plain")
        layer = self.successResultOf(store.resolve(AMD64)).layers[0]
        self.successResultOf(store.blob(layer).read(0, 5, lambda data: None))
        self.assertEqual(4, len(self.agent.requests))

    def test_closing_is_done_at_once_where_nothing_is_open(self) -> None:
        self.assertIsNone(self.successResultOf(self.store("r.example/a:1").close()))
