"""How fast cached bytes reach an NBD client, beside nbdkit: one file, which lies in the page cache."""

from __future__ import annotations

from collections.abc import Iterator

import attrs

from benchmarks.machine import Ran
from benchmarks.served import copy
from benchmarks.stage import Stage
from benchmarks.table import Row, at_least, medians
from tests.nbd_tools import Nbdkit, Ours


@attrs.frozen
class Load:
    """A way to read, and how much faster than nbdkit we mean to be."""

    name: str
    options: tuple[str, ...]
    bar: float


LOADS = (
    Load("1 MiB", ("--request-size=1048576", "--requests=64"), 1.0),
    Load("128 KiB", ("--request-size=131072", "--requests=64"), 1.5),
    Load("4 KiB", ("--request-size=4096", "--requests=64"), 1.3),
)


def measure(stage: Stage) -> Iterator[Row]:
    """By turns, over one connection."""
    path = str(stage.stream.blob)
    with Ours(path) as ours, Nbdkit(path) as theirs:
        copy(ours)
        for load in LOADS:
            pairs: list[tuple[Ran, Ran]] = [
                (copy(theirs, *load.options), copy(ours, *load.options)) for _ in range(stage.effort.runs)
            ]
            seconds = medians(*([run.elapsed for run in side] for side in zip(*pairs, strict=True)))
            work = medians(*([run.processor for run in side] for side in zip(*pairs, strict=True)))
            yield at_least(
                f"cached, {stage.effort.stream} MiB in {load.name} reads, 64 in flight, against nbdkit file",
                [nbdkit.elapsed / own.elapsed for nbdkit, own in pairs],
                load.bar,
                f"ours {seconds[1]:.2f} s (processor {work[1]:.2f} s), "
                f"nbdkit {seconds[0]:.2f} s ({work[0]:.2f} s)",
            )
