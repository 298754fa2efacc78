"""What an image is called."""

from __future__ import annotations

import contextlib

from hypothesis import given
from hypothesis import strategies as st
from twisted.trial.unittest import SynchronousTestCase

from erofs_twisted.registry.digest import Digest
from erofs_twisted.registry.errors import InvalidDigest, InvalidReference
from erofs_twisted.registry.reference import ImageReference, LayoutReference, parse_reference

SHA256 = "sha256:" + "ab" * 32
SHA512 = "sha512:" + "0f" * 64

components = st.from_regex(r"[a-z0-9]{1,8}(?:(?:\.|_|__|-)[a-z0-9]{1,8}){0,2}", fullmatch=True)
tags = st.from_regex(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,127}", fullmatch=True)
hosts = st.one_of(
    st.just("localhost"),
    st.just("docker.io"),
    st.from_regex(r"[a-z][a-z0-9]{0,8}(?:-[a-z0-9]{1,8})?\.[a-z]{2,8}", fullmatch=True),
    st.ip_addresses(v=4).map(str),
    st.ip_addresses(v=6).map(lambda address: f"[{address}]"),
)


@st.composite
def image_texts(draw: st.DrawFn) -> str:
    host = draw(hosts)
    port = draw(st.one_of(st.none(), st.integers(1, 65535)))
    name = "/".join(draw(st.lists(components, min_size=1, max_size=4)))
    tag = draw(st.one_of(st.none(), tags))
    digest = draw(st.sampled_from([None, SHA256, SHA512]))
    text = host + (f":{port}" if port else "") + "/" + name
    return text + (f":{tag}" if tag else "") + (f"@{digest}" if digest else "")


def image(text: str) -> ImageReference:
    reference = parse_reference(text)
    assert isinstance(reference, ImageReference)
    return reference


class ImageReferenceTests(SynchronousTestCase):
    def test_every_part_is_found(self) -> None:
        self.assertEqual(
            ImageReference("registry.example:5000", "team/app", "1.2", Digest(SHA256)),
            parse_reference(f"registry.example:5000/team/app:1.2@{SHA256}"),
        )

    def test_a_short_name_is_on_docker_hub_below_library(self) -> None:
        self.assertEqual("docker.io/library/alpine:latest", str(parse_reference("alpine")))

    def test_a_name_of_two_components_on_docker_hub_is_not_below_library(self) -> None:
        self.assertEqual("docker.io/team/app:1", str(parse_reference("team/app:1")))

    def test_library_is_added_when_docker_hub_is_named(self) -> None:
        self.assertEqual("docker.io/library/alpine:3", str(parse_reference("docker.io/alpine:3")))

    def test_index_docker_io_is_docker_hub(self) -> None:
        self.assertEqual("docker.io/team/app:latest", str(parse_reference("index.docker.io/team/app")))

    def test_docker_hub_has_its_api_on_another_host(self) -> None:
        self.assertEqual("registry-1.docker.io", image("alpine").api_authority)

    def test_other_registries_have_their_api_where_they_are(self) -> None:
        self.assertEqual("quay.io", image("quay.io/a/b").api_authority)

    def test_library_is_not_added_elsewhere(self) -> None:
        self.assertEqual("quay.io/app:latest", str(parse_reference("quay.io/app")))

    def test_a_port_and_no_slash_is_a_tag(self) -> None:
        self.assertEqual("docker.io/library/registry:5000", str(parse_reference("registry:5000")))

    def test_a_colon_in_the_first_component_makes_it_a_host(self) -> None:
        self.assertEqual("registry:5000", image("registry:5000/app").registry)

    def test_localhost_is_a_host_without_a_port(self) -> None:
        self.assertEqual(
            ("localhost", "app"), (image("localhost/app").registry, image("localhost/app").repository)
        )

    def test_an_ipv6_host_is_kept_in_brackets(self) -> None:
        self.assertEqual("[::1]:5000", image("[::1]:5000/x").registry)

    def test_an_ipv6_host_has_one_spelling(self) -> None:
        self.assertEqual("[::1]", image("[0:0::0001]/x").registry)

    def test_a_host_is_lower_case(self) -> None:
        self.assertEqual("registry.example", image("Registry.Example/x").registry)

    def test_a_digest_needs_no_tag(self) -> None:
        self.assertIsNone(image(f"quay.io/a@{SHA256}").tag)

    def test_the_digest_decides_over_the_tag(self) -> None:
        self.assertEqual(SHA256, image(f"quay.io/a:1@{SHA256}").selector)

    def test_the_tag_decides_without_a_digest(self) -> None:
        self.assertEqual("1", image("quay.io/a:1").selector)

    def test_loopback_hosts_are_known(self) -> None:
        for text in ("localhost/x", "localhost:5000/x", "127.0.0.1:5000/x", "127.9.9.9/x", "[::1]:5000/x"):
            self.assertTrue(image(text).is_loopback, text)

    def test_other_hosts_are_not_loopback(self) -> None:
        for text in ("alpine", "10.0.0.1/x", "localhost.example/x", "[fe80::1]/x", "127.0.0.1.example/x"):
            self.assertFalse(image(text).is_loopback, text)

    def test_what_is_wrong_is_said(self) -> None:
        cases = {
            "": "names no repository",
            "registry.example/": "names no repository",
            "docker://quay.io/a": "leave out docker://",
            "quay.io/Team/App": "lower case",
            "Foo/bar": "lower case",
            "quay.io/a//b": "is not a repository",
            "quay.io/a:": "is not a tag",
            "quay.io/a:.x": "is not a tag",
            "quay.io/a:" + "x" * 129: "is not a tag",
            "quay.io/a@": "is not a digest",
            "quay.io/a@sha256:abc": "64 hex digits",
            "quay.io/a@md5:" + "a" * 32: "md5 is not supported",
            "quay.io:0/a": "a port is 1 to 65535",
            "quay.io:65536/a": "a port is 1 to 65535",
            "quay.io:x/a": "is not a registry",
            "[::1/a": "is not a registry",
            "[::g]:1/a": "is not a registry",
            "[1:2]:1/a": "is not an IPv6 address",
            "-a.example/b": "is not a host's name",
            "user:password@quay.io/a": "is not a digest",
            "a" * 64: "looks like an image ID",
            "quay.io/" + "a" * 256: "at most 255",
        }
        for text, said in cases.items():
            with self.subTest(text=text):
                self.assertIn(said, str(self.assertRaises(InvalidReference, parse_reference, text)))

    @given(image_texts())
    def test_the_text_of_a_reference_means_the_same_reference(self, text: str) -> None:
        reference = parse_reference(text)
        self.assertEqual(reference, parse_reference(str(reference)))

    @given(st.one_of(st.text(), st.text(alphabet="aZ0:/@.-_[]%\n")))
    def test_any_text_is_a_reference_or_refused(self, text: str) -> None:
        try:
            reference = parse_reference(text)
        except InvalidReference:
            return
        self.assertEqual(reference, parse_reference(str(reference)))


class LayoutReferenceTests(SynchronousTestCase):
    def test_a_directory_alone(self) -> None:
        self.assertEqual(LayoutReference("/srv/images"), parse_reference("oci:/srv/images"))

    def test_a_directory_and_a_tag(self) -> None:
        self.assertEqual(LayoutReference("images", "app-1.2"), parse_reference("oci:images:app-1.2"))

    def test_the_directory_ends_at_the_first_colon(self) -> None:
        self.assertEqual(LayoutReference("images", "quay.io/a:1"), parse_reference("oci:images:quay.io/a:1"))

    def test_what_is_wrong_is_said(self) -> None:
        cases = {
            "oci:": "names no directory",
            "oci::tag": "names no directory",
            "oci:dir:": "is not a tag",
            "oci:dir:@0": "ends at the first colon",
            "oci:a\0b": "names no directory",
        }
        for text, said in cases.items():
            with self.subTest(text=text):
                self.assertIn(said, str(self.assertRaises(InvalidReference, parse_reference, text)))

    @given(st.text().map("oci:".__add__))
    def test_any_text_is_a_reference_or_refused(self, text: str) -> None:
        try:
            reference = parse_reference(text)
        except InvalidReference:
            return
        self.assertIsInstance(reference, LayoutReference)
        self.assertEqual(reference, parse_reference(str(reference)))


class DigestTests(SynchronousTestCase):
    def test_its_parts_are_known(self) -> None:
        digest = Digest.parse(SHA512)
        self.assertEqual(("sha512", "0f" * 64), (digest.algorithm, digest.encoded))

    def test_it_is_text(self) -> None:
        self.assertEqual(SHA256, Digest.parse(SHA256))

    def test_capital_hex_digits_are_refused(self) -> None:
        self.assertRaises(InvalidDigest, Digest.parse, SHA256.upper())

    @given(st.binary(), st.sampled_from(["sha256", "sha512"]))
    def test_data_matches_its_digest_and_nothing_else(self, data: bytes, algorithm: str) -> None:
        digest = Digest.parse(Digest.of(data, algorithm))
        self.assertTrue(digest.matches(data))
        self.assertFalse(digest.matches(data + b"\0"))

    @given(st.binary())
    def test_hashing_in_pieces_gives_the_same_digest(self, data: bytes) -> None:
        hasher = Digest.of(b"").hasher()
        for index in range(len(data)):
            hasher.update(data[index : index + 1])
        self.assertEqual(Digest.of(data).encoded, hasher.hexdigest())

    @given(st.text())
    def test_any_text_is_a_digest_or_refused(self, text: str) -> None:
        with contextlib.suppress(InvalidDigest):
            self.assertEqual(text, Digest.parse(text))
