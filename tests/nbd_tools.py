"""Other people's NBD programs, and two servers to point them at: ours, and nbdkit's file plugin."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import TracebackType
from typing import IO, Self

PACKAGES = {
    "nbdcopy": "libnbd-bin",
    "nbdinfo": "libnbd-bin",
    "nbdfuse": "libnbd-bin",
    "fusermount3": "fuse3",
    "nbdkit": "nbdkit",
    "nbd-client": "nbd-client",
    "qemu-img": "qemu-utils",
    "qemu-io": "qemu-utils",
}
ROOT = Path(__file__).parents[1]
SYSTEM_PYTHON = "/usr/bin/python3"
"""The one for which Debian builds libnbd's binding."""

READY_SECONDS = 60.0
PATIENCE = 120.0


def tool(name: str) -> str:
    """Where a program is; a RuntimeError says which package has it."""
    path = shutil.which(name, path=os.environ.get("PATH", "") + ":/usr/sbin:/sbin")
    if path is None:
        raise RuntimeError(f"{name} is missing: apt-get install {PACKAGES[name]}")
    return path


def run(name: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run a program to its end, whatever that is."""
    return subprocess.run(
        [tool(name), *arguments], stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=PATIENCE
    )


def output(name: str, *arguments: str) -> str:
    """What a program prints, which must succeed."""
    done = run(name, *arguments)
    if done.returncode:
        raise AssertionError(f"{name} {arguments} exits with {done.returncode}:\n{done.stdout}{done.stderr}")
    return done.stdout


def libnbd(script: Path, *arguments: str) -> str:
    """What a script prints that uses libnbd's binding, which must succeed."""
    if subprocess.run([SYSTEM_PYTHON, "-c", "import nbd"], capture_output=True).returncode:
        raise RuntimeError("libnbd's Python binding is missing: apt-get install python3-libnbd")
    done = subprocess.run(
        [SYSTEM_PYTHON, str(script), *arguments], capture_output=True, text=True, timeout=PATIENCE
    )
    if done.returncode:
        raise AssertionError(f"{script.name} exits with {done.returncode}:\n{done.stdout}{done.stderr}")
    return done.stdout


class Served:
    """A server process on a UNIX socket, for as long as a ``with`` block lasts."""

    def __init__(self, *files: str) -> None:
        self.files = files

    def command(self) -> list[str]:
        raise NotImplementedError

    def uri(self, name: str = "") -> str:
        return f"nbd+unix:///{name}?socket={self.socket}"

    @property
    def log(self) -> str:
        return (self.directory / "log").read_text(errors="replace")

    @property
    def pid(self) -> int:
        return self._process.pid

    def __enter__(self) -> Self:
        self.directory = Path(tempfile.mkdtemp(prefix="erofs-twisted-test-"))
        self.socket = str(self.directory / "nbd.sock")
        with (self.directory / "log").open("wb") as log:
            self._process = self._start(log)
        deadline = time.monotonic() + READY_SECONDS
        while not self._answers():
            if self._process.poll() is not None or time.monotonic() > deadline:
                log_text = self.log
                self.__exit__(None, None, None)
                raise RuntimeError(f"{self.command()} does not start:\n{log_text}")
            time.sleep(0.02)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._process.send_signal(signal.SIGTERM)
        try:
            self._process.wait(10)
        finally:
            self._process.kill()
            self._process.wait()
            shutil.rmtree(self.directory)

    def _start(self, log: IO[bytes]) -> subprocess.Popen[bytes]:
        return subprocess.Popen(self.command(), stdin=subprocess.DEVNULL, stdout=log, stderr=log, cwd=ROOT)

    def _answers(self) -> bool:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
            try:
                probe.connect(self.socket)
            except OSError:
                return False
            return True


class Ours(Served):
    """Each of ``files`` is ``[NAME=]PATH``."""

    def command(self) -> list[str]:
        return [sys.executable, "-m", "tests.nbd_serve", self.socket, *self.files]


class Nbdkit(Served):
    """nbdkit's file plugin, read-only, the oracle."""

    def command(self) -> list[str]:
        return [tool("nbdkit"), "--foreground", "--readonly", "--unix", self.socket, "file", *self.files]
