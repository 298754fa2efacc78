"""nbdfuse(1), which shows an NBD server's export as one file."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
from collections.abc import Callable, Mapping
from typing import Any

from twisted.internet.abstract import FileDescriptor
from twisted.internet.defer import Deferred, TimeoutError
from twisted.internet.error import ProcessExitedAlready
from twisted.internet.main import CONNECTION_DONE
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
PROCESS, OUTPUTS = "process", ("stdout", "stderr")
"""What there is of one that another process has started: a pidfd (pidfd_open(2)), and its output."""


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
        self._adopted: dict[str, _Reader] = {}
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

    def go_on(self, files: Mapping[str, int]) -> None:
        """Watch one that another process has started, and whose `files` those are."""
        self.ready.callback(None)
        self._adopted[PROCESS] = _Reader(self._reactor, files[PROCESS], self._adopted_ended)
        for name in OUTPUTS:
            self._adopted[name] = _Reader(self._reactor, files[name], self._read_output(files[name]))

    def files(self) -> dict[str, int]:
        """What another process has to have open to `go_on` with this one. Raises `MountError`."""
        if self._adopted:
            if self._has_ended:
                raise MountError("nbdfuse has ended, and cannot be handed over")
            return {name: reader.fileno() for name, reader in self._adopted.items()}
        transport: Any = self.transport
        try:
            process = os.pidfd_open(transport.pid)
        except OSError as error:
            raise MountError(f"nbdfuse cannot be handed over: {error.strerror}") from error
        outputs = {name: transport.pipes[number].fd for number, name in enumerate(OUTPUTS, 1)}
        return {PROCESS: process, **outputs}

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
        for name in ("TERM", "KILL", None):
            try:
                await self.when_ended().addTimeout(PATIENCE, self._reactor)
                return
            except TimeoutError:
                if name is not None:
                    self.log.warn("nbdfuse does not end: sending SIG{signal}", signal=name)
                    self._signal(name)
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

    def _adopted_ended(self) -> bool:
        with contextlib.suppress(ChildProcessError):  # whose child it is depends on what became of its parent
            os.waitid(os.P_PIDFD, self._adopted[PROCESS].fileno(), os.WEXITED | os.WNOHANG)
        self._has_ended = True
        self._tell_waiting()
        return False

    def _read_output(self, descriptor: int) -> Callable[[], bool]:
        def read() -> bool:
            data = os.read(descriptor, LINE_LIMIT)
            self.childDataReceived(descriptor, data)
            return bool(data)

        return read

    def _signal(self, name: str) -> None:
        if self._adopted:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._adopted[PROCESS].fileno(), signal.Signals[f"SIG{name}"])
            return
        with contextlib.suppress(ProcessExitedAlready):
            self.transport.signalProcess(name)  # type: ignore[union-attr]


class _Reader(FileDescriptor):
    """Calls ``readable`` when there is something to read, until that returns False; then it closes the
    descriptor."""

    def __init__(self, reactor: Any, descriptor: int, readable: Callable[[], bool]) -> None:
        super().__init__(reactor)
        self._descriptor = descriptor
        self._readable = readable
        self.connected = 1
        self.startReading()  # type: ignore[no-untyped-call]

    def fileno(self) -> int:
        return self._descriptor

    def doRead(self) -> Exception | None:
        return None if self._readable() else CONNECTION_DONE

    def connectionLost(self, reason: Failure) -> None:
        super().connectionLost(reason)  # type: ignore[no-untyped-call]
        os.close(self._descriptor)
        self._descriptor = -1


def _find(program: str) -> str | None:
    return shutil.which(program, path=PATH)
