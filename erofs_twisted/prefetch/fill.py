"""The rest of a blob, while its link has nothing else to do; then the check that all of it is right."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import attrs
from twisted.internet.defer import Deferred
from twisted.internet.task import deferLater
from twisted.logger import Logger

from erofs_twisted.blocks.cached import CorruptBlob
from erofs_twisted.blocks.fetch import Priority
from erofs_twisted.blocks.lanes import in_lanes
from erofs_twisted.blocks.link import KIB, MIB
from erofs_twisted.blocks.queue import FetchQueue
from erofs_twisted.blocks.source import BlobSource
from erofs_twisted.errors import ReadError

SOON = 10.0
"""Seconds within which an image is better fetched at once: a program that starts reads much of it, here and
there, and each of its waits for an answer can bring some."""
AT_ONCE = 1.0
"""Seconds within which it is not even worth to let others go first: they would wait for longer."""
LANES = 8
"""Requests that wait for their turn, or run. Of the background, the queue lets few run at a time."""
LOOK = 0.01
"""Seconds between two looks at whether there is a reason not to wait any more."""
PATIENCE = 1.0
"""How many it is waited at most for something to be known of the link."""
RETRY_SECONDS = 60.0
"""From a failure, after every retry of the origin's client, to the next try."""


class CacheFull(ReadError):
    """What is fetched is not kept, so there is no use in fetching more."""


@attrs.define
class Fill:
    """Fills the cached blob of ``source``, by at most ``rate`` bytes a second.

    ``room`` says how many bytes the cache can still take.
    """

    clock: Any
    source: BlobSource
    queue: FetchQueue
    room: Callable[[], Deferred[int]]
    rate: int | None = None
    is_held: Callable[[], bool] = lambda: False
    """Is something else to be fetched first? What can be there at once is fetched all the same."""
    _paid_until: float = attrs.field(default=0.0, init=False)
    _log = Logger()

    async def when_idle(self) -> None:
        """Fill with idle bandwidth, and check the digest; go on after failures. Ends when all is there, or
        when there is no use in going on, which is logged."""
        while True:
            try:
                await self._check_room()
                await self._until_link_is_known()
                await self._fill(Priority.BACKGROUND)
                await self.source.verify()
            except (CacheFull, CorruptBlob) as error:
                if isinstance(error, CacheFull):  # the other one was said by the cache
                    self._log.warn(
                        "the rest of {digest} is not filled in: {reason}",
                        reason=str(error),
                        digest=self.source.digest,
                    )
                return
            except ReadError as error:
                self._log.info(
                    "the background fill pauses for {seconds:g} s: {reason}",
                    seconds=RETRY_SECONDS,
                    reason=str(error),
                )
                await deferLater(self.clock, RETRY_SECONDS)
            else:
                return

    async def now(self) -> None:
        """Fetch all that is missing, and check the digest. Raises `ReadError`."""
        await self._fill(Priority.AHEAD)
        await self.source.verify()

    async def _check_room(self) -> None:
        room, missing = await self.room(), self.source.bytes_missing
        if missing > room:
            raise CacheFull(f"{missing} bytes are missing, and the cache has room for {room}")

    async def _until_link_is_known(self) -> None:
        until = self.clock.seconds() + PATIENCE
        while self.queue.link.throughput is None and self.clock.seconds() < until:
            await deferLater(self.clock, LOOK)

    async def _fill(self, priority: Priority) -> None:
        unkept = self.source.stats.bytes_unkept
        position = 0

        async def fetch_in_turn() -> None:
            nonlocal position
            while True:
                urgency = min(priority, self._urgency())
                if self.is_held() and urgency is Priority.BACKGROUND:
                    await deferLater(self.clock, LOOK)
                    continue
                missing = self.source.next_missing(position, self._request_size(urgency))
                if missing is None:
                    return
                start, end = missing
                position = end
                await self._pace(end - start)
                await self.source.prefetch(start, end - start, urgency)
                if self.source.stats.bytes_unkept > unkept:
                    raise CacheFull("the cache is full, see --cache-size and the disk's free space")

        while self.source.next_missing(0, MIB) is not None:
            # Once more, for what was missing again behind the lanes' backs.
            position = 0
            await in_lanes(LANES, fetch_in_turn)

    def _urgency(self) -> Priority:
        """How urgent the rest is: the sooner it can be there, the more."""
        throughput = None if self.rate is not None else self.queue.link.throughput
        seconds = None if throughput is None else self.source.bytes_missing / max(throughput, 1.0)
        self.queue.hurries = seconds is not None and seconds <= SOON
        return Priority.AHEAD if seconds is not None and seconds <= AT_ONCE else Priority.BACKGROUND

    def _request_size(self, urgency: Priority) -> int:
        """In the background, what comes in about a round trip: a reader that comes meanwhile shares the link
        for no longer."""
        link = self.queue.link
        if urgency is Priority.AHEAD:
            return MIB
        return link.share(1, default=256 * KIB, least=64 * KIB, most=MIB)

    async def _pace(self, length: int) -> None:
        if self.rate is None:
            return
        now = self.clock.seconds()
        pause = self._paid_until - now
        self._paid_until = max(self._paid_until, now) + length / self.rate
        if pause > 0:
            await deferLater(self.clock, pause)
