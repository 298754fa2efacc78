"""Which layer is mounted, and what a blob looks like as a device."""

from __future__ import annotations

from twisted.internet.defer import Deferred
from twisted.trial.unittest import SynchronousTestCase
from zope.interface.verify import verifyObject

from erofs_twisted.errors import ReadError
from erofs_twisted.image import BlobExport, LayerError, choose_layer, fill_mode
from erofs_twisted.interfaces import IExport
from erofs_twisted.options import read_image_config
from erofs_twisted.registry.digest import Digest
from erofs_twisted.registry.manifest import OCI_MANIFEST, Descriptor, Manifest, ResolvedImage
from erofs_twisted.registry.reference import parse_reference

EROFS = "application/vnd.erofs"
TAR = "application/vnd.oci.image.layer.v1.tar+gzip"


def descriptor(media_type: str, number: int = 0) -> Descriptor:
    return Descriptor(media_type, Digest.parse(f"sha256:{number:064x}"), 1000 + number)


def image(*media_types: str) -> ResolvedImage:
    layers = tuple(descriptor(media_type, number) for number, media_type in enumerate(media_types))
    manifest = Manifest(OCI_MANIFEST, descriptor("application/vnd.oci.image.config.v1+json"), layers)
    reference = parse_reference("registry.example/app:1.2")
    return ResolvedImage(reference, Digest.parse(f"sha256:{9:064x}"), manifest)


class ChooseLayerTests(SynchronousTestCase):
    def refused(self, resolved: ResolvedImage, index: int | None = None) -> str:
        return str(self.assertRaises(LayerError, choose_layer, resolved, index))

    def test_the_only_layer_is_taken_in_either_media_type(self) -> None:
        for media_type in (EROFS, "application/vnd.erofs.layer.v1"):
            self.assertEqual(media_type, choose_layer(image(media_type), None).media_type)

    def test_a_layer_is_chosen_by_its_index_from_0(self) -> None:
        resolved = image(TAR, EROFS, EROFS)
        self.assertEqual(resolved.layers[1], choose_layer(resolved, 1))
        self.assertEqual(resolved.layers[2], choose_layer(resolved, 2))

    def test_several_layers_without_a_choice_are_listed(self) -> None:
        message = self.refused(image(EROFS, TAR))
        self.assertIn("--layer N mounts one of them", message)
        self.assertIn(f"  0  {EROFS}  1000 bytes  sha256:{0:064x}", message)
        self.assertIn(f"  1  {TAR}  1001 bytes  sha256:{1:064x}", message)

    def test_an_index_out_of_range_is_named_with_the_layers_there_are(self) -> None:
        message = self.refused(image(EROFS), 1)
        self.assertTrue(message.startswith("--layer 1: "), message)
        self.assertIn(f"  0  {EROFS}", message)

    def test_a_layer_that_is_not_erofs_is_named_by_its_media_type(self) -> None:
        self.assertIn(f"has the media type {TAR}, which is not EROFS", self.refused(image(TAR)))

    def test_an_erofs_layer_compressed_as_a_whole_is_refused_by_name(self) -> None:
        for suffix in ("zstd", "gzip"):
            message = self.refused(image(f"{EROFS}.layer.v1+{suffix}"))
            self.assertIn(
                f"{EROFS}.layer.v1+{suffix}: an EROFS image compressed as a whole with {suffix}", message
            )

    def test_an_image_without_layers_is_refused(self) -> None:
        self.assertIn("has no layers", self.refused(image()))


class FillModeTests(SynchronousTestCase):
    def mode(self, image: str, fill: str | None) -> str:
        return fill_mode(read_image_config(image, {"fill": fill}))

    def test_an_image_of_a_registry_is_filled_in(self) -> None:
        self.assertEqual("auto", self.mode("registry.example/app", None))

    def test_an_image_on_a_disk_is_copied_only_when_that_is_asked_for(self) -> None:
        self.assertEqual(["off", "off", "full"], [self.mode("oci:/layout", f) for f in (None, "off", "full")])


class Source:
    """A `BlobSource` of bytes that count up, which are at hand, or come later."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.later: Deferred[list[bytes]] | None = None
        self.prefetched: list[tuple[int, int]] = []

    def content(self, offset: int, length: int) -> bytes:
        return bytes(1 + position % 255 for position in range(offset, offset + length))

    def read(self, offset: int, length: int) -> list[bytes] | Deferred[list[bytes]]:
        assert 0 < length <= self.size - offset, "a read lies within the blob"
        if self.later is not None:
            return self.later.addCallback(lambda _: [self.content(offset, length)])
        return [self.content(offset, length)]

    def prefetch(self, offset: int, length: int) -> Deferred[None]:
        self.prefetched.append((offset, length))
        return Deferred()


class BlobExportTests(SynchronousTestCase):
    def setUp(self) -> None:
        self.source = Source(5000)
        self.export = BlobExport(name="app", description="", source=self.source)  # type: ignore[arg-type]

    def joined(self, offset: int, length: int) -> bytes:
        segments = self.export.read(offset, length)
        assert isinstance(segments, list)
        return b"".join(segments)  # type: ignore[arg-type]

    def test_it_is_an_export(self) -> None:
        verifyObject(IExport, self.export)

    def test_its_size_is_rounded_up_to_a_whole_block(self) -> None:
        sizes = [BlobExport(name="", description="", source=Source(n)).size for n in (1, 4096, 4097)]  # type: ignore[arg-type]
        self.assertEqual([4096, 4096, 8192], sizes)

    def test_the_tail_beyond_the_blob_is_zeros(self) -> None:
        whole = self.source.content(0, 5000) + bytes(3192)
        for offset, length in (
            (0, 8192),
            (0, 10),
            (4990, 10),
            (4990, 11),
            (4999, 2),
            (5000, 1),
            (6000, 2192),
        ):
            self.assertEqual(whole[offset : offset + length], self.joined(offset, length), (offset, length))

    def test_a_read_that_has_to_wait_is_padded_when_it_comes(self) -> None:
        self.source.later = Deferred()
        segments = self.export.read(4096, 4096)
        assert isinstance(segments, Deferred)
        self.assertNoResult(segments)
        self.source.later.callback([])
        padded = self.successResultOf(segments)
        self.assertEqual(self.source.content(4096, 904) + bytes(3192), b"".join(padded))  # type: ignore[arg-type]

    def test_a_read_that_fails_gives_no_zeros(self) -> None:
        self.source.later = Deferred()
        segments = self.export.read(4096, 4096)
        assert isinstance(segments, Deferred)
        self.source.later.errback(ReadError("the registry is gone"))
        self.failureResultOf(segments, ReadError)

    def test_the_tail_is_a_hole_and_the_blob_is_not(self) -> None:
        self.assertEqual([(5000, False), (3192, True)], self.export.extents(0, 8192))
        self.assertEqual([(100, False)], self.export.extents(4900, 100))
        self.assertEqual([(192, True)], self.export.extents(8000, 192))

    def test_a_prefetch_stays_within_the_blob(self) -> None:
        self.export.prefetch(4096, 4096)
        self.assertEqual([(4096, 904)], self.source.prefetched)
        self.successResultOf(self.export.prefetch(5000, 100))
        self.assertEqual(1, len(self.source.prefetched))
