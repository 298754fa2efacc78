"""What a slow disk does to the cached reads of another export: ``python -m benchmarks.slow_disk``.

One server has two exports: one in the page cache, one on a disk each read of which takes a while, dropped
from the page cache (posix_fadvise, DONTNEED). How long reads of the first take, one at a time, alone and
while nbdcopy reads the second; and the same by a server that sends without asking what is in memory.

The disk is nbdkit's delay filter under nbdfuse: the kernel's page cache over a device that is slow. Or give
a file on a disk that is slow by other means, such as a cgroup's limit.
"""

from __future__ import annotations

import argparse
import os
import random
import socket
import statistics
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from unittest import mock

from benchmarks.machine import machine
from erofs_twisted.nbd.wire import GREETING, Option
from tests import nbd_serve
from tests.nbd_client import client_flags, option, read
from tests.nbd_tools import Served, tool
from tests.slow_disk import SlowDisk, drop

MIB = 1 << 20
SLOW_SIZE = 128 * MIB
CACHED_SIZE = 64 * MIB
SIZES = (4 << 10, 128 << 10)


class Server(Served):
    """Ours. Without ``asks`` it takes all that it sends for being in memory."""

    def __init__(self, *files: str, asks: bool) -> None:
        super().__init__(*files)
        self._asks = asks

    def command(self) -> list[str]:
        how = [] if self._asks else ["--without-asking"]
        return [sys.executable, "-m", "benchmarks.slow_disk", "--serve", self.socket, *how, *self.files]


class AllInMemory:
    """In place of `erofs_twisted.nbd.residency.Residency`."""

    def __init__(self, fd: int) -> None:
        self.fd = fd

    def covers(self, offset: int, length: int) -> bool:
        return True

    def close(self) -> None:
        self.fd = -1


class Client:
    """Reads an export, one range at a time."""

    def __init__(self, path: str, export: str) -> None:
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._socket.connect(path)
        self._receive(GREETING.size)
        self._socket.sendall(client_flags() + option(Option.EXPORT_NAME, export.encode()))
        (self.size, _) = struct.unpack(">QH", self._receive(10))

    def seconds(self, length: int) -> float:
        """For a read of ``length`` bytes anywhere."""
        request = read(random.randrange(self.size // length) * length, length)
        began = time.perf_counter()
        self._socket.sendall(request)
        self._receive(16 + length)
        return time.perf_counter() - began

    def close(self) -> None:
        self._socket.close()

    def _receive(self, length: int) -> bytes:
        taken = bytearray()
        while len(taken) < length:
            piece = self._socket.recv(length - len(taken))
            if not piece:
                raise ConnectionError("the server has closed the connection")
            taken += piece
        return bytes(taken)


def latencies(path: str, length: int, seconds: float) -> list[float]:
    """Of reads of the cached export, one after the other for so many seconds."""
    client = Client(path, "cached")
    end = time.perf_counter() + seconds
    found = []
    while time.perf_counter() < end:
        found.append(client.seconds(length))
    client.close()
    return found


@contextmanager
def slow_reads(server: Served, slow: str) -> Iterator[None]:
    """Somebody copies the slow export meanwhile, from the disk."""
    drop(slow)
    command = [tool("nbdcopy"), "--connections=1", "--request-size=131072", "--requests=64"]
    copying = subprocess.Popen([*command, server.uri("slow"), "null:"], stderr=subprocess.DEVNULL)
    try:
        time.sleep(0.5)
        yield
        if copying.poll() is not None:
            raise RuntimeError("all of the slow disk has been read: it is too fast, or too small")
    finally:
        copying.kill()
        copying.wait()


def row(what: str, found: list[float]) -> str:
    ordered = sorted(found)
    figures = [statistics.median(ordered), ordered[int(len(ordered) * 0.99)], ordered[-1]]
    return f"  {what:42} {len(found):7} " + " ".join(f"{each * 1e3:9.2f}" for each in figures)


def measure(slow: str, cached: str, seconds: float) -> None:
    files = (f"cached={cached}", f"slow={slow}")
    with Server(*files, asks=True) as asking, Server(*files, asks=False) as trusting:
        for length in SIZES:
            print(f"{length >> 10} KiB")
            print(row("alone", latencies(asking.socket, length, seconds)), flush=True)
            with slow_reads(asking, slow):
                print(row("beside slow reads", latencies(asking.socket, length, seconds)), flush=True)
            with slow_reads(trusting, slow):
                print(row("beside slow reads, nothing asked", latencies(trusting.socket, length, seconds)))


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--seconds", type=float, default=3.0, help="for each figure (default: 3)")
    parser.add_argument("--delay", type=float, default=50.0, help="of the disk, in ms (default: 50)")
    parser.add_argument("--slow", metavar="FILE", help="on a disk that is slow by itself")
    parser.add_argument("--serve", metavar="SOCKET", help=argparse.SUPPRESS)
    parser.add_argument("--without-asking", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("files", nargs="*", help=argparse.SUPPRESS)
    asked = parser.parse_args(arguments)
    if asked.serve and asked.without_asking:
        with mock.patch("erofs_twisted.nbd.pages.Residency", AllInMemory):
            nbd_serve.main(asked.serve, *asked.files)
        return
    if asked.serve:
        nbd_serve.main(asked.serve, *asked.files)
        return
    disk = f"with {asked.slow} on it" if asked.slow else f"whose reads take {asked.delay:.0f} ms"
    print(f"cached reads beside a disk {disk}, on {machine()}\n")
    print(f"  {'one read at a time':42} {'reads':>7} {'p50, ms':>9} {'p99, ms':>9} {'max, ms':>9}")
    with ExitStack() as stack:
        cached = Path(stack.enter_context(tempfile.TemporaryDirectory()), "cached")
        cached.write_bytes(os.urandom(CACHED_SIZE))
        slow = asked.slow or stack.enter_context(SlowDisk(os.urandom(SLOW_SIZE), asked.delay / 1000)).path
        measure(slow, str(cached), asked.seconds)


if __name__ == "__main__":
    main()
