"""Which platform is meant, and what it runs."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st
from twisted.trial.unittest import SynchronousTestCase

from erofs_twisted.registry.errors import InvalidPlatform
from erofs_twisted.registry.platform import Platform


class PlatformTests(SynchronousTestCase):
    def test_one_platform_has_one_spelling(self) -> None:
        cases = {
            "linux/amd64": "linux/amd64",
            "linux/x86_64": "linux/amd64",
            "Linux/AMD64": "linux/amd64",
            "linux/amd64/v1": "linux/amd64",
            "linux/amd64/v3": "linux/amd64/v3",
            "linux/aarch64": "linux/arm64",
            "linux/arm64/v8": "linux/arm64",
            "linux/arm64/8": "linux/arm64",
            "linux/arm": "linux/arm/v7",
            "linux/arm/6": "linux/arm/v6",
            "linux/armhf": "linux/arm/v7",
            "linux/armel": "linux/arm/v6",
            "linux/i386": "linux/386",
            "linux/riscv64": "linux/riscv64",
        }
        for text, spelt in cases.items():
            with self.subTest(text=text):
                self.assertEqual(spelt, str(Platform.parse(text)))

    def test_the_host_is_known_by_its_machine_name(self) -> None:
        cases = {
            "x86_64": "linux/amd64",
            "aarch64": "linux/arm64",
            "armv7l": "linux/arm/v7",
            "armv6l": "linux/arm/v6",
            "armv5tel": "linux/arm/v5",
            "i686": "linux/386",
            "ppc64le": "linux/ppc64le",
            "s390x": "linux/s390x",
            "loongarch64": "linux/loong64",
        }
        for machine, spelt in cases.items():
            with self.subTest(machine=machine):
                self.assertEqual(spelt, str(Platform.of_host(machine)))

    def test_what_is_no_platform_is_refused_with_an_example(self) -> None:
        for text in ("", "linux", "linux/", "/amd64", "linux/arm/v7/x", "linux/am d64", "linux//v7"):
            with self.subTest(text=text):
                error = self.assertRaises(InvalidPlatform, Platform.parse, text)
                self.assertIn("linux/arm/v7", str(error))

    def test_older_variants_are_fallen_back_to(self) -> None:
        cases = {
            "linux/arm/v7": ["linux/arm/v7", "linux/arm/v6", "linux/arm/v5"],
            "linux/arm/v5": ["linux/arm/v5"],
            "linux/amd64/v3": ["linux/amd64/v3", "linux/amd64/v2", "linux/amd64"],
            "linux/amd64": ["linux/amd64"],
            "linux/arm64": ["linux/arm64"],
            "linux/arm64/v8.2": ["linux/arm64/v8.2", "linux/arm64"],
            "linux/arm64/v9": ["linux/arm64/v9", "linux/arm64"],
            "linux/s390x": ["linux/s390x"],
            "linux/amd64/odd": ["linux/amd64/odd"],
        }
        for text, expected in cases.items():
            with self.subTest(text=text):
                self.assertEqual(expected, [str(p) for p in Platform.parse(text).fallbacks()])

    @given(st.one_of(st.text(), st.text(alphabet="linuxarmd648v/._-")))
    def test_any_text_is_a_platform_or_refused(self, text: str) -> None:
        try:
            platform = Platform.parse(text)
        except InvalidPlatform:
            return
        self.assertEqual(platform, Platform.parse(str(platform)))
        self.assertEqual(platform, next(platform.fallbacks()))
        self.assertLess(len(list(platform.fallbacks())), 101)
