"""Manifests that are kept by digest."""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import Any

from twisted.internet.defer import Deferred
from twisted.logger import LogLevel, globalLogPublisher

from erofs_twisted.registry.client import RegistryStore
from erofs_twisted.registry.digest import Digest
from erofs_twisted.registry.documents import DocumentFiles
from erofs_twisted.registry.errors import NotInRegistry
from erofs_twisted.registry.manifest import OCI_MANIFEST, ResolvedImage
from erofs_twisted.registry.resolution import Document
from tests.unit.blobs import ThreadlessPool, ThreadlessReactor
from tests.unit.fakehosts import fake_store
from tests.unit.test_registry_client import AMD64, INDEX, MANIFEST, ClientTests

DOCUMENT = Document(Digest.of(MANIFEST), OCI_MANIFEST, MANIFEST)


class DocumentCase(ClientTests):
    def setUp(self) -> None:
        super().setUp()
        self.path = self.mktemp()
        self.files = DocumentFiles(ThreadlessReactor(), ThreadlessPool(), self.path)  # type: ignore[arg-type]
        self.warnings: list[str] = []
        globalLogPublisher.addObserver(self.note)
        self.addCleanup(globalLogPublisher.removeObserver, self.note)

    def note(self, event: dict[str, Any]) -> None:
        if event["log_level"] is LogLevel.warn:
            self.warnings.append(event["log_format"].format(**event))

    def file(self, data: bytes = MANIFEST) -> Path:
        return Path(self.path, "manifests", "sha256", Digest.of(data).encoded)

    def get(self, digest: Digest = DOCUMENT.digest) -> Document | None:
        return self.successResultOf(Deferred.fromCoroutine(self.files.get(digest)))

    def put(self, document: Document = DOCUMENT) -> None:
        self.successResultOf(Deferred.fromCoroutine(self.files.put(document)))


class FileTests(DocumentCase):
    def test_what_was_put_is_there(self) -> None:
        self.put()
        self.assertEqual(DOCUMENT, self.get())
        self.assertIsNone(self.get(Digest.of(b"other")))
        self.assertEqual([], self.warnings)

    def test_only_its_owner_may_see_it_and_nothing_else_is_left(self) -> None:
        self.put()
        self.put()
        self.assertEqual([self.file().name], os.listdir(self.file().parent))
        modes = [stat.S_IMODE(path.stat().st_mode) for path in (self.file(), self.file().parent)]
        self.assertEqual([0o600, 0o700], modes)

    def test_what_was_changed_is_not_believed(self) -> None:
        self.put()
        whole = self.file().read_bytes()
        for content in (b"", whole[:-1], whole.replace(b"hand", b"hook"), whole[whole.index(b"\n") + 1 :]):
            self.file().write_bytes(content)
            self.warnings.clear()
            self.assertIsNone(self.get())
            self.assertEqual(1, len(self.warnings))

    def test_a_link_or_a_pipe_in_its_place_is_not_followed(self) -> None:
        self.put()
        self.file().rename(self.file().with_name("elsewhere"))
        self.file().symlink_to("elsewhere")
        self.assertIsNone(self.get())
        self.file().unlink()
        os.mkfifo(self.file())
        self.assertIsNone(self.get())

    def test_where_nothing_can_be_written_nothing_is_kept(self) -> None:
        Path(self.path).write_text("a file")
        self.put()
        self.assertIn("is not kept", self.warnings[0])

    def test_a_media_type_that_would_break_the_file_is_not_kept(self) -> None:
        for media_type in ("a\nb", "a" * 256):
            self.put(Document(DOCUMENT.digest, media_type, MANIFEST))
            self.assertIsNone(self.get())


class ResolveTests(DocumentCase):
    def store(self, text: str, *_: Any, **__: Any) -> RegistryStore:
        return fake_store(self.transport, text, documents=self.files)

    def again(self, text: str) -> tuple[ResolvedImage, list[str]]:
        """What a reference leads to the second time, and the requests for it."""
        first = self.resolve(text)
        before = len(self.agent.urls)
        second = self.resolve(text)
        self.assertEqual(first, second)
        return second, self.agent.urls[before:]

    def test_a_digest_is_asked_for_once(self) -> None:
        image, requests = self.again(f"r.example/a:1@{Digest.of(MANIFEST)}")
        self.assertEqual(Digest.of(MANIFEST), image.digest)
        self.assertEqual([], requests)

    def test_the_digest_of_an_index_is_asked_for_once_and_so_is_what_it_leads_to(self) -> None:
        image, requests = self.again(f"r.example/a@{Digest.of(INDEX)}")
        self.assertEqual((AMD64, Digest.of(INDEX)), (image.platform, image.index_digest))
        self.assertEqual([], requests)

    def test_a_tag_is_asked_for_each_time_and_what_it_leads_to_once(self) -> None:
        _, requests = self.again("r.example/a:1")
        self.assertEqual(["https://r.example/v2/a/manifests/1"], requests)

    def test_what_a_tag_named_is_known_by_its_digest(self) -> None:
        self.resolve("r.example/a:plain")
        self.documents.clear()
        self.assertEqual(Digest.of(MANIFEST), self.resolve(f"r.example/a@{Digest.of(MANIFEST)}").digest)

    def test_a_tag_that_is_gone_is_gone(self) -> None:
        self.resolve("r.example/a:plain")
        self.documents.clear()
        self.refusal("r.example/a:plain", NotInRegistry)

    def test_a_damaged_one_is_asked_for_again_and_replaced(self) -> None:
        text = f"r.example/a@{Digest.of(MANIFEST)}"
        self.resolve(text)
        self.file().write_bytes(b"x\n{}")
        _, requests = self.again(text)
        self.assertEqual([], requests)
        self.assertEqual(2, len(self.agent.urls))
        self.assertEqual(1, len(self.warnings))
