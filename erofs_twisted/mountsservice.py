"""A daemon with as many mounts as it is asked for, as a Twisted service."""

from __future__ import annotations

import os
import signal
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
from erofs_twisted.errors import ErofsTwistedError, MountError
from erofs_twisted.mounts import Mounts
from erofs_twisted.ownerport import OwnerPort
from erofs_twisted.process import ExitStatus, on_stop_signal, on_upgrade_signal, resume_collections
from erofs_twisted.recentlines import RecentLines
from erofs_twisted.watchdog import Watchdog


class MountsService(Service):
    """Mounts what is asked for on a control socket, until told to stop; first of all what an earlier one had.

    ``defaults`` are options for all mounts. The socket is in ``state_dir``, or ``inherited`` is the number of
    a descriptor that listens already.
    """

    log = Logger()

    def __init__(
        self,
        reactor: Any,
        defaults: Mapping[str, str | bool],
        state_dir: Path,
        exit_status: ExitStatus,
        inherited: int | None = None,
    ) -> None:
        self._reactor = reactor
        self._defaults = defaults
        self._state_dir = state_dir
        self._exit_status = exit_status
        self._inherited = inherited
        self._notify = sdnotify.SystemdNotifier().notify
        self._mounts: Mounts | None = None
        self._watchdog: Watchdog | None = None
        self._ending: Deferred[None] | None = None

    def startService(self) -> None:
        super().startService()  # type: ignore[no-untyped-call]
        on_stop_signal(self._reactor, self.request_stop)
        on_upgrade_signal(self._reactor, self._take_signal)
        self._reactor.callWhenRunning(self._begin)

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
        if self._mounts is None:
            self._reactor.stop()
        elif self._ending is None:
            self._ending = Deferred.fromCoroutine(self._end(self._mounts))
        else:
            _ = Deferred.fromCoroutine(self._mounts.close())

    def _take_signal(self) -> None:
        """From the parent, which is what is installed now, or from a person."""
        try:
            if self._exit_status.is_supervised:
                self._upgrade()
            elif self._mounts is not None:
                self._mounts.upgrade()
        except MountError as error:
            self.log.error("no upgrade: {reason}", reason=str(error))

    def _ask_parent(self) -> None:
        """To be what is installed now first, while this daemon goes on."""
        os.kill(os.getppid(), signal.SIGUSR2)

    def _upgrade(self) -> None:
        """Go on as the program that is installed now, with the same mounts."""
        if self._mounts is not None and self._ending is None:
            self._exit_status.is_again = True
            self._ending = Deferred.fromCoroutine(self._leave(self._mounts))

    async def _leave(self, mounts: Mounts) -> None:
        self.log.info("leaving all mounts to the program that is installed now")
        await mounts.leave()
        await self._finish(mounts)

    def _begin(self) -> None:
        lines = RecentLines()
        globalLogPublisher.addObserver(lines)
        begin = self._upgrade if not self._exit_status.is_supervised else self._ask_parent
        mounts = Mounts(self._reactor, self._defaults, self._state_dir, lines, begin)
        try:
            self._listen(mounts)
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

    def _listen(self, mounts: Mounts) -> None:
        if self._inherited is not None:
            self._port = self._reactor.adoptStreamPort(self._inherited, socket.AF_UNIX, site(mounts))
            return
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
