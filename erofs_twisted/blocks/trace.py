"""A trace: which parts of a blob its first readers read, in the order in which they read them.

What is fetched in that order is there before it is asked for. A trace is a hint and nothing more: a wrong one
costs bandwidth, never a wrong byte.
"""

from __future__ import annotations

import json
import re
from itertools import pairwise
from typing import Any, TypeGuard

import attrs

from erofs_twisted.blocks.chunks import CHUNK_SIZE, Chunking, ChunkMap
from erofs_twisted.errors import ErofsTwistedError

MEDIA_TYPE = "application/vnd.erofs-twisted.trace.v1+json"
"""Of a trace as a blob, and as an OCI artifact."""
VERSION = 1
MAX_RANGES = 32768
"""Each of `GRAIN` bytes or more: half a gigabyte at the least."""
MAX_ENCODED = 2 * 1024 * 1024
"""Bytes of JSON: what `MAX_RANGES` may come to."""
GRAIN = max(16 * 1024, CHUNK_SIZE)
"""Bytes that are recorded as one; less than the cache's chunk would save no byte.

The start of Python was 182 ranges of 5.9 MB by 4 KiB, 149 of 6.7 MB by 16 KiB, 95 of 9.2 MB by 64 KiB. With
16 KiB there are few requests and few bytes, and what the kernel reads ahead at another moment is there too.
"""
MAX_SIZE = 2**63 - 1

_DIGEST = re.compile(r"sha256:[0-9a-f]{64}|sha512:[0-9a-f]{128}")

Ranges = tuple[tuple[int, int], ...]


class InvalidTrace(ErofsTwistedError, ValueError):
    """This is no trace, or not one of the blob that it is needed for."""


@attrs.frozen
class Trace:
    """``ranges`` are byte ranges [start, end) of the blob ``digest`` of ``size`` bytes, in the order of their
    first reads. No two overlap, and none begins where the one before it ends: those are one.

    Raises `InvalidTrace` where that isn't so.
    """

    digest: str
    size: int
    ranges: Ranges

    def __attrs_post_init__(self) -> None:
        if not _DIGEST.fullmatch(self.digest):
            raise InvalidTrace(f"{self.digest!r:.100} is not the digest of a blob")
        if not 0 <= self.size <= MAX_SIZE:
            raise InvalidTrace(f"a blob cannot have {self.size} bytes")
        if len(self.ranges) > MAX_RANGES:
            raise InvalidTrace(f"{len(self.ranges)} ranges, at most {MAX_RANGES} are allowed")
        for start, end in self.ranges:
            if not 0 <= start < end <= self.size:
                raise InvalidTrace(f"[{start}, {end}) is not a range of a blob of {self.size} bytes")
        for (_, end), (start, _) in pairwise(self.ranges):
            if end == start:
                raise InvalidTrace(f"one range ends at {end}, where the next one begins: these are one")
        for (start, end), (following, _) in pairwise(sorted(self.ranges)):
            if following < end:
                raise InvalidTrace(f"[{start}, {end}) overlaps the range that starts at {following}")

    @property
    def length(self) -> int:
        """How many bytes were read."""
        return sum(end - start for start, end in self.ranges)

    def encode(self) -> bytes:
        """As it is kept and pushed: JSON of the media type `MEDIA_TYPE`."""
        fields = {
            "version": VERSION,
            "mediaType": MEDIA_TYPE,
            "digest": self.digest,
            "size": self.size,
            "ranges": self.ranges,
        }
        return json.dumps(fields, separators=(",", ":")).encode("ascii")

    @classmethod
    def decode(cls, data: bytes) -> Trace:
        """Read what `encode` gave. Fields that are not known are passed over. Raises `InvalidTrace`."""
        if len(data) > MAX_ENCODED:
            raise InvalidTrace(f"{len(data)} bytes, at most {MAX_ENCODED} are allowed")
        try:
            fields = json.loads(data)
        except (ValueError, RecursionError) as error:
            raise InvalidTrace(f"not JSON: {error}") from error
        if not isinstance(fields, dict):
            raise InvalidTrace("not a JSON object")
        if fields.get("version") != VERSION or not _is_number(fields["version"]):
            raise InvalidTrace(f"its version is {fields.get('version')!r:.40}, not {VERSION}")
        if fields.get("mediaType") != MEDIA_TYPE:
            raise InvalidTrace(f"its mediaType is {fields.get('mediaType')!r:.100}, not {MEDIA_TYPE}")
        digest, size, ranges = fields.get("digest"), fields.get("size"), fields.get("ranges")
        if not isinstance(digest, str) or not _is_number(size) or not isinstance(ranges, list):
            raise InvalidTrace("digest, size and ranges are not a text, a number and a list")
        if not all(
            isinstance(pair, list) and len(pair) == 2 and all(map(_is_number, pair)) for pair in ranges
        ):
            raise InvalidTrace("ranges is not a list of pairs of numbers")
        return cls(digest, size, tuple((start, end) for start, end in ranges))

    def requests(self, longest: int) -> int:
        """How many Range requests fetch all of it, each of at most ``longest`` bytes."""
        return sum(-(-(end - start) // longest) for start, end in self.ranges)


class Recorder:
    """Takes reads, and keeps the order of the first ones, in whole grains: ``grain`` is a power of two."""

    def __init__(self, digest: str, size: int, grain: int = GRAIN) -> None:
        self.size = size
        self._digest = digest
        self._chunking = Chunking(size, grain)
        self._seen = ChunkMap(self._chunking.count)
        self._runs: list[tuple[int, int]] = []
        self.version = 0
        """Changes whenever there is something new."""

    def read(self, offset: int, length: int) -> None:
        """[offset, offset + length) of the blob was read; length > 0."""
        first, end = self._chunking.span(offset, length)
        if self._seen.present(first, end):
            return
        for start, stop in list(self._seen.runs_missing(first, end)):
            if self._runs and self._runs[-1][1] == start:
                self._runs[-1] = (self._runs[-1][0], stop)
            elif len(self._runs) < MAX_RANGES:
                self._runs.append((start, stop))
            else:
                return
            self._seen.set(start, stop)
            self.version += 1

    def trace(self) -> Trace:
        """What was read so far."""
        at = self._chunking.start
        return Trace(
            self._digest, self._chunking.size, tuple((at(first), at(end)) for first, end in self._runs)
        )


def _is_number(value: Any) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool)
