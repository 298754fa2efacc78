"""A daemon with as many mounts as it is asked for, as a Twisted service."""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import sdnotify
from twisted.application.service import Service
from twisted.internet.defer import Deferred, maybeDeferred
from twisted.logger import Logger, globalLogPublisher

from erofs_twisted.control import SOCKET
from erofs_twisted.control.server import site
from erofs_twisted.errors import ErofsTwistedError
from erofs_twisted.handover import Handover
from erofs_twisted.mounts import Mounts
from erofs_twisted.ownerport import OwnerPort
from erofs_twisted.process import ExitStatus, on_stop_signal, resume_collections
from erofs_twisted.recentlines import RecentLines
from erofs_twisted.succession import Legacy, Succession
from erofs_twisted.watchdog import Watchdog


class MountsService(Service):
    """Mounts what is asked for on a control socket, until told to stop; first of all what an earlier one had.

    ``defaults`` are options for all mounts. The socket is in ``state_dir``, or ``inherited`` is one that
    somebody else has made, and listens already.
    """

    log = Logger()

    def __init__(
        self,
        reactor: Any,
        defaults: Mapping[str, str | bool],
        state_dir: Path,
        exit_status: ExitStatus,
        inherited: socket.socket | None = None,
        legacy: Legacy | None = None,
    ) -> None:
        self._reactor = reactor
        self._defaults = defaults
        self._state_dir = state_dir
        self._exit_status = exit_status
        self._inherited = inherited
        self._succession = Succession(reactor, exit_status, legacy or Legacy())
        self._is_stopping = False
        self._notify = sdnotify.SystemdNotifier().notify
        self._mounts: Mounts | None = None
        self._watchdog: Watchdog | None = None
        self._ending: Deferred[None] | None = None

    def startService(self) -> None:
        super().startService()  # type: ignore[no-untyped-call]
        on_stop_signal(self._reactor, self.request_stop)
        self._succession.watch(self._leave)
        self._reactor.callWhenRunning(lambda: Deferred.fromCoroutine(self._begin()))

    def stopService(self) -> Deferred[None] | None:
        """Where the reactor ends by another's doing: mounts in use are unmounted lazily."""
        super().stopService()  # type: ignore[no-untyped-call]
        if self._mounts is None or (self._ending is not None and self._ending.called):
            return None
        self.request_stop("the end of the reactor")
        self.request_stop("the end of the reactor")
        ended: Deferred[None] = Deferred()
        assert self._ending is not None
        _ = self._ending.addBoth(lambda _: ended.callback(None))
        return ended

    def request_stop(self, why: str) -> None:
        """Unmount all, and end then. A second request unmounts lazily what is still in use."""
        self.log.info("stopping: {why}", why=why)
        self._notify("STOPPING=1")
        self._is_stopping = True
        self._succession.cancel()
        if self._mounts is None:
            return
        if self._ending is None:
            self._ending = Deferred.fromCoroutine(self._end(self._mounts))
        else:
            _ = Deferred.fromCoroutine(self._mounts.close())

    def _leave(self) -> None:
        """End, and leave all to the next daemon."""
        if self._mounts is not None and self._ending is None:
            self._ending = Deferred.fromCoroutine(self._hand_over(self._mounts))

    async def _hand_over(self, mounts: Mounts) -> None:
        self.log.info("leaving all mounts to the program that is installed now")
        await mounts.leave()
        port = self._port.hand_over() if self._inherited is None else None
        await self._succession.give(mounts.devices.pool, Handover(os.getpid(), mounts.devices.handed, port))
        await self._finish(mounts)

    async def _begin(self) -> None:
        handover = await self._succession.take()
        if self._is_stopping and not handover.pid:
            if self.running:
                self._reactor.stop()
            return
        lines = RecentLines()
        globalLogPublisher.addObserver(lines)
        mounts = Mounts(
            self._reactor, self._defaults, self._state_dir, lines, self._succession.upgrade, handover
        )
        try:
            self._listen(mounts, handover.port)
        except (ErofsTwistedError, OSError) as error:
            self.log.critical("--state-dir {directory}: {reason}", directory=self._state_dir, reason=error)
            self._exit_status.status = 1
            self._reactor.stop()
            return
        self._mounts = mounts
        # Whatever a mount needs is in memory before there is one: none of it could be on a mount of ours.
        import erofs_twisted.registry.client  # noqa: F401

        restored = mounts.restore()
        resume_collections()
        self._watchdog = Watchdog(self._reactor, mounts.devices.pool, mounts.devices.all, self._notify)
        self._watchdog.start(os.environ)
        self._notify(f"READY=1\nSTATUS=listening on {self._state_dir / SOCKET}")
        self.log.info(
            "listening on {socket}; {count} mounts to restore",
            socket=self._state_dir / SOCKET,
            count=restored,
        )
        if self._is_stopping:
            self.request_stop("told so before")

    def _listen(self, mounts: Mounts, handed: socket.socket | None) -> None:
        listening = handed if self._inherited is None else self._inherited
        if listening is not None:
            # A duplicate: the one that was inherited stays, for what is begun anew.
            self._port = OwnerPort.adopt(
                listening, site(mounts), self._reactor, owns_file=self._inherited is None
            )
        else:
            self._state_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._port = OwnerPort(str(self._state_dir / SOCKET), site(mounts), self._reactor)
        self._port.startListening()

    async def _end(self, mounts: Mounts) -> None:
        await mounts.close()
        await self._finish(mounts)

    async def _finish(self, mounts: Mounts) -> None:
        if self._watchdog is not None:
            self._watchdog.stop()
        await mounts.stop()
        await maybeDeferred(self._port.stopListening)
        if self.running:
            self._reactor.stop()
