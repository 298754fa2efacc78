"""Content digests: ``sha256:…`` and ``sha512:…`` (OCI image specification, "Digests")."""

from __future__ import annotations

import hashlib
import re
from typing import TYPE_CHECKING

from erofs_twisted.registry.errors import InvalidDigest

if TYPE_CHECKING:
    from hashlib import _Hash

HEX_LENGTH = {"sha256": 64, "sha512": 128}
_DIGEST = re.compile(r"([a-z0-9]+):([0-9a-f]+)")


class Digest(str):
    """A digest that was checked: plain text wherever text is wanted, and it knows how to hash."""

    __slots__ = ()

    @classmethod
    def parse(cls, text: str) -> Digest:
        """Raises `InvalidDigest`."""
        match = _DIGEST.fullmatch(text)
        if match is None:
            raise InvalidDigest(f"{text[:100]!r} is not a digest: one looks like sha256: and 64 hex digits")
        algorithm, encoded = match.groups()
        if algorithm not in HEX_LENGTH:
            known = " and ".join(HEX_LENGTH)
            raise InvalidDigest(f"the digest algorithm {algorithm[:32]} is not supported, only {known}")
        if len(encoded) != HEX_LENGTH[algorithm]:
            raise InvalidDigest(
                f"a {algorithm} digest has {HEX_LENGTH[algorithm]} hex digits, this one {len(encoded)}"
            )
        return cls(text)

    @classmethod
    def of(cls, data: bytes, algorithm: str = "sha256") -> Digest:
        """The digest of ``data``."""
        return cls(f"{algorithm}:{hashlib.new(algorithm, data).hexdigest()}")

    @property
    def algorithm(self) -> str:
        return self.partition(":")[0]

    @property
    def encoded(self) -> str:
        """The hex digits."""
        return self.partition(":")[2]

    def hasher(self) -> _Hash:
        """A hash of this digest's algorithm, to be fed piece by piece."""
        return hashlib.new(self.algorithm)

    def matches(self, data: bytes) -> bool:
        """Is ``data`` what this digest names?"""
        return Digest.of(data, self.algorithm) == self
