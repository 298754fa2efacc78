"""A daemon that mounts an image with nothing cached, and the moments of its start."""

from __future__ import annotations

import os
import select
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

import attrs

from benchmarks.profiling import profiling
from benchmarks.timedlog import STARTING_UP

PROJECT = Path(__file__).resolve().parents[1]
BIN = Path(sys.executable).parent
PATIENCE = 120.0
LINE = "import json, asyncio, sqlite3; print('ready')"


class NotMounted(Exception):
    """The daemon has ended, or took too long."""


@attrs.define(eq=False)
class Lazy:
    """One ``twistd erofs-nbd``, mounted for as long as a ``with`` block lasts, below a new ``directory``."""

    directory: Path
    image: str
    options: Sequence[str] = ()
    cache: Path | None = None
    """The default is an empty one, which goes with the mount."""
    called: float = attrs.field(init=False, default=0.0)
    """When the command was, by time.time()."""
    _process: subprocess.Popen[bytes] = attrs.field(init=False)

    @property
    def mountpoint(self) -> Path:
        return self.directory / "mnt"

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def log(self) -> str:
        path = self.directory / "log"
        return path.read_text(errors="replace") if path.exists() else ""

    @property
    def began(self) -> float:
        """When the start-up of the daemon did, after all that it takes to import it."""
        return next(float(line.split()[0]) for line in self.log.splitlines() if line.endswith(STARTING_UP))

    def command(self) -> list[str]:
        command = [
            *(str(BIN / "twistd"), "-n", f"--pidfile={self.directory}/pid"),
            *("--logger=benchmarks.timedlog.to_file", "erofs-nbd", "--mkdir"),
            *(f"--image={self.image}", f"--mountpoint={self.mountpoint}"),
            *(f"--state-dir={self.directory}/state", f"--cache-dir={self.cache or self.directory / 'cache'}"),
        ]
        return profiling.command([*command, *self.options])

    def __enter__(self) -> Self:
        self.directory.mkdir(parents=True)
        environment = {**os.environ, "BENCHMARK_LOG": str(self.directory / "log"), "PYTHONPATH": str(PROJECT)}
        self.called = time.time()
        with (self.directory / "errors").open("wb") as errors:
            self._process = subprocess.Popen(
                self.command(),
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=errors,
            )
        try:
            self._until_mounted()
        except BaseException:
            self._end()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end()
        shutil.rmtree(self.directory)

    def _until_mounted(self) -> None:
        wanted = f" {self.mountpoint} "
        deadline = time.monotonic() + PATIENCE
        with open("/proc/self/mountinfo") as mounts:
            change = select.poll()
            change.register(mounts, select.POLLPRI)
            while wanted not in mounts.read():
                if self._process.poll() is not None or time.monotonic() > deadline:
                    raise NotMounted(f"{self.image}:\n{self.log}{(self.directory / 'errors').read_text()}")
                change.poll(50)
                mounts.seek(0)

    def _end(self) -> None:
        self._process.send_signal(signal.SIGTERM)
        try:
            self._process.wait(PATIENCE)
        finally:
            self._process.kill()
            self._process.wait()


def find(root: Path) -> None:
    """Look at every name below a directory."""
    subprocess.run(["find", str(root), "-size", "-1k", "-false"], check=True, timeout=PATIENCE)


def python_line(root: Path) -> None:
    """Run the line in the Python of an image, as a container starts."""
    command = ["chroot", str(root), "/usr/bin/python3", "-c", LINE]
    done = subprocess.run(
        command,
        check=True,
        timeout=PATIENCE,
        stdout=subprocess.PIPE,
        env={"PATH": os.defpath + ":/usr/sbin:/sbin"},
    )
    if done.stdout != b"ready\n":
        raise AssertionError(done.stdout)


def tar(root: Path) -> None:
    """Read every file. GNU tar reads none when its archive is /dev/null, so it shall see a pipe."""
    command = ["bash", "-c", 'set -o pipefail; tar -C "$0" -cf - . | cat >/dev/null', str(root)]
    subprocess.run(command, check=True, timeout=PATIENCE)
