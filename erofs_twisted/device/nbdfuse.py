"""nbdfuse(1), which shows an NBD server's export as one file."""

from __future__ import annotations

import contextlib
import shutil
from typing import Any

from twisted.internet.defer import Deferred, TimeoutError
from twisted.internet.error import ProcessExitedAlready
from twisted.internet.protocol import ProcessProtocol
from twisted.logger import Logger
from twisted.python.failure import Failure

from erofs_twisted.errors import MountError

PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
PACKAGES = {"nbdfuse": "libnbd-bin", "setsid": "util-linux"}
READY = 3
"""The descriptor on which nbdfuse writes its process number, as to a pidfile, when the file is there."""

PATIENCE = 5.0
"""Seconds that nbdfuse has to end, before it is told again and more firmly."""

LINE_LIMIT = 4096


def missing_programs() -> list[str]:
    """What has to be installed, as ``PROGRAM (Debian: PACKAGE)``."""
    return [f"{name} (Debian: {package})" for name, package in PACKAGES.items() if _find(name) is None]


class NBDFuse(ProcessProtocol):
    """One nbdfuse process. ``ready`` fires with None when the file is there, or fails with `MountError`."""

    log = Logger()

    def __init__(self, reactor: Any) -> None:
        self.ready: Deferred[None] = Deferred()
        self._reactor = reactor
        self._output = b""
        self._last_words = ""
        self._has_ended = False
        self._waiting: list[Deferred[None]] = []

    def start(self, socket: str, file: str) -> None:
        """Show the default export of the server on the UNIX socket ``socket`` over ``file``, an existing
        file."""
        # A session of its own: the terminal's Ctrl-C is for the daemon alone, which unmounts first.
        command = [_find("setsid") or "setsid", _find("nbdfuse") or "nbdfuse"]
        command += ["--readonly", "--pidfile", f"/proc/self/fd/{READY}", file, "--unix", socket]
        self._reactor.spawnProcess(
            self,
            command[0],
            command,
            env={"PATH": PATH, "LC_ALL": "C"},
            path="/",
            childFDs={0: "w", 1: "r", 2: "r", READY: "r"},
        )

    def when_ended(self) -> Deferred[None]:
        """A Deferred that fires with None when the process has ended; for each caller one of its own."""
        waiter: Deferred[None] = Deferred(self._waiting.remove)
        self._waiting.append(waiter)
        if self._has_ended:
            self._tell_waiting()
        return waiter

    async def end(self) -> None:
        """Wait for the process to end, as it does when its file is unmounted; else terminate it, else kill
        it."""
        for signal in ("TERM", "KILL", None):
            try:
                await self.when_ended().addTimeout(PATIENCE, self._reactor)
                return
            except TimeoutError:
                if signal is not None:
                    self.log.warn("nbdfuse does not end: sending SIG{signal}", signal=signal)
                    self._signal(signal)
        raise MountError(f"nbdfuse does not end; its last words: {self._last_words or 'none'}")

    def connectionMade(self) -> None:
        self.transport.closeChildFD(0)  # type: ignore[union-attr]

    def childDataReceived(self, childFD: int, data: bytes) -> None:
        if childFD == READY:
            if not self.ready.called:
                self.ready.callback(None)
            return
        *lines, self._output = (self._output + data)[-LINE_LIMIT:].split(b"\n")
        for line in lines:
            self._last_words = line.decode("utf-8", "replace")
            self.log.info("{line}", line=self._last_words)

    def processEnded(self, reason: Failure) -> None:
        self._has_ended = True
        if not self.ready.called:
            words = self._last_words or reason.getErrorMessage()
            self.ready.errback(MountError(f"nbdfuse does not show the image as a file: {words}"))
        self._tell_waiting()

    def _tell_waiting(self) -> None:
        waiting, self._waiting = self._waiting, []
        for waiter in waiting:
            waiter.callback(None)

    def _signal(self, name: str) -> None:
        with contextlib.suppress(ProcessExitedAlready):
            self.transport.signalProcess(name)  # type: ignore[union-attr]


def _find(program: str) -> str | None:
    return shutil.which(program, path=PATH)
