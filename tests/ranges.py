"""Random ranges of a blob, read many at a time and compared, whatever goes wrong on the way."""

from __future__ import annotations

import statistics
import time
from random import Random
from typing import Any

import attrs
from twisted.internet.defer import Deferred, gatherResults

from erofs_twisted.errors import ErofsTwistedError


@attrs.define
class Reads:
    """What came of them. The seconds are those of each read, in any order."""

    elapsed: float = 0.0
    seconds: list[float] = attrs.field(factory=list)
    errors: list[str] = attrs.field(factory=list)
    wrong: int = 0
    """Reads that ended well, but not with the right bytes."""

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    @property
    def worst(self) -> float:
        return max(self.seconds)


async def read_ranges(
    reader: Any, content: bytes, count: int, seed: int, *, lanes: int = 32, longest: int = 64 * 1024
) -> Reads:
    """Read ``count`` ranges of the blob, whose content is known, ``lanes`` at a time."""
    chance, reads, left = Random(seed), Reads(), iter(range(count))

    async def lane() -> None:
        for _ in left:
            length = chance.randint(1, min(longest, len(content)))
            offset = chance.randrange(len(content) - length + 1)
            await read_one(reader, content, offset, length, reads)

    began = time.monotonic()
    await gatherResults([Deferred.fromCoroutine(lane()) for _ in range(lanes)], consumeErrors=True)
    reads.elapsed = time.monotonic() - began
    return reads


async def read_one(reader: Any, content: bytes, offset: int, length: int, reads: Reads) -> None:
    """Read one range, and note down what comes of it."""
    got: list[bytes] = []
    began = time.monotonic()
    try:
        await reader.read(offset, length, got.append)
    except ErofsTwistedError as error:
        reads.errors.append(str(error))
    else:
        reads.wrong += content[offset : offset + length] != b"".join(got)
    reads.seconds.append(time.monotonic() - began)
