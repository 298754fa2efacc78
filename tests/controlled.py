"""One ``twistd erofs-nbd`` that mounts what it is asked for, with a directory of its own."""

from __future__ import annotations

import http.client
import json
import os
import signal
import socket
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import attrs

from tests.processes import BIN, PATIENCE, run, until
from tests.warm import Forked, begin, warm_run


class _Connection(http.client.HTTPConnection):
    def __init__(self, path: Path) -> None:
        super().__init__("localhost", timeout=PATIENCE)
        self._socket = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(self.timeout)
        self.sock.connect(str(self._socket))


@attrs.define(eq=False)
class Controlled:
    """``options`` are those of all its mounts. It runs in the foreground, its log in a file."""

    directory: Path
    options: tuple[str, ...] = ()
    environment: Mapping[str, str] = attrs.field(factory=dict)
    under: tuple[str, ...] = ()
    """A program that starts it, such as prlimit."""
    is_quick: bool = False
    """Do the commands that talk to it begin without the time that imports take?"""
    is_warm: bool = False
    """Does it itself?"""
    _process: subprocess.Popen[bytes] | Forked | None = attrs.field(init=False, default=None)

    @property
    def state_dir(self) -> Path:
        return self.directory / "state"

    @property
    def socket(self) -> Path:
        return self.state_dir / "control"

    @property
    def log(self) -> str:
        path = self.directory / "log"
        return path.read_text(errors="replace") if path.exists() else ""

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    def start(self) -> None:
        """Start it, and wait until it listens."""
        self.directory.mkdir(exist_ok=True)
        log = self.directory / "log"
        twistd = [*self.under, BIN / "twistd", "-n", "--pidfile=", f"--logfile={log}", "erofs-nbd"]
        directories = ("--state-dir", str(self.state_dir), "--cache-dir", str(self.directory / "cache"))
        command = [*twistd, *directories, *self.options]
        said = self.log.count("listening on")
        assert not (self.is_warm and self.under)
        environment = {**os.environ, **self.environment}
        self._process = begin(command, is_warm=self.is_warm, cwd=self.directory, env=environment)
        until("the daemon listens", lambda: self._listens(said))

    def _listens(self, said: int) -> bool:
        assert self._process is not None
        if self._process.poll() is not None:
            raise AssertionError(f"it ended with status {self._process.returncode}:\n{self.log}")
        return self.log.count("listening on") > said

    def mountpoint(self, name: str) -> Path:
        path = self.directory / name
        path.mkdir(exist_ok=True)
        return path

    def erofs_nbd(self, command: str, *words: str | Path, **how: Any) -> subprocess.CompletedProcess[str]:
        """A command that talks to it."""
        line = (BIN / "erofs-nbd", command, *words, "--state-dir", self.state_dir)
        return warm_run(*line, cwd=self.directory) if self.is_quick and not how else run(*line, **how)

    def mount(self, image: str, name: str, *options: str) -> Path:
        """An image that is mounted when this returns."""
        path = self.mountpoint(name)
        done = self.erofs_nbd("mount", image, path, *options)
        if done.returncode != 0:
            raise AssertionError(f"{done.stderr}\n{self.log}")
        return path

    def call(self, method: str, where: str, body: bytes | None = None) -> tuple[int, Any]:
        """A call by hand: status and answer."""
        connection = self.begin_call(method, where, body)
        try:
            response = connection.getresponse()
            return response.status, json.loads(response.read())
        finally:
            connection.close()

    def begin_call(self, method: str, where: str, body: bytes | None = None) -> http.client.HTTPConnection:
        """A call whose answer is still to be had."""
        connection = _Connection(self.socket)
        try:
            connection.request(method, where, body)
        except BaseException:
            connection.close()
            raise
        return connection

    def signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def ended(self) -> int:
        """Its exit status, once it has ended."""
        assert self._process is not None
        return self._process.wait(PATIENCE)

    def stop(self) -> int:
        """Have it unmount all and end."""
        self.signal(signal.SIGTERM)
        return self.ended()

    def kill(self) -> None:
        """Without any chance to do anything, if it still runs."""
        if self._process is not None and self._process.poll() is None:
            self.signal(signal.SIGKILL)
            self._process.wait()
