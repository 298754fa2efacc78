"""Telling systemd that this daemon still serves: a read of each device's superblock, as the kernel has it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import attrs
from twisted.internet.defer import Deferred
from twisted.internet.task import LoopingCall
from twisted.logger import Logger
from twisted.python.threadpool import ThreadPool

from erofs_twisted.devices import Served
from erofs_twisted.errors import ReadError
from erofs_twisted.image import BLOCK, joined
from erofs_twisted.syscalls import in_thread

PER_TIMEOUT = 3
"""Looks in the time after which systemd gives a daemon up."""


def interval(environment: Mapping[str, str]) -> float | None:
    """Seconds between two looks (sd_watchdog_enabled(3), ``WATCHDOG_USEC``); None where none is wanted."""
    text = environment.get("WATCHDOG_USEC", "")
    microseconds = int(text) if text.isascii() and text.isdigit() else 0
    return microseconds / 1e6 / PER_TIMEOUT or None


@attrs.define
class Watchdog:
    """Looks at all that is ``served``, again and again, and tells ``notify`` when it is well.

    What hangs ends that: the reactor, or the disk with the cache. A registry that is away does not: another
    daemon could do no more about it than this one.
    """

    log = Logger()

    _reactor: Any
    _pool: ThreadPool
    _served: Callable[[], Iterable[Served]]
    _notify: Callable[[str], object]
    _looking: LoopingCall | None = attrs.field(init=False, default=None)

    def start(self, environment: Mapping[str, str]) -> None:
        """Look from now on, as often as systemd wants it by the ``environment``."""
        seconds = interval(environment)
        if seconds is None:
            return
        self._looking = LoopingCall(lambda: Deferred.fromCoroutine(self._look()))
        self._looking.clock = self._reactor
        _ = self._looking.start(seconds).addErrback(
            lambda failure: self.log.failure("a bug: please report it", failure)
        )

    def stop(self) -> None:
        """Look no more."""
        if self._looking is not None and self._looking.running:
            self._looking.stop()

    async def _look(self) -> None:
        for served in self._served():
            await self._read(served)
        self._notify("WATCHDOG=1")

    async def _read(self, served: Served) -> None:
        try:
            beginning = served.image.export.read(0, min(BLOCK, served.image.export.size))
            if isinstance(beginning, Deferred):
                # It is not in the cache any more, and is on its way from the registry.
                beginning.addErrback(lambda _: []).cancel()
                return
            await in_thread(self._reactor, self._pool, joined, beginning)
        except (ReadError, OSError) as error:
            self.log.warn("{device}: {reason}", device=served.device.path, reason=str(error))
