"""One mount as a Twisted service, and the end of the reactor with it."""

from __future__ import annotations

import os
from typing import Any

import sdnotify
from twisted.application.service import Service
from twisted.internet.defer import Deferred
from twisted.logger import Logger

from erofs_twisted.devices import Devices
from erofs_twisted.handover import Handover
from erofs_twisted.mounting import Mount
from erofs_twisted.options import MountConfig
from erofs_twisted.process import ExitStatus, on_stop_signal, resume_collections
from erofs_twisted.succession import Legacy, Succession
from erofs_twisted.watchdog import Watchdog


class MountService(Service):
    """Mounts what ``config`` says, and serves it. When the mount has ended, by whatever cause, so does the
    reactor: with ``exit_status`` 0 where the end was asked for, else 1."""

    log = Logger()

    def __init__(
        self, reactor: Any, config: MountConfig, exit_status: ExitStatus, legacy: Legacy | None = None
    ) -> None:
        self._reactor = reactor
        self._exit_status = exit_status
        self._succession = Succession(reactor, exit_status, legacy or Legacy())
        self._notify = sdnotify.SystemdNotifier().notify
        self._config = config
        self._life: Deferred[None] | None = None
        self._is_stopping = False
        self.mount: Mount | None = None

    def startService(self) -> None:
        super().startService()  # type: ignore[no-untyped-call]
        on_stop_signal(self._reactor, self.request_stop)
        self._succession.watch(self.leave)
        self._reactor.callWhenRunning(self._begin)

    def stopService(self) -> Deferred[None] | None:
        """Where the reactor ends by another's doing: a mount in use is unmounted lazily, not waited for."""
        super().stopService()  # type: ignore[no-untyped-call]
        life = self._life
        if life is None or life.called:
            return None
        self.request_stop("the end of the reactor")
        self.request_stop("the end of the reactor")
        ended: Deferred[None] = Deferred()
        _ = life.addBoth(lambda _: ended.callback(None))
        return ended

    def request_stop(self, why: str) -> None:
        """End in good order. A second request unmounts lazily what is still in use."""
        self.log.info("stopping: {why}", why=why)
        self._notify("STOPPING=1")
        self._is_stopping = True
        self._succession.cancel()
        if self.mount is not None:
            self.mount.request_stop()

    def leave(self) -> None:
        """End, and leave the mount to the next daemon: now, or as soon as it is up."""
        if self.mount is not None:
            self.mount.leave()

    def _begin(self) -> None:
        self._life = Deferred.fromCoroutine(self._live())

    async def _live(self) -> None:
        handover = await self._succession.take()
        if self._is_stopping and not handover.pid:
            self._end()
            return
        devices = Devices(self._reactor, handover.devices, handover.reclaimed)
        self.mount = Mount(self._reactor, self._config, devices)
        _ = self.mount.ready.addCallback(self._say_ready)
        watchdog = Watchdog(self._reactor, devices.pool, devices.all, self._notify)
        watchdog.start(os.environ)
        failure = await self.mount.live()
        watchdog.stop()
        if self.mount.has_left:
            await self._succession.give(devices.pool, Handover(os.getpid(), devices.handed))
        await devices.close()
        self._exit_status.status = 0 if failure is None else 1
        self._end()

    def _end(self) -> None:
        if self.running:
            self._reactor.stop()

    def _say_ready(self, _: None) -> None:
        resume_collections()
        self._notify(f"READY=1\nSTATUS={self._config.image.reference} on {self._config.mountpoint}")
