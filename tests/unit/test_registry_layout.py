"""Images in a layout on disk."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from twisted.internet.defer import CancelledError
from twisted.python.failure import Failure
from twisted.trial.unittest import SynchronousTestCase
from zope.interface.verify import verifyObject

from erofs_twisted.interfaces import IBlobReader, IImageStore
from erofs_twisted.registry.digest import Digest
from erofs_twisted.registry.errors import (
    BlobUnreadable,
    DigestMismatch,
    InvalidManifest,
    NotInRegistry,
    PlatformMissing,
    RegistryError,
)
from erofs_twisted.registry.layout import PIECE, LayoutStore
from erofs_twisted.registry.manifest import Descriptor, ResolvedImage
from erofs_twisted.registry.platform import Platform
from erofs_twisted.registry.push import Artifact
from erofs_twisted.registry.reference import LayoutReference, parse_reference
from erofs_twisted.registry.store import open_store
from tests.images import EROFS, OCI_LAYER, Described, Layout

AMD64 = Platform.parse("linux/amd64")
CONTENT = os.urandom(PIECE * 2 + 1000)


class Immediately:
    """A thread pool and a reactor that do everything at once, or, held up, when `go` is called."""

    def __init__(self) -> None:
        self.is_held = False
        self._held: list[Callable[[], None]] = []

    def callInThreadWithCallback(
        self, done: Callable[[bool, object], None], function: Callable[..., object], *args: Any, **more: Any
    ) -> None:
        def run() -> None:
            try:
                result = function(*args, **more)
            except Exception:  # noqa: BLE001 - as a thread pool does
                done(False, Failure())
            else:
                done(True, result)

        self._held.append(run)
        if not self.is_held:
            self.go()

    def callFromThread(self, function: Callable[..., object], *args: Any, **more: Any) -> None:
        function(*args, **more)

    def go(self) -> None:
        held, self._held = self._held, []
        for run in held:
            run()


class LayoutTests(SynchronousTestCase):
    def setUp(self) -> None:
        self.directory = Path(self.mktemp())
        self.layout = Layout(self.directory)
        self.threads = Immediately()

    def image(self, content: bytes = b"layer", **how: Any) -> Described:
        return self.layout.manifest([self.layout.blob(content, EROFS)], **how)

    def store(self, tag: str | None = None) -> LayoutStore:
        pool: Any = self.threads
        return LayoutStore(self.threads, LayoutReference(str(self.directory), tag), pool)

    def resolve(self, tag: str | None = None, platform: Platform = AMD64) -> ResolvedImage:
        return self.successResultOf(self.store(tag).resolve(platform))

    def refusal(self, kind: type[Exception], tag: str | None = None, platform: Platform = AMD64) -> str:
        return str(self.failureResultOf(self.store(tag).resolve(platform), kind).value)

    def path_of(self, described: Described) -> Path:
        return self.directory / "blobs" / str(described["digest"]).replace(":", "/")


class ResolveTests(LayoutTests):
    def test_it_is_an_image_store(self) -> None:
        self.assertTrue(verifyObject(IImageStore, self.store()))

    def test_the_only_image_needs_no_tag(self) -> None:
        entry = self.layout.tag(self.image(), None)
        self.assertEqual(entry["digest"], self.resolve().digest)

    def test_an_image_is_found_by_its_tag(self) -> None:
        self.layout.tag(self.image(b"one"), "1")
        two = self.layout.tag(self.image(b"two"), "2")
        self.assertEqual(two["digest"], self.resolve("2").digest)

    def test_an_index_leads_to_the_platforms_manifest(self) -> None:
        amd64, arm64 = self.image(b"a"), self.image(b"b", platform="linux/arm64")
        index = self.layout.tag(self.layout.index([arm64, amd64, self.layout.attestation(amd64)]), "1")
        image = self.resolve("1")
        self.assertEqual((amd64["digest"], index["digest"]), (image.digest, image.index_digest))
        self.assertEqual(["linux/arm64", "linux/amd64"], [str(platform) for platform in image.platforms])

    def test_an_artifact_beside_the_only_image_is_not_in_its_way(self) -> None:
        entry = self.layout.tag(self.image(), None)
        self.layout.tag({**self.image(b"artifact"), "artifactType": "application/thing"}, None)
        self.assertEqual(entry["digest"], self.resolve().digest)

    def test_of_several_images_for_one_tag_the_platforms_is_chosen(self) -> None:
        self.layout.tag(self.image(b"a"), "1")
        arm64 = self.layout.tag(self.image(b"b", platform="linux/arm64"), "1")
        self.assertEqual(arm64["digest"], self.resolve("1", Platform.parse("linux/arm64")).digest)

    def test_an_erofs_image_is_chosen_over_its_tarballs(self) -> None:
        tar = self.layout.manifest([self.layout.blob(b"tar", OCI_LAYER)])
        erofs = self.image(os_features=["erofs"])
        self.layout.tag(self.layout.index([tar, erofs]), "1")
        self.assertEqual(erofs["digest"], self.resolve("1").digest)

    def test_several_images_without_a_tag_are_not_guessed_among(self) -> None:
        self.layout.tag(self.image(b"one"), "1")
        self.layout.tag(self.image(b"two"), "2")
        self.assertIn("its tags: 1, 2", self.refusal(NotInRegistry))

    def test_a_missing_tag_is_answered_with_those_that_are_there(self) -> None:
        self.layout.tag(self.image(), "1")
        self.assertIn("its tags: 1", self.refusal(NotInRegistry, "2"))

    def test_a_missing_platform_is_said(self) -> None:
        self.layout.tag(self.layout.index([self.image()]), "1")
        self.assertIn("linux/amd64", self.refusal(PlatformMissing, "1", Platform.parse("linux/s390x")))

    def test_a_manifest_that_was_tampered_with_is_refused(self) -> None:
        entry = self.layout.tag(self.image(), "1")
        path = self.path_of(entry)
        path.write_bytes(path.read_bytes().replace(b"linux", b"Linux").replace(b'"layers"', b'"Layers"'))
        self.refusal(DigestMismatch, "1")

    def test_a_manifest_of_another_size_is_refused(self) -> None:
        entry = self.layout.tag(self.image(), "1")
        with self.path_of(entry).open("ab") as file:
            file.write(b" ")
        self.assertIn("its descriptor says", self.refusal(DigestMismatch, "1"))

    def test_a_manifest_that_is_not_there_is_said(self) -> None:
        self.path_of(self.layout.tag(self.image(), "1")).unlink()
        self.assertIn("there is no", self.refusal(NotInRegistry, "1"))

    def test_a_directory_that_is_no_layout_is_said(self) -> None:
        (self.directory / "oci-layout").unlink()
        self.assertIn("is not an OCI layout", self.refusal(NotInRegistry))

    def test_a_layout_of_another_version_is_refused(self) -> None:
        (self.directory / "oci-layout").write_text(json.dumps({"imageLayoutVersion": "2.0.0"}))
        self.assertIn("'2.0.0'", self.refusal(InvalidManifest))

    def test_an_index_that_is_no_json_is_refused(self) -> None:
        (self.directory / "index.json").write_text("{")
        self.assertIn("not JSON", self.refusal(InvalidManifest))

    def test_a_fifo_does_not_hang(self) -> None:
        (self.directory / "index.json").unlink()
        os.mkfifo(self.directory / "index.json")
        self.refusal(NotInRegistry)

    def test_a_directory_in_place_of_a_file_is_refused(self) -> None:
        (self.directory / "index.json").unlink()
        (self.directory / "index.json").mkdir()
        self.refusal(RegistryError)


class BlobTests(LayoutTests):
    def setUp(self) -> None:
        super().setUp()
        self.layout.tag(self.image(CONTENT), None)
        layer = self.resolve().layers[0]
        self.file = self.path_of({"digest": layer.digest})
        self.reader = self.store().blob(layer)
        self.got: list[bytes] = []

    def refused(self) -> str:
        done = self.reader.read(0, 1, self.got.append)
        return str(self.failureResultOf(done, BlobUnreadable).value)

    def test_it_is_a_blob_reader(self) -> None:
        self.assertTrue(verifyObject(IBlobReader, self.reader))
        self.assertEqual(len(CONTENT), self.reader.size)

    def test_a_range_is_delivered_in_pieces(self) -> None:
        self.assertIsNone(self.successResultOf(self.reader.read(500, PIECE * 2, self.got.append)))
        self.assertEqual([PIECE, PIECE], [len(piece) for piece in self.got])
        self.assertEqual(CONTENT[500 : 500 + PIECE * 2], b"".join(self.got))

    def test_an_empty_range_delivers_nothing(self) -> None:
        self.successResultOf(self.reader.read(0, 0, self.got.append))
        self.assertEqual([], self.got)

    def test_a_range_outside_the_blob_is_the_callers_mistake(self) -> None:
        self.assertRaises(ValueError, self.reader.read, len(CONTENT), 1, self.got.append)

    def test_a_file_of_another_size_is_refused(self) -> None:
        with self.file.open("ab") as file:
            file.write(b"x")
        self.assertIn(f"the manifest says {len(CONTENT)}", self.refused())

    def test_a_file_that_is_not_there_is_said(self) -> None:
        self.file.unlink()
        self.assertIn("there is no", self.refused())

    def test_cancelling_ends_the_reading(self) -> None:
        self.threads.is_held = True
        done = self.reader.read(0, PIECE * 2, self.got.append)
        done.cancel()
        self.failureResultOf(done, CancelledError)
        self.threads.go()
        self.assertEqual([], self.got)

    def test_no_file_stays_open(self) -> None:
        before = len(os.listdir("/proc/self/fd"))
        self.successResultOf(self.reader.read(0, PIECE * 2, self.got.append))
        self.file.unlink()
        self.refused()
        self.assertEqual(before, len(os.listdir("/proc/self/fd")))

    def test_closing_is_done_at_once(self) -> None:
        self.assertIsNone(self.successResultOf(self.store().close()))


class OpenStoreTests(LayoutTests):
    def test_a_layouts_reference_opens_a_layout(self) -> None:
        pool: Any = self.threads
        store = open_store(self.threads, parse_reference(f"oci:{self.directory}"), pool=pool)
        self.assertIsInstance(store, LayoutStore)


class ReferrerTests(LayoutTests):
    def test_those_of_the_type_are_listed(self) -> None:
        image = self.layout.tag(self.image(), "1")
        thing = self.layout.tag({**self.image(b"thing"), "artifactType": "application/thing"}, None)
        self.layout.tag({**self.image(b"other"), "artifactType": "application/other"}, None)
        found = self.successResultOf(self.store().referrers(Digest(image["digest"]), "application/thing"))
        self.assertEqual([thing["digest"]], [descriptor.digest for descriptor in found])

    def test_a_small_blob_is_fetched_and_checked(self) -> None:
        described = self.layout.blob(b"content", "application/thing")
        descriptor = Descriptor("application/thing", Digest(described["digest"]), 7)
        self.assertEqual(b"content", self.successResultOf(self.store().fetch(descriptor)))
        self.path_of(described).write_bytes(b"CONTENT")
        self.failureResultOf(self.store().fetch(descriptor), DigestMismatch)

    def test_nothing_is_pushed_to_a_layout(self) -> None:
        self.layout.tag(self.image(), "1")
        pushed = self.store().push_referrer(self.resolve(), Artifact("application/thing", b"x"))
        self.assertIn("push to a registry", str(self.failureResultOf(pushed, RegistryError).value))
