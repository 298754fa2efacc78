"""How fast cached bytes reach an NBD client, beside nbdkit: ``python -m benchmarks.nbd_throughput``.

nbdcopy reads one file, which lies in the page cache, from both servers by turns, over one connection. Compare
the ratios: the seconds are the machine's, and those of whatever else it does. That disturbs the server's
processor time less.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import subprocess
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import attrs

from tests.nbd_tools import Nbdkit, Ours, Served, tool

MIB = 1 << 20


@attrs.frozen
class Load:
    """A way to read, and how much faster than nbdkit we mean to be."""

    name: str
    options: tuple[str, ...]
    target: float


LOADS = (
    Load("1 MiB reads, 64 in flight", ("--request-size=1048576", "--requests=64"), 1.0),
    Load("128 KiB reads, 64 in flight", ("--request-size=131072", "--requests=64"), 1.5),
    Load("4 KiB reads, 64 in flight", ("--request-size=4096", "--requests=64"), 1.3),
)


def seconds(server: Served, load: Load) -> tuple[float, float]:
    """For one copy of the whole export to nowhere: elapsed, and of the processor for the server."""
    command = [tool("nbdcopy"), "--connections=1", *load.options, server.uri(), "null:"]
    worked, began = processor_time(server), time.perf_counter()
    subprocess.run(command, check=True)
    return time.perf_counter() - began, processor_time(server) - worked


def processor_time(server: Served) -> float:
    """Seconds that a server has used, for itself and in the kernel."""
    fields = Path(f"/proc/{server.pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def compare(ours: Served, theirs: Served, load: Load, runs: int) -> str:
    """A line of the table: medians of ``runs`` runs each, by turns."""
    taken: dict[Served, list[tuple[float, float]]] = {ours: [], theirs: []}
    for _ in range(runs):
        for server, results in taken.items():
            results.append(seconds(server, load))
    (our_time, our_work), (their_time, their_work) = (
        [statistics.median(each) for each in zip(*taken[server], strict=True)] for server in (ours, theirs)
    )
    ratio = their_time / our_time
    verdict = "met" if ratio >= load.target else "MISSED"
    figures = f"{our_time:8.2f} {their_time:10.2f} {ratio:8.2f} x {load.target:6.1f} x {verdict:7}"
    return f"{load.name:28} {figures} {our_work:8.2f} {their_work:10.2f}"


def machine() -> str:
    """Processor, number of cores, kernel."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return (
        f"{models[0] if models else platform.machine()}, {os.cpu_count()} cores, Linux {platform.release()}"
    )


def peak_memory(server: Served) -> int:
    """The most that a server has had in memory, in MiB."""
    status = Path(f"/proc/{server.pid}/status").read_text()
    (kibibytes,) = [int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM")]
    return kibibytes >> 10


def make_file(path: Path, mebibytes: int) -> None:
    """Of bytes that no server takes for a hole."""
    piece = os.urandom(MIB)
    with path.open("wb") as file:
        for _ in range(mebibytes):
            file.write(piece)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--runs", type=int, default=5, help="of each load on each server (default: 5)")
    parser.add_argument("--mebibytes", type=int, default=1024, help="the file's size (default: 1024)")
    asked = parser.parse_args(arguments)
    print(f"nbdcopy of {asked.mebibytes} MiB, median of {asked.runs} runs, on {machine()}\n")
    print(f"{'':28} {'elapsed, s':>19} {'':28} {'processor, s':>19}")
    print(
        f"{'':28} {'ours':>8} {'nbdkit':>10} {'faster':>10} {'target':>8} {'':7} {'ours':>8} {'nbdkit':>10}"
    )
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory, "file")
        make_file(path, asked.mebibytes)
        with Ours(str(path)) as ours, Nbdkit(str(path)) as theirs:
            for load in LOADS:
                print(compare(ours, theirs, load, asked.runs), flush=True)
            print(f"\npeak memory: ours {peak_memory(ours)} MiB, nbdkit {peak_memory(theirs)} MiB")


if __name__ == "__main__":
    main()
