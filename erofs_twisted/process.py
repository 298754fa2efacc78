"""This process as a whole: its signals, its exit status, its command line, its garbage."""

from __future__ import annotations

import atexit
import ctypes
import gc
import os
import resource
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

import attrs

TWISTD = (sys.executable, "-P", "-c", "from twisted.scripts.twistd import run; run()")
"""The twistd of the interpreter that runs this, wherever its script may be."""


def on_upgrade_signal(reactor: Any, upgrade: Callable[[], None]) -> None:
    """Call ``upgrade`` in the reactor's thread for each SIGUSR2, once the reactor runs."""

    def received(number: int, frame: FrameType | None) -> None:
        reactor.callFromThread(upgrade)

    reactor.callWhenRunning(signal.signal, signal.SIGUSR2, received)


def run_program(command: Sequence[str]) -> tuple[int, str]:
    """Run one that starts a daemon, to its own end: its status, and what it said on either channel. It
    blocks."""
    done = subprocess.run(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd="/",
    )
    return done.returncode, done.stdout.strip()


def on_stop_signal(reactor: Any, stop: Callable[[str], None]) -> None:
    """Call ``stop`` with the signal's name, in the reactor's thread, for each SIGTERM, SIGINT and SIGHUP,
    once the reactor runs.

    Twisted's own handlers stop the reactor at once and let the process die by the signal. A mount has to be
    taken down first, and after that the end is an orderly one, with exit status 0.
    """

    def received(number: int, frame: FrameType | None) -> None:
        reactor.callFromThread(stop, signal.Signals(number).name)

    def install() -> None:
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, received)

    reactor.callWhenRunning(install)


AGAIN = 75
"""The status of a daemon that has given all it had to the next one, or to whom its parent starts now."""

BEFORE = "EROFS_NBD_BEFORE"
"""In the environment of a process that has begun anew: the daemon that it was, or whose parent it is, and the
descriptor of the line to that."""


@attrs.define
class ExitStatus:
    """The exit status of a process that ends by leaving twistd, which itself always means 0.

    With ``is_again`` it ends by beginning anew, as the program that is installed now, which has ``line`` to
    read from; where a parent supervises it, that has done so, and is told by the status `AGAIN`.
    """

    status: int = 0
    is_again: bool = False
    is_supervised: bool = False
    line: socket.socket | None = None

    def install(self) -> None:
        """Call early: exit functions run last in, first out, and this one skips those before it."""
        atexit.register(self._leave)

    def _leave(self) -> None:
        if not self.status and not self.is_again:
            return
        sys.stdout.flush()
        sys.stderr.flush()
        if self.is_again and not self.is_supervised:
            assert self.line is not None
            begin_anew(os.getpid(), self.line)
        os._exit(AGAIN if self.is_again else self.status)


def begin_anew(daemon: int, line: socket.socket) -> NoReturn:
    """Replace this process by its own command, as that is installed now: there it has `begun_anew`."""
    line.set_inheritable(True)
    os.environ[BEFORE] = f"{daemon}:{line.fileno()}"
    os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def begun_anew() -> tuple[int, socket.socket] | None:
    """The daemon before, and the line to it; None where this process has not begun anew."""
    before = os.environ.pop(BEFORE, "")
    if not before:
        return None
    daemon, descriptor = map(int, before.split(":"))
    line = socket.socket(fileno=descriptor)
    line.set_inheritable(False)
    return daemon, line


def raise_file_limit() -> None:
    """Let this process have as many files open as it may. The soft limit is for who uses select(2)."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with suppress(OSError, ValueError):  # where the hard one is above what the kernel lets anybody have
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def open_files() -> tuple[int, int]:
    """How many this process has, and how many it may have."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return len(os.listdir("/proc/self/fd")), sys.maxsize if soft == resource.RLIM_INFINITY else soft


def conceal_arguments(secrets: list[str]) -> None:
    """Overwrite secrets among this process's arguments, so that ps(1) and /proc/PID/cmdline do not show them.

    Linux keeps the arguments in the process's own memory, from ``arg_start`` to ``arg_end``
    (proc_pid_stat(5), fields 48 and 49).
    """
    if not secrets:
        return
    fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
    start, end = int(fields[45]), int(fields[46])
    arguments = ctypes.string_at(start, end - start)
    for secret in map(os.fsencode, secrets):
        found = arguments.find(secret)
        while found >= 0:
            ctypes.memset(start + found, ord("*"), len(secret))
            found = arguments.find(secret, found + len(secret))


def put_off_collections() -> None:
    """Until `resume_collections`. Imports make many objects and no garbage; to look through them all for it,
    again and again, is a good part of what they cost."""
    gc.disable()


def resume_collections() -> None:
    """Collect garbage again, of what is made from now on: modules and classes are there to stay."""
    gc.freeze()
    gc.enable()
