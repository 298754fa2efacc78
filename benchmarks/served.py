"""NBD servers to compare: ours with an image that is in a registry, and nbdkit's plugins."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

from benchmarks.machine import Ran, processor_time, ran
from benchmarks.profiling import profiling
from tests.nbd_tools import Served, libnbd, tool

BIN = Path(sys.executable).parent
RANDOM_READS = Path(__file__).with_name("random_reads.py")


class Ours(Served):
    """``erofs-nbd serve`` of an image in a registry, with nothing cached."""

    def __init__(self, reference: str, *options: str) -> None:
        super().__init__(reference)
        self.options = options

    def command(self) -> list[str]:
        cache = f"--cache-dir={self.directory / 'cache'}"
        command = [str(BIN / "erofs-nbd"), "serve", *self.files, f"--socket={self.socket}", cache]
        return profiling.command([*command, *self.options])


class NbdkitCurl(Served):
    """nbdkit's curl plugin behind its readahead filter."""

    def command(self) -> list[str]:
        options = ["--foreground", "--readonly", "--unix", self.socket, "--filter=readahead"]
        return [tool("nbdkit"), *options, "curl", f"url={self.files[0]}"]


def copy(server: Served, *options: str) -> Ran:
    """Read all of the export with nbdcopy, over one connection: seconds, and the server's processor time."""
    before = processor_time(server.pid)
    copied = ran([tool("nbdcopy"), "--connections=1", *options, server.uri(), "null:"])
    return Ran(copied.elapsed, processor_time(server.pid) - before)


def read_randomly(server: Served, count: int, seed: int = 1) -> float:
    """So many reads of 4 to 128 KiB, 16 in flight, the same for the same seed; seconds."""
    return float(libnbd(RANDOM_READS, server.uri(), str(seed), str(count)).split()[0])


def curl(url: str, target: str | Path = os.devnull) -> Ran:
    """Download it."""
    program = shutil.which("curl")
    if program is None:
        raise RuntimeError("curl is missing: apt-get install curl")
    return ran([program, "--silent", "--fail", "--output", target, url])
