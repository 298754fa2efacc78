"""A reactor's clock that goes on evenly while somebody sets the machine's."""

from __future__ import annotations

import time
from typing import Any

import attrs
from twisted.internet.interfaces import IReactorTime


@attrs.frozen
class SteadyClock:
    """Seconds since 1970, as the machine's clock had them when this was made, and as many more as have gone
    by since."""

    _epoch: float = attrs.field(factory=lambda: time.time() - time.monotonic())

    def __call__(self) -> float:
        return self._epoch + time.monotonic()

    def unix_time(self) -> float:
        """What the machine's clock says now."""
        return time.time()


def keep_steady(reactor: Any) -> None:
    """Have a reactor's time and its timers go by a `SteadyClock`.

    Twisted's go by the machine's clock. Set back by an hour, no timer would fire for an hour: no request
    would time out or be made again, and systemd would hear nothing. Set forward, all would fire at once, and
    reads that wait would fail as if the registry had been silent all the while.
    """
    if not isinstance(reactor.seconds, SteadyClock):
        reactor.seconds = SteadyClock()


def unix_time(clock: IReactorTime) -> float:
    """What the machine's clock says now, to be compared with dates that others give. A clock that does not
    follow it, as one of a test, says that itself."""
    seconds = clock.seconds
    return seconds.unix_time() if isinstance(seconds, SteadyClock) else float(seconds())
