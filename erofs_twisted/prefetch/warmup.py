"""The order in which an image is brought near: what a trace tells, the metadata, and then all the rest."""

from __future__ import annotations

from collections.abc import Awaitable, Iterator
from contextlib import contextmanager
from typing import Any

from twisted.internet.defer import CancelledError, Deferred
from twisted.logger import Logger

from erofs_twisted.blocks.source import BlobSource
from erofs_twisted.blocks.trace import Trace
from erofs_twisted.erofs.superblock import Superblock
from erofs_twisted.errors import ErofsTwistedError
from erofs_twisted.prefetch.fill import Fill
from erofs_twisted.prefetch.metadata import prefetch_metadata


class WarmUp:
    """Runs beside the reads of one image, from `follow` or `begin` until `stop`.

    It never fails: what cannot be brought near is said, and left to those who read it.
    """

    _log = Logger()

    def __init__(self, clock: Any, source: BlobSource) -> None:
        self._clock = clock
        self._source = source
        self._running: list[Deferred[None]] = []
        self._traced = False
        self._before_the_rest = 0
        """How much is under way that goes first."""

    def follow(self, search: Awaitable[Trace | None]) -> None:
        """Fetch what a trace names, once it is found."""
        self._run(self._follow(search), "the trace")

    def begin(self, superblock: Superblock, fill: Fill | None) -> None:
        """The image is known to be one: fetch its metadata, and fill."""
        if not self._source.bytes_missing:
            return
        if not self._traced:  # the metadata that is needed is in the trace
            self._run(self._fetch_metadata(superblock), "the metadata")
        if fill is not None:
            fill.is_held = lambda: self._before_the_rest > 0
            self._run(fill.when_idle(), "the rest of the image")

    def stop(self) -> None:
        """End all that runs."""
        running, self._running = self._running, []
        for work in running:
            work.cancel()

    def _run(self, work: Any, what: str) -> None:
        running: Deferred[None] = Deferred.fromCoroutine(work)
        self._running.append(running)

        def ended(result: Any) -> None:
            if running in self._running:
                self._running.remove(running)
            if result is None or result.check(CancelledError):
                return
            if result.check(ErofsTwistedError):
                self._log.info(
                    "{what} could not be fetched ahead: {reason}", what=what, reason=str(result.value)
                )
            else:
                self._log.failure("fetching {what} ahead broke", result, what=what)

        _ = running.addBoth(ended)

    async def _follow(self, search: Awaitable[Trace | None]) -> None:
        trace = await search
        if trace is not None:
            self._traced = True
            self._log.info(
                "fetching {bytes} bytes that the trace of {digest} names",
                bytes=trace.length,
                digest=trace.digest,
            )
            with self._first():
                await self._source.prefetch_ranges(trace.ranges)

    async def _fetch_metadata(self, superblock: Superblock) -> None:
        with self._first():
            await prefetch_metadata(self._source, superblock, self._clock)

    @contextmanager
    def _first(self) -> Iterator[None]:
        """All the rest is held up."""
        self._before_the_rest += 1
        try:
            yield
        finally:
            self._before_the_rest -= 1
