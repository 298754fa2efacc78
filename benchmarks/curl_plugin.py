"""nbdkit's curl plugin with its readahead filter, on the same cold reads as ours, near and far."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from benchmarks.registries import DELAYED, UNSHAPED, Counts, Link, Shaped
from benchmarks.served import NbdkitCurl, Ours, copy, read_randomly
from benchmarks.stage import Stage
from benchmarks.table import Row, at_least, medians
from tests.nbd_tools import Served

BARS = ((UNSHAPED, 1.0), (DELAYED, 3.0))


def measure(stage: Stage) -> Iterator[Row]:
    """Each read with a server that has just started, and fetches nothing by itself before it is asked."""
    image, count = stage.delayed, stage.effort.random_reads
    reads: dict[str, Callable[[Served], float]] = {
        f"sequential, {stage.effort.delayed} MiB": lambda server: copy(server).elapsed,
        f"{count} random reads": lambda server: read_randomly(server, count),
    }
    with Shaped(root=stage.www) as registry:
        for link, bar in BARS:
            for name, read in reads.items():
                pairs = [
                    (
                        _once(registry, link, NbdkitCurl(registry.url + image.path), read),
                        _once(registry, link, Ours(registry.reference(image), "--fill=off"), read),
                    )
                    for _ in range(stage.effort.runs)
                ]
                theirs, ours = medians(*zip(*((pair[0][0], pair[1][0]) for pair in pairs), strict=True))
                asked, wanted = pairs[-1][1][1], pairs[-1][0][1]
                yield at_least(
                    f"{link.delay * 1000:.0f} ms, {name}, against nbdkit curl",
                    [pair[0][0] / pair[1][0] for pair in pairs],
                    bar,
                    f"ours {ours:.2f} s ({asked.requests} requests, {asked.bytes / 1e6:.0f} MB), "
                    f"nbdkit {theirs:.2f} s ({wanted.requests}, {wanted.bytes / 1e6:.0f} MB)",
                )


def _once(
    registry: Shaped, link: Link, server: Served, read: Callable[[Served], float]
) -> tuple[float, Counts]:
    with server:
        registry.set(link)
        seconds = read(server)
        return seconds, registry.set(link)
