"""What a read of cached bytes costs in Python: ``python -m benchmarks.cached_reads``.

Microseconds for a `BlobSource.read` of 4 KiB, without the reply; and how fast pieces of a transfer, as a
socket brings them, go through it into the page cache.
"""

from __future__ import annotations

import random
import tempfile
import time
from collections.abc import Sequence

from erofs_twisted.blocks.source import BlobSource
from tests.unit.blobs import ScriptedOrigin, ThreadlessReactor, blob, open_cached

MIB = 1024 * 1024
SIZE = 64 * MIB
READ = 4096
PIECE = 64 * 1024
READS = 200_000


def microseconds(source: BlobSource, offsets: Sequence[int]) -> float:
    """For each read, all of which are answered at once."""
    began = time.perf_counter()
    for offset in offsets:
        source.read(offset, READ)
    return (time.perf_counter() - began) / len(offsets) * 1e6


def fill(source: BlobSource, origin: ScriptedOrigin, length: int) -> float:
    """Prefetch from the start; MB/s."""
    began = time.perf_counter()
    done = source.prefetch(0, length)
    while not done.called:
        transfer = origin.live[0]
        while transfer.position < transfer.length:
            transfer.send(min(PIECE, transfer.length - transfer.position))
        transfer.finish()
    return length / (time.perf_counter() - began) / 1e6


def main() -> None:
    data = blob(SIZE)
    with tempfile.TemporaryDirectory() as directory:
        origin = ScriptedOrigin(data)
        source = BlobSource(origin, open_cached(directory, data), ThreadlessReactor())
        half = SIZE // 2
        sequential = [number * READ % (half - 8 * MIB) for number in range(READS)]
        anywhere = [random.randrange(half // READ) * READ for _ in range(READS)]
        print(f"fill                            {fill(source, origin, half):7.0f} MB/s")
        print(f"read, blob incomplete, in order {microseconds(source, sequential):7.2f} µs")
        print(f"read, blob incomplete, random   {microseconds(source, anywhere):7.2f} µs")
        fill(source, origin, SIZE)
        print(f"read, blob complete             {microseconds(source, sequential):7.2f} µs")


if __name__ == "__main__":
    main()
