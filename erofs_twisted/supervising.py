"""A parent that starts the daemon anew when it is killed, and at once: it has imported all that one needs."""

from __future__ import annotations

import gc
import importlib
import os
import signal
import sys
import time
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import NoReturn

import attrs

from erofs_twisted.process import AGAIN, begin_anew

NEEDED = (
    "erofs_twisted.registry.client",
    "erofs_twisted.registry.layout",
    "erofs_twisted.registry.logins",
    "twisted.internet.epollreactor",
)
"""Beside the service's own module: what it would import only when it is needed."""
FORWARDED = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
HANDLED = (*FORWARDED, signal.SIGUSR2)
HANDED_OVER = "EROFS_NBD_DAEMON"
"""In the environment of a parent that has begun anew: the process of the daemon."""
SHORT = 1.0
"""Seconds: a daemon that lived for less died of something that is there yet."""
FIRST_PAUSE, LONGEST_PAUSE = 0.1, 5.0
"""Seconds before the next one, then, and twice as many each time."""


def supervise(service: str, pidfile: str) -> None:
    """Fork the daemon, whose module ``service`` is, and fork it again as often as it dies by a signal.

    Returns in the daemon. The parent ends with the status of the one that ended by itself, and passes signals
    to stop on. At SIGUSR2 it begins anew, as the program that is installed now, and tells the daemon to leave
    when it can fork the next one. ``pidfile`` has the parent's number; '' is none.

    There must be no reactor yet, which could not be shared, and no thread.
    """
    for name in (service, *NEEDED):
        importlib.import_module(name)
    assert "twisted.internet.reactor" not in sys.modules
    # So that collections, here and there, leave in common what was made so far.
    gc.freeze()
    if pidfile:
        Path(pidfile).write_text(f"{os.getpid()}")
    _Supervisor(pidfile, int(os.environ.pop(HANDED_OVER, "0"))).run()


@attrs.define
class _Supervisor:
    _pidfile: str
    _child: int
    _is_stopping: bool = False
    _pause: float = FIRST_PAUSE

    def run(self) -> None:
        """Returns in the child."""
        while True:
            began = time.monotonic()
            if self._child:
                self._begin()
                self._pass_on(signal.SIGUSR2, None)
            elif self._fork():
                return
            status = os.waitstatus_to_exitcode(os.waitpid(self._child, 0)[1])
            ended, self._child = self._child, 0
            if status == AGAIN and not self._is_stopping:
                continue
            if status >= 0 or self._is_stopping:
                self._leave(status if status >= 0 else 128 - status)
            self._pause_after(ended, time.monotonic() - began, -status)

    def _fork(self) -> bool:
        """True in the child."""
        signal.pthread_sigmask(signal.SIG_BLOCK, HANDLED)
        parent = os.getpid()
        self._child = os.fork()
        if self._child:
            self._begin()
            return False
        for number in HANDLED:
            signal.signal(number, signal.SIG_DFL)
        if os.environ.get("LISTEN_PID") == str(parent):
            os.environ["LISTEN_PID"] = str(os.getpid())
        signal.pthread_sigmask(signal.SIG_UNBLOCK, HANDLED)
        return True

    def _begin(self) -> None:
        """To take signals, which were blocked until there is a child to pass them on to."""
        for number in FORWARDED:
            signal.signal(number, self._forward)
        signal.signal(signal.SIGUSR2, self._hand_over)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, HANDLED)

    def _forward(self, number: int, frame: FrameType | None) -> None:
        self._is_stopping = True
        self._pass_on(number, frame)

    def _pass_on(self, number: int, frame: FrameType | None) -> None:
        if not self._child:
            return
        with suppress(ProcessLookupError):  # it has ended, and that is about to be noticed
            os.kill(self._child, number)

    def _hand_over(self, number: int, frame: FrameType | None) -> None:
        """To this very process, with what is installed now in it; the daemon goes on meanwhile."""
        signal.pthread_sigmask(signal.SIG_BLOCK, HANDLED)
        os.environ[HANDED_OVER] = str(self._child)
        self._remove_pidfile()
        begin_anew()

    def _pause_after(self, pid: int, lived: float, number: int) -> None:
        self._pause = FIRST_PAUSE if lived >= SHORT else min(2 * self._pause, LONGEST_PAUSE)
        pause = 0.0 if lived >= SHORT else self._pause
        name = signal.Signals(number).name
        print(
            f"erofs-nbd: the daemon (process {pid}) died of {name}; the next one comes "
            + (f"in {pause:.1f} s" if pause else "at once"),
            file=sys.stderr,
            flush=True,
        )
        time.sleep(pause)
        if self._is_stopping:
            self._leave(128 + number)

    def _leave(self, status: int) -> NoReturn:
        self._remove_pidfile()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)

    def _remove_pidfile(self) -> None:
        if self._pidfile:
            Path(self._pidfile).unlink(missing_ok=True)
