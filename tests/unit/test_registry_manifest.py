"""Manifests and indexes, and which manifest of an index is chosen."""

from __future__ import annotations

import contextlib
import json
from typing import Any

from hypothesis import given
from hypothesis import strategies as st
from twisted.trial.unittest import SynchronousTestCase

from erofs_twisted.registry.digest import Digest
from erofs_twisted.registry.errors import InvalidManifest, PlatformMissing
from erofs_twisted.registry.manifest import (
    DOCKER_INDEX,
    DOCKER_MANIFEST,
    MAX_MANIFEST,
    OCI_INDEX,
    OCI_MANIFEST,
    Descriptor,
    Index,
    Manifest,
    parse_manifest,
)
from erofs_twisted.registry.platform import Platform
from erofs_twisted.registry.selection import choose_manifest, platforms

EROFS = "application/vnd.erofs"


def descriptor(seed: str, media_type: str = EROFS, **more: Any) -> dict[str, Any]:
    return {"mediaType": media_type, "digest": Digest.of(seed.encode()), "size": len(seed), **more}


def manifest(**changes: Any) -> dict[str, Any]:
    return {
        "schemaVersion": 2,
        "mediaType": OCI_MANIFEST,
        "config": descriptor("config", "application/vnd.oci.image.config.v1+json"),
        "layers": [descriptor("layer")],
        **changes,
    }


def entry(platform: str, seed: str = "", **more: Any) -> dict[str, Any]:
    names = dict(zip(("os", "architecture", "variant"), platform.split("/"), strict=False))
    return descriptor(seed or platform, OCI_MANIFEST, platform={**names, **more.pop("also", {})}, **more)


def index(*entries: dict[str, Any], **changes: Any) -> dict[str, Any]:
    return {"schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": list(entries), **changes}


def parse(document: object, media_type: str = "") -> Manifest | Index:
    return parse_manifest(json.dumps(document).encode(), media_type)


def parse_index(*entries: dict[str, Any]) -> Index:
    parsed = parse(index(*entries))
    assert isinstance(parsed, Index)
    return parsed


class ManifestTests(SynchronousTestCase):
    def assertRefused(self, said: str, document: object, media_type: str = "") -> None:
        error = self.assertRaises(InvalidManifest, parse, document, media_type)
        self.assertIn(said, str(error))

    def test_a_manifest_has_its_layers_in_order(self) -> None:
        parsed = parse(manifest(layers=[descriptor("low"), descriptor("high")], annotations={"a": "b"}))
        assert isinstance(parsed, Manifest)
        self.assertEqual([Digest.of(b"low"), Digest.of(b"high")], [layer.digest for layer in parsed.layers])
        self.assertEqual({"a": "b"}, parsed.annotations)

    def test_a_layer_is_described(self) -> None:
        parsed = parse(manifest(layers=[descriptor("low", annotations={"k": "v"})]))
        assert isinstance(parsed, Manifest)
        self.assertEqual(Descriptor(EROFS, Digest.of(b"low"), 3, {"k": "v"}), parsed.layers[0])

    def test_dockers_types_are_read_too(self) -> None:
        self.assertIsInstance(parse(manifest(mediaType=DOCKER_MANIFEST), DOCKER_MANIFEST), Manifest)
        self.assertIsInstance(parse(index(mediaType=DOCKER_INDEX), DOCKER_INDEX), Index)

    def test_parameters_of_the_content_type_do_not_matter(self) -> None:
        self.assertIsInstance(parse(manifest(), OCI_MANIFEST.upper() + "; charset=utf-8"), Manifest)

    def test_a_document_without_a_type_is_what_it_was_sent_as(self) -> None:
        self.assertIsInstance(parse(manifest(mediaType=None), OCI_MANIFEST), Manifest)

    def test_a_document_sent_as_plain_json_speaks_for_itself(self) -> None:
        self.assertIsInstance(parse(index(), "application/json"), Index)

    def test_a_document_that_says_nothing_is_told_by_its_form(self) -> None:
        self.assertIsInstance(parse(index(mediaType=None), "application/json"), Index)
        self.assertIsInstance(parse(manifest(mediaType=None)), Manifest)

    def test_a_document_that_contradicts_its_sender_is_refused(self) -> None:
        self.assertRefused("calls itself", manifest(), OCI_INDEX)

    def test_a_document_that_could_be_read_in_two_ways_is_refused(self) -> None:
        self.assertRefused("two ways", manifest(manifests=[]))

    def test_schema_1_is_refused_by_name(self) -> None:
        self.assertRefused("schema 1", {"schemaVersion": 1, "fsLayers": []})
        self.assertRefused("schema 1", {}, "application/vnd.docker.distribution.manifest.v1+prettyjws")

    def test_another_type_is_refused_by_name(self) -> None:
        self.assertRefused("text/html", manifest(mediaType=None), "text/html")

    def test_too_large_a_document_is_refused_before_it_is_parsed(self) -> None:
        error = self.assertRaises(InvalidManifest, parse_manifest, b" " * (MAX_MANIFEST + 1))
        self.assertIn("more than", str(error))

    def test_deep_nesting_is_refused(self) -> None:
        error = self.assertRaises(InvalidManifest, parse_manifest, b"[" * 100_000)
        self.assertIn("not JSON", str(error))

    def test_a_number_with_thousands_of_digits_is_refused(self) -> None:
        self.assertRaises(InvalidManifest, parse_manifest, b'{"schemaVersion":' + b"9" * 5000 + b"}")

    def test_what_is_wrong_is_named_by_its_path(self) -> None:
        layer = descriptor("layer")
        cases: list[tuple[str, object]] = [
            ("it is not a JSON object", []),
            ("schemaVersion is 3", manifest(schemaVersion=3)),
            ("schemaVersion is True", manifest(schemaVersion=True)),
            ("layers is not a list", manifest(layers={})),
            ("layers[0] is not a JSON object", manifest(layers=["x"])),
            ("config is not a JSON object", manifest(config=None)),
            ("layers[0].size is -1", manifest(layers=[{**layer, "size": -1}])),
            ("layers[0].size is True", manifest(layers=[{**layer, "size": True}])),
            ("layers[0].size is 1.5", manifest(layers=[{**layer, "size": 1.5}])),
            ("layers[0].size is 9223372036854775808", manifest(layers=[{**layer, "size": 2**63}])),
            ("layers[0].digest:", manifest(layers=[{**layer, "digest": "sha256:../../etc/passwd"}])),
            ("layers[0].digest is not a string", manifest(layers=[{**layer, "digest": 5}])),
            ("layers[0].mediaType is", manifest(layers=[{**layer, "mediaType": "a/b\n"}])),
            ("layers[0].annotations", manifest(layers=[{**layer, "annotations": {"a": 1}}])),
            ("manifests[0].platform is not", index(descriptor("x", OCI_MANIFEST, platform=[]))),
            ("manifests[0].platform is 'linux/a/b'", index(entry("linux/x", also={"architecture": "a/b"}))),
            ("manifests[0].platform['os.features']", index(entry("linux/x", also={"os.features": "win"}))),
        ]
        for said, document in cases:
            with self.subTest(said=said):
                self.assertRefused(said, document)

    @given(st.binary())
    def test_any_bytes_are_a_manifest_or_refused(self, data: bytes) -> None:
        self.assertRaises(InvalidManifest, parse_manifest, data)

    @given(st.data())
    def test_any_change_of_a_manifest_is_read_or_refused(self, data: st.DataObject) -> None:
        document = data.draw(st.sampled_from([manifest(), index(entry("linux/amd64"))]))
        leaf = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text())
        json_values = st.recursive(
            leaf, lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner), max_leaves=5
        )
        target: Any = document
        while True:
            key = data.draw(
                st.sampled_from(sorted(target) if isinstance(target, dict) else range(len(target)))
            )
            if not target[key] or not isinstance(target[key], dict | list) or data.draw(st.booleans()):
                target[key] = data.draw(json_values)
                break
            target = target[key]
        with contextlib.suppress(InvalidManifest):
            parse(document)


class SelectionTests(SynchronousTestCase):
    def chosen(self, platform: str, *entries: dict[str, Any]) -> str:
        return choose_manifest(parse_index(*entries), Platform.parse(platform)).digest

    def test_the_platform_asked_for_is_chosen(self) -> None:
        found = self.chosen("linux/arm64", entry("linux/amd64"), entry("linux/arm64"))
        self.assertEqual(Digest.of(b"linux/arm64"), found)

    def test_an_entry_is_chosen_whatever_its_spelling(self) -> None:
        found = self.chosen("linux/arm64", entry("linux/amd64"), entry("linux/arm64/v8"))
        self.assertEqual(Digest.of(b"linux/arm64/v8"), found)

    def test_the_nearest_older_variant_is_chosen(self) -> None:
        found = self.chosen("linux/arm/v7", entry("linux/arm/v5"), entry("linux/arm/v6"))
        self.assertEqual(Digest.of(b"linux/arm/v6"), found)

    def test_a_newer_variant_is_never_chosen(self) -> None:
        error = self.assertRaises(PlatformMissing, self.chosen, "linux/amd64", entry("linux/amd64/v3"))
        self.assertIn("linux/amd64/v3", str(error))

    def test_the_first_of_equals_is_chosen(self) -> None:
        found = self.chosen("linux/amd64", entry("linux/amd64", "one"), entry("linux/amd64", "two"))
        self.assertEqual(Digest.of(b"one"), found)

    def test_an_erofs_image_is_chosen_over_its_tarballs(self) -> None:
        erofs = entry("linux/amd64", "erofs", also={"os.features": ["erofs"]})
        self.assertEqual(Digest.of(b"erofs"), self.chosen("linux/amd64", entry("linux/amd64", "tar"), erofs))

    def test_a_better_variant_wins_over_erofs(self) -> None:
        old = entry("linux/amd64", "old", also={"os.features": ["erofs"]})
        self.assertEqual(Digest.of(b"v2"), self.chosen("linux/amd64/v2", old, entry("linux/amd64/v2", "v2")))

    def test_an_attestation_is_never_chosen(self) -> None:
        unknown = entry("unknown/unknown")
        marked = entry(
            "linux/amd64", "marked", annotations={"vnd.docker.reference.type": "attestation-manifest"}
        )
        self.assertRaises(PlatformMissing, self.chosen, "unknown/unknown", unknown)
        self.assertRaises(PlatformMissing, self.chosen, "linux/amd64", marked)

    def test_another_type_of_artifact_is_never_chosen(self) -> None:
        artifact = descriptor("sbom", "application/vnd.example.sbom+json")
        self.assertRaises(PlatformMissing, self.chosen, "linux/amd64", artifact)

    def test_a_single_image_without_a_platform_serves_every_platform(self) -> None:
        found = self.chosen("linux/amd64", descriptor("only", OCI_MANIFEST), entry("unknown/unknown"))
        self.assertEqual(Digest.of(b"only"), found)

    def test_of_several_without_a_platform_none_is_guessed(self) -> None:
        entries = [descriptor("one", OCI_MANIFEST), descriptor("two", OCI_MANIFEST)]
        error = self.assertRaises(PlatformMissing, self.chosen, "linux/amd64", *entries)
        self.assertIn(Digest.of(b"two"), str(error))

    def test_a_missing_platform_is_answered_with_those_that_are_there(self) -> None:
        entries = [entry("linux/arm/v7"), entry("linux/arm64"), entry("unknown/unknown")]
        error = self.assertRaises(PlatformMissing, self.chosen, "linux/s390x", *entries)
        self.assertIn("--platform takes one of: linux/arm/v7, linux/arm64", str(error))
        self.assertNotIn("unknown", str(error))

    def test_platforms_are_listed_once(self) -> None:
        found = platforms(
            parse_index(entry("linux/amd64"), entry("linux/amd64", "b"), entry("unknown/unknown"))
        )
        self.assertEqual(["linux/amd64"], [str(platform) for platform in found])
