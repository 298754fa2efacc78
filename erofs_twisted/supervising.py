"""A parent that starts the daemon anew when it is killed, and at once: it has imported all that one needs."""

from __future__ import annotations

import gc
import importlib
import os
import signal
import socket
import sys
import time
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import NoReturn

import attrs

from erofs_twisted.handover import make_line
from erofs_twisted.process import AGAIN, begin_anew, begun_anew

NEEDED = (
    "erofs_twisted.registry.client",
    "erofs_twisted.registry.layout",
    "erofs_twisted.registry.logins",
    "erofs_twisted.registry.tls",
    "twisted.internet.epollreactor",
)
"""Beside the service's own module: what it would import only when it is needed."""
FORWARDED = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
HANDLED = (*FORWARDED, signal.SIGUSR2)
SHORT = 1.0
"""Seconds: a daemon that lived for less died of something that is there yet."""
FIRST_PAUSE, LONGEST_PAUSE = 0.1, 5.0
"""Seconds before the next one, then, and twice as many each time."""


def supervise(service: str, pidfile: str) -> tuple[socket.socket | None, socket.socket]:
    """Fork the daemon, whose module ``service`` is, and fork it again as often as it dies by a signal.

    Returns in the daemon, with its ends of the lines to the daemon before it and to the one after it (see
    `erofs_twisted.handover`). The parent ends with the status of the daemon that ended by itself, and passes
    signals to stop on. At SIGUSR2 it begins anew, as the program that is installed now, and forks the next
    daemon, beside the one that there is until that has given it all it has. ``pidfile`` has the parent's
    number; '' is none.

    There must be no reactor yet, which could not be shared, and no thread.
    """
    for name in (service, *NEEDED):
        importlib.import_module(name)
    assert "twisted.internet.reactor" not in sys.modules
    # So that collections, here and there, leave in common what was made so far.
    gc.freeze()
    if pidfile:
        Path(pidfile).write_text(f"{os.getpid()}")
    return _Supervisor(pidfile).run(begun_anew())


@attrs.define
class _Daemon:
    """``line`` is the end that the daemon after this one is to have."""

    pid: int
    line: socket.socket
    began: float = attrs.field(factory=time.monotonic)


@attrs.define
class _Supervisor:
    _pidfile: str
    _daemon: _Daemon | None = None
    _next: _Daemon | None = None
    """One that is to take over from the daemon that there is."""
    _is_stopping: bool = False
    _pause: float = FIRST_PAUSE

    def run(self, before: tuple[int, socket.socket] | None) -> tuple[socket.socket | None, socket.socket]:
        """Returns in a child, with its lines. ``before`` is the daemon that is there, its line too."""
        if before is not None:
            self._daemon = _Daemon(*before)
        line = None if before is None else before[1]
        while True:
            child = self._fork()
            if isinstance(child, socket.socket):
                return line, child
            if self._daemon is None:
                self._daemon = child
                if line is not None:
                    line.close()
            else:
                self._next = child
            self._begin()
            while (ended := self._wait()) is None:
                pass
            line = ended.line

    def _wait(self) -> _Daemon | None:
        """Until a child has ended: the daemon, if the next one is to be forked now."""
        assert self._daemon is not None
        pid, status = os.wait()
        code = os.waitstatus_to_exitcode(status)
        if self._next is not None and pid == self._next.pid:
            self._give_up_next(code)
        if pid != self._daemon.pid:
            return None
        ended, self._daemon = self._daemon, self._next
        is_followed = self._next is not None
        if code >= 0 and code != AGAIN:
            self._end_next()
            self._leave(code)
        if is_followed:
            # The next one has all, or finds out that it has to look for itself.
            self._next = None
            ended.line.close()
            return None
        if self._is_stopping:
            self._leave(0 if code == AGAIN else 128 - code)
        if code != AGAIN:
            self._pause_after(ended, -code)
        return ended

    def _fork(self) -> _Daemon | socket.socket:
        """The child; in that, its end of the line to the daemon after it."""
        signal.pthread_sigmask(signal.SIG_BLOCK, HANDLED)
        after, ours = make_line()
        pid = os.fork()
        if pid:
            after.close()
            return _Daemon(pid, ours)
        ours.close()
        for number in HANDLED:
            signal.signal(number, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, HANDLED)
        return after

    def _begin(self) -> None:
        """To take signals, which were blocked until it is known which child there is to pass them on to."""
        for number in FORWARDED:
            signal.signal(number, self._forward)
        signal.signal(signal.SIGUSR2, self._hand_over)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, HANDLED)

    def _forward(self, number: int, frame: FrameType | None) -> None:
        self._is_stopping = True
        for child in (self._daemon, self._next):
            if child is not None:
                _kill(child, number)

    def _hand_over(self, number: int, frame: FrameType | None) -> None:
        """To this very process, with what is installed now in it; the daemon goes on meanwhile."""
        if self._daemon is None or self._next is not None or self._is_stopping:
            return
        signal.pthread_sigmask(signal.SIG_BLOCK, HANDLED)
        self._remove_pidfile()
        begin_anew(self._daemon.pid, self._daemon.line)

    def _give_up_next(self, code: int) -> None:
        assert self._next is not None
        if not self._is_stopping:
            _say(
                f"the next daemon (process {self._next.pid}) {_how(code)} before it had taken over; the one "
                "before goes on"
            )
        self._next.line.close()
        self._next = None

    def _end_next(self) -> None:
        """There is nothing to take over: the daemon has ended by itself."""
        if self._next is not None:
            _kill(self._next, signal.SIGTERM)
            os.waitpid(self._next.pid, 0)

    def _pause_after(self, ended: _Daemon, number: int) -> None:
        lived = time.monotonic() - ended.began
        self._pause = FIRST_PAUSE if lived >= SHORT else min(2 * self._pause, LONGEST_PAUSE)
        pause = 0.0 if lived >= SHORT else self._pause
        when = f"in {pause:.1f} s" if pause else "at once"
        _say(f"the daemon (process {ended.pid}) {_how(-number)}; the next one comes {when}")
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


def _kill(child: _Daemon, number: int) -> None:
    with suppress(ProcessLookupError):  # it has ended, and that is about to be noticed
        os.kill(child.pid, number)


def _how(code: int) -> str:
    return f"died of {signal.Signals(-code).name}" if code < 0 else f"ended with status {code}"


def _say(text: str) -> None:
    print(f"erofs-nbd: {text}", file=sys.stderr, flush=True)
