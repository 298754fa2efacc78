"""Many clients at once on a cached export: does their total throughput hold?"""

from __future__ import annotations

import statistics
import subprocess
import time
from collections.abc import Iterator

from benchmarks.content import MIB
from benchmarks.machine import PATIENCE
from benchmarks.stage import Stage
from benchmarks.table import Row
from tests.nbd_tools import Nbdkit, Ours, Served, tool

CLIENTS = (1, 4, 16, 64)
MOST_LOST = 0.10


def measure(stage: Stage) -> Iterator[Row]:
    """Each client reads all of the export. One after the other stands for one: so all take about as long."""
    size = stage.effort.export
    path = stage.new("export")
    with path.open("wb") as file:
        noise = stage.stream.blob.open("rb").read(MIB)
        for _ in range(size):
            file.write(noise)
    rates: dict[int, list[float]] = {clients: [] for clients in CLIENTS}
    with Ours(str(path)) as ours, Nbdkit(str(path)) as nbdkit:
        at_once(ours, 1)
        for _ in range(stage.effort.runs):
            for clients, results in rates.items():
                results.append(rate_of(ours, clients, size))
        theirs = {clients: rate_of(nbdkit, clients, size) for clients in CLIENTS}
    path.unlink()
    rate = {clients: statistics.median(results) for clients, results in rates.items()}
    best = 0.0
    for clients in CLIENTS:
        best = max(best, rate[clients])
        lost = 1 - rate[clients] / best
        yield Row(
            f"growth: {clients} clients on a cached export",
            f"{rate[clients]:.0f} MiB/s",
            f">= {best * (1 - MOST_LOST):.0f} MiB/s" if clients > 1 else "",
            lost <= MOST_LOST if clients > 1 else None,
            f"{lost:.0%} below the best so far; nbdkit file, once, {theirs[clients]:.0f} MiB/s",
        )


def rate_of(server: Served, clients: int, size: int) -> float:
    """MiB/s, all of them together."""
    repeated = 4 // clients or 1
    return size * repeated * clients / sum(at_once(server, clients) for _ in range(repeated))


def at_once(server: Served, clients: int) -> float:
    """Seconds from the first one's start to the last one's end."""
    command = [
        tool("nbdcopy"),
        "--connections=1",
        "--request-size=131072",
        "--requests=16",
        server.uri(),
        "null:",
    ]
    began = time.perf_counter()
    running = [subprocess.Popen(command) for _ in range(clients)]
    try:
        statuses = [process.wait(PATIENCE) for process in running]
    finally:
        for process in running:
            process.kill()
            process.wait()
    if any(statuses):
        raise RuntimeError(f"nbdcopy ends with {statuses}")
    return time.perf_counter() - began
