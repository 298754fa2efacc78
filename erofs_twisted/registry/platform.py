"""Platforms of images, and which image runs where (OCI image index, "platform"; containerd's rules)."""

from __future__ import annotations

import re
from collections.abc import Iterator

import attrs

from erofs_twisted.registry.errors import InvalidPlatform

_PART = re.compile(r"[A-Za-z0-9_.-]+")
_ARCHITECTURES = {
    "x86_64": ("amd64", ""),
    "x86-64": ("amd64", ""),
    "aarch64": ("arm64", ""),
    "i386": ("386", ""),
    "i486": ("386", ""),
    "i586": ("386", ""),
    "i686": ("386", ""),
    "armhf": ("arm", "v7"),
    "armel": ("arm", "v6"),
    "armv8l": ("arm", "v8"),
    "armv7l": ("arm", "v7"),
    "armv6l": ("arm", "v6"),
    "armv5l": ("arm", "v5"),
    "armv5tel": ("arm", "v5"),
    "armv5tejl": ("arm", "v5"),
    "loongarch64": ("loong64", ""),
}
"""Other names of an architecture, uname's among them, and the variant they imply."""

_IMPLIED_VARIANT = {"amd64": "v1", "arm64": "v8"}
"""The variant that is meant where there is none, and that is therefore left out."""

_OLDEST_VARIANT = {"amd64": 1, "arm": 5}


@attrs.frozen
class Platform:
    """OS/ARCH[/VARIANT], spelt as Go and the OCI specifications do; ``variant`` may be ''."""

    os: str
    architecture: str
    variant: str = ""

    @classmethod
    def parse(cls, text: str) -> Platform:
        """Read OS/ARCH[/VARIANT], in any spelling (``linux/aarch64`` too). Raises `InvalidPlatform`."""
        parts = text.split("/")
        if len(parts) not in (2, 3) or not all(_PART.fullmatch(part) for part in parts):
            raise InvalidPlatform(
                f"{text[:100]!r} is not OS/ARCH[/VARIANT], as in linux/amd64 or linux/arm/v7"
            )
        return cls.normalised(*parts)

    @classmethod
    def normalised(cls, os: str, architecture: str, variant: str = "") -> Platform:
        """The platform that these mean, whatever their spelling."""
        architecture = architecture.lower()
        architecture, implied = _ARCHITECTURES.get(architecture, (architecture, ""))
        variant = variant.lower() or implied
        if variant.isdecimal():
            variant = f"v{variant}"
        if architecture == "arm" and not variant:
            variant = "v7"
        if variant == _IMPLIED_VARIANT.get(architecture):
            variant = ""
        return cls(os.lower(), architecture, variant)

    @classmethod
    def of_host(cls, machine: str) -> Platform:
        """The platform of a Linux host, from uname's machine (``x86_64``, ``aarch64``, ``armv7l``)."""
        return cls.normalised("linux", machine)

    def __str__(self) -> str:
        return "/".join(part for part in (self.os, self.architecture, self.variant) if part)

    def fallbacks(self) -> Iterator[Platform]:
        """What this platform runs, best first: itself, then older variants of its architecture.

        Never another architecture (386 on amd64, arm on arm64): a file system of the wrong architecture
        should be asked for by name.
        """
        yield self
        major, _, minor = self.variant.removeprefix("v").partition(".")
        if self.architecture == "arm64":
            if self.variant:
                yield Platform(self.os, self.architecture)
            return
        oldest = _OLDEST_VARIANT.get(self.architecture)
        if oldest is None or minor or not re.fullmatch("[0-9]{1,2}", major):
            return
        for version in range(int(major) - 1, oldest - 1, -1):
            yield Platform.normalised(self.os, self.architecture, f"v{version}")
