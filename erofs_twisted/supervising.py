"""A parent that starts the daemon anew when it is killed, and at once: it has imported all that one needs."""

from __future__ import annotations

import gc
import importlib
import os
import signal
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from types import FrameType

import attrs

from erofs_twisted.process import AGAIN, begin_anew

NEEDED = (
    "erofs_twisted.registry.client",
    "erofs_twisted.registry.layout",
    "erofs_twisted.registry.logins",
    "twisted.internet.epollreactor",
)
"""Beside the service's own module: what it would import only when it is needed."""
FORWARDED: tuple[signal.Signals, ...] = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
SHORT = 1.0
"""Seconds: a daemon that lived for less died of something that is there yet."""
FIRST_PAUSE, LONGEST_PAUSE = 0.1, 5.0
"""Seconds before the next one, then, and twice as many each time."""


def supervise(service: str) -> None:
    """Fork the daemon, whose module ``service`` is, and fork it again as often as it dies by a signal.

    Returns in the daemon. The parent ends with the status of the one that ended by itself. It passes signals
    to stop and SIGUSR2 on, and begins anew itself where the daemon ends with `AGAIN`. There must be no
    reactor yet, which could not be shared, and no thread.
    """
    for name in (service, *NEEDED):
        importlib.import_module(name)
    assert "twisted.internet.reactor" not in sys.modules
    # So that collections, here and there, leave in common what was made so far.
    gc.freeze()
    _Supervisor().run()


@attrs.define
class _Supervisor:
    _child: int = 0
    _is_stopping: bool = False
    _pause: float = FIRST_PAUSE
    _sleep: Callable[[float], object] = time.sleep

    def run(self) -> None:
        """Returns in the child."""
        while True:
            began = time.monotonic()
            if self._fork():
                return
            status = os.waitstatus_to_exitcode(self._wait())
            if status == AGAIN and not self._is_stopping:
                begin_anew()
            if status >= 0 or self._is_stopping:
                _leave(status if status >= 0 else 128 - status)
            self._pause_after(time.monotonic() - began, -status)

    def _fork(self) -> bool:
        """True in the child."""
        signal.pthread_sigmask(signal.SIG_BLOCK, FORWARDED)
        parent = os.getpid()
        self._child = os.fork()
        if self._child:
            for number in FORWARDED:
                signal.signal(number, self._forward)
            signal.signal(signal.SIGUSR2, self._pass_on)
        else:
            for number in (*FORWARDED, signal.SIGUSR2):
                signal.signal(number, signal.SIG_DFL)
            if os.environ.get("LISTEN_PID") == str(parent):
                os.environ["LISTEN_PID"] = str(os.getpid())
        signal.pthread_sigmask(signal.SIG_UNBLOCK, FORWARDED)
        return not self._child

    def _forward(self, number: int, frame: FrameType | None) -> None:
        self._is_stopping = True
        self._pass_on(number, frame)

    def _pass_on(self, number: int, frame: FrameType | None) -> None:
        with suppress(ProcessLookupError):  # it has ended, and that is about to be noticed
            os.kill(self._child, number)

    def _wait(self) -> int:
        return os.waitpid(self._child, 0)[1]

    def _pause_after(self, lived: float, number: int) -> None:
        self._pause = FIRST_PAUSE if lived >= SHORT else min(2 * self._pause, LONGEST_PAUSE)
        pause = 0.0 if lived >= SHORT else self._pause
        name = signal.Signals(number).name
        print(
            f"erofs-nbd: the daemon (process {self._child}) died of {name}; the next one comes "
            + (f"in {pause:.1f} s" if pause else "at once"),
            file=sys.stderr,
            flush=True,
        )
        self._sleep(pause)
        if self._is_stopping:
            _leave(128 + number)


def _leave(status: int) -> None:
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
