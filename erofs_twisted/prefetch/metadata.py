"""The metadata of an image, fetched in a few round trips, so that ``find`` need not wait for one a directory.

What is fetched first is a guess: from the root directory on, about as much as so many inodes take. After
that the image itself says where the rest is: each directory that has come names inodes, these name the next
directories, and all that is known and missing is asked for at once.
"""

from __future__ import annotations

from collections import deque

import attrs
from twisted.internet.defer import CancelledError, Deferred
from twisted.internet.interfaces import IReactorTime
from twisted.internet.task import deferLater
from twisted.logger import Logger
from twisted.python.failure import Failure

from erofs_twisted.blocks.chunks import CHUNK_SIZE
from erofs_twisted.blocks.link import KIB, MIB
from erofs_twisted.blocks.source import BlobSource
from erofs_twisted.erofs.inode import SLOT
from erofs_twisted.erofs.superblock import Superblock
from erofs_twisted.erofs.walk import ByteRange, Walk
from erofs_twisted.errors import ReadError


@attrs.frozen
class MetadataPolicy:
    """How much is asked for beyond what is known to be needed, and when to stop."""

    granule: int = CHUNK_SIZE
    """Ranges are whole ones of these: a power of two, no less than a block."""
    gap: int = 32 * KIB
    """Ranges that are this near to each other are asked for as one while the link is not known: what is
    between them costs no more than another request would, and may be of use next."""
    request: int = 1 * MIB
    """Ranges are cut to pieces of at most this size: what is in one can be looked at when it has come."""
    lanes: int = 28
    """Pieces asked for at a time, in order: so a program that goes through the image meanwhile, mostly in the
    same order, meets what is there."""
    most: int = 128 * MIB
    """Fetched in all."""
    inode_estimate: int = 128
    """Bytes that one file is taken to need: an inode, its entry in a directory, the start of its map."""
    first_least: int = 256 * KIB
    first_most: int = 4 * MIB
    """Bounds of the first guess, which also is no more than a tenth of the image unless that is less than the
    least."""
    slice_seconds: float = 0.001
    """After so long the walk lets the reactor go on: it serves reads meanwhile."""


async def prefetch_metadata(
    source: BlobSource, superblock: Superblock, clock: IReactorTime, policy: MetadataPolicy | None = None
) -> int:
    """Bring the inodes, the directories and the shared extended attributes of an image into the cache.

    Returns how many bytes it asked for, in whole granules, whether they were there before or not; 0 where all
    of the image is there. Metadata that is damaged, or too much, or cannot be fetched, ends it early, and is
    logged. It can be cancelled at any time.
    """
    if not source.bytes_missing:
        return 0
    policy = policy or MetadataPolicy(granule=source.chunk_size)
    return await MetadataPrefetch(source, superblock, clock, policy).run()


def first_guess(superblock: Superblock, size: int, policy: MetadataPolicy) -> ByteRange:
    """[start, end) of an image of ``size`` bytes where most of a small one's metadata will be."""
    first = superblock.meta_block * superblock.block_size
    root = first + superblock.root_nid * SLOT
    # The inodes start at block 0 where nothing was said about it: then the root directory's is the first.
    start = min(first or root, size)
    most = max(min(policy.first_most, size // 10), policy.first_least)
    length = min(max(superblock.inodes * policy.inode_estimate, policy.first_least), most)
    return start, min(start + length, size)


class MetadataPrefetch:
    """One walk through an image, and the fetches under way for it."""

    _log = Logger()

    def __init__(
        self, source: BlobSource, superblock: Superblock, clock: IReactorTime, policy: MetadataPolicy
    ) -> None:
        self._source = source
        self._superblock = superblock
        self._clock = clock
        self._policy = policy
        self._walk = Walk(superblock, source.size, policy.granule)
        self._covered: set[int] = set()
        """Granules that were asked for."""
        self._queue: deque[ByteRange] = deque()
        self._coming: dict[Deferred[None], ByteRange] = {}
        self._news: Deferred[None] | None = None
        """Fires when something has arrived."""
        self._arrived: list[ByteRange] = []
        self._is_starting = False
        self._error: str | None = None
        """Why something did not come."""
        self._is_cut = False
        """Was something left out for the limit's sake?"""

    async def run(self) -> int:
        """See `prefetch_metadata`."""
        began = self._clock.seconds()
        try:
            self._fetch(first_guess(self._superblock, self._source.size, self._policy))
            while await self._has_news() and self._error is None:
                await self._look()
                for wanted in self._merged(self._walk.wanted()):
                    self._fetch(wanted)
        finally:
            self._queue.clear()
            for coming in list(self._coming):
                coming.cancel()
        covered = self._covered_bytes()
        self._log.info(
            "{bytes} bytes with {inodes} inodes and {directories} directories were fetched ahead "
            "in {seconds:.2f} s",
            bytes=covered,
            inodes=self._walk.inodes,
            directories=self._walk.directories,
            seconds=self._clock.seconds() - began,
        )
        self._tell_trouble()
        return covered

    async def _has_news(self) -> bool:
        """Wait until something has arrived; False if nothing more will."""
        if not self._arrived:
            if not self._coming:
                return False
            self._news = Deferred()
            try:
                await self._news
            finally:
                self._news = None
        for start, end in self._arrived:
            self._walk.arrived(start, end)
        self._arrived.clear()
        return True

    async def _look(self) -> None:
        """Walk through all that is there, in slices."""
        walk, peek, seconds = self._walk, self._source.peek, self._clock.seconds
        pause = seconds() + self._policy.slice_seconds
        while (wanted := walk.look()) is not None:
            start, end = wanted
            data = peek(start, end - start)
            if data is None:
                walk.postpone()
            else:
                walk.take(data)
            if seconds() >= pause:
                await deferLater(self._clock, 0)
                pause = seconds() + self._policy.slice_seconds

    def _merged(self, ranges: list[ByteRange]) -> list[ByteRange]:
        """Ranges in order, with no small gaps between them."""
        # Many requests go side by side: each has a part of what comes in a round trip.
        gap = self._source.link.share(
            16, default=self._policy.gap, least=self._policy.granule, most=256 * KIB
        )
        merged: list[ByteRange] = []
        for start, end in ranges:
            if merged and start - merged[-1][1] <= gap:
                merged[-1] = (merged[-1][0], end)
            else:
                merged.append((start, end))
        return merged

    def _fetch(self, wanted: ByteRange) -> None:
        """Ask for a range, in whole granules, as far as the limit allows."""
        granule = self._policy.granule
        first, end = wanted[0] // granule, -(-wanted[1] // granule)
        room = self._policy.most // granule - len(self._covered)
        if end - first > room:
            self._is_cut, end = True, first + room
        if end <= first:
            return
        self._covered.update(range(first, end))
        start, stop = first * granule, min(end * granule, self._source.size)
        step = self._policy.request
        self._queue.extend((cut, min(cut + step, stop)) for cut in range(start, stop, step))
        self._start()

    def _start(self) -> None:
        """Ask for the next pieces, as far as there are lanes."""
        if self._is_starting:
            return  # what was at hand has ended at once, within the loop below
        self._is_starting = True
        while self._queue and len(self._coming) < self._policy.lanes:
            start, end = self._queue.popleft()
            coming = self._source.prefetch(start, end - start)
            self._coming[coming] = (start, end)
            _ = coming.addBoth(self._ended, coming)
        self._is_starting = False

    def _ended(self, result: Failure | None, coming: Deferred[None]) -> None:
        if isinstance(result, Failure) and not result.check(CancelledError):
            self._error = result.getErrorMessage()
            if not result.check(ReadError):
                self._log.failure("fetching metadata ahead broke", result)
            self._queue.clear()
        self._arrived.append(self._coming.pop(coming))
        self._start()
        if self._news is not None:
            self._news.callback(None)

    def _covered_bytes(self) -> int:
        granule = self._policy.granule
        has_last = (self._source.size - 1) // granule in self._covered
        return len(self._covered) * granule - (-self._source.size % granule if has_last else 0)

    def _tell_trouble(self) -> None:
        trouble = list(self._walk.trouble)
        if self._error is not None:
            trouble.append(self._error)
        if self._is_cut:
            trouble.append(f"it is more than {self._policy.most} bytes")
        if trouble:
            self._log.info(
                "not all metadata was fetched ahead, since {reason}; the rest comes as it is read",
                reason="; ".join(trouble),
            )
