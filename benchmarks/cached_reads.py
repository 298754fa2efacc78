"""What a read of cached bytes costs in Python.

Microseconds for a `BlobSource.read` of 4 KiB, without the reply; and how fast pieces of a transfer, as a
socket brings them, go through it into the page cache.
"""

from __future__ import annotations

import random
import tempfile
import time
from collections.abc import Iterator, Sequence

from benchmarks.stage import Stage
from benchmarks.table import Row
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


def measure(stage: Stage) -> Iterator[Row]:
    """Reported only: they say how much of a cached read is spent before the reply."""
    data = blob(SIZE)
    with tempfile.TemporaryDirectory(dir=stage.directory) as directory:
        origin = ScriptedOrigin(data)
        source = BlobSource(origin, open_cached(directory, data), ThreadlessReactor())
        half = SIZE // 2
        sequential = [number * READ % (half - 8 * MIB) for number in range(READS)]
        anywhere = [random.randrange(half // READ) * READ for _ in range(READS)]
        rate = fill(source, origin, half)
        ordered, scattered = microseconds(source, sequential), microseconds(source, anywhere)
        fill(source, origin, SIZE)
        complete = microseconds(source, sequential)
    yield Row("in process: pieces of a transfer into the cache", f"{rate:.0f} MB/s")
    yield Row(
        "in process: a cached read of 4 KiB, without the reply",
        f"{complete:.1f} µs",
        details=f"of an incomplete blob, in order {ordered:.1f} µs, at random {scattered:.1f} µs",
    )
