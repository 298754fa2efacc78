"""The cache directory: a file for each blob, shared by every process on the host.

What one process stores can be read at once by all, through the page cache. A little later a thread brings it
on disk; so a crash of the system costs the last seconds' chunks, one of a process nothing, and neither ever
yields a wrong byte.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

import attrs
from twisted.internet.defer import Deferred
from twisted.internet.threads import deferToThreadPool
from twisted.logger import Logger

from erofs_twisted.blocks.blobfile import FAILURES, is_scarcity, told
from erofs_twisted.blocks.cached import CachedBlob
from erofs_twisted.blocks.cachefiles import CacheError, CacheFiles
from erofs_twisted.blocks.chunks import MAX_CHUNK_SIZE, Chunking, chunk_size_for
from erofs_twisted.blocks.header import BlobIdentity
from erofs_twisted.registry.digest import Digest

if TYPE_CHECKING:
    from twisted.python.threadpool import ThreadPool

BUDGET = 256 << 20
"""The most bytes that are stored before the directory is looked at again."""
LIMIT_SHARE = 8
"""Nor are more than one part in so many of the limit."""
SCARCE_SECONDS = 1.0
"""How long it is not looked for room where there was no memory to look."""
LOOK_SECONDS = 5.0
"""How often it is looked at, at the most, while there is no room."""

_T = TypeVar("_T")


@attrs.define(eq=False)
class CacheDirectory:
    """The blobs below ``path``, which take no more than ``limit`` bytes of the disk; None: any number.

    ``pool`` is where files are opened, synced, hashed and evicted; it is started, and outlives every open
    blob.
    """

    reactor: Any
    pool: ThreadPool
    path: str
    chunk_size: int | None = None
    limit: int | None = None
    files: CacheFiles = attrs.field(init=False)
    _budget: int = attrs.field(init=False)
    _left: int = attrs.field(default=0, init=False)
    """Bytes that may be stored before the directory has been looked at again."""
    _refused: int = attrs.field(default=0, init=False)
    """The most that was refused since it was last looked at."""
    _full: bool = attrs.field(default=False, init=False)
    _looking: bool = attrs.field(default=False, init=False)
    _not_before: float = attrs.field(default=0.0, init=False)

    _log = Logger()

    def __attrs_post_init__(self) -> None:
        self.files = CacheFiles(self.path, self.limit)
        share = BUDGET if self.limit is None else self.limit // LIMIT_SHARE
        self._budget = max(min(BUDGET, share), 4 * (self.chunk_size or MAX_CHUNK_SIZE))

    def open(self, digest: str, size: int) -> Deferred[CachedBlob]:
        """Open the blob's file, or make it.

        The Deferred fails with `CacheError`, or `erofs_twisted.registry.errors.InvalidDigest`. On a full disk
        there is a `CachedBlob` that keeps nothing.
        """
        return Deferred.fromCoroutine(self._open(digest, size))

    def room(self) -> Deferred[int]:
        """A Deferred of the bytes that can be stored if what is not in use is evicted; 0 where that cannot be
        told."""
        return Deferred.fromCoroutine(self._room())

    def take(self, length: int) -> bool:
        """May this many bytes be stored now? If so, they are counted."""
        if self._left < length:
            self._refused = max(self._refused, length)
        if self._left - length < self._budget // 2:
            self._look()
        if self._left < length:
            return False
        # After the look, which does not see bytes that are still to be written.
        self._left -= length
        return True

    def disk_is_full(self) -> None:
        """There was no space to store what `take` had granted."""
        self._left = 0
        self._look(disk_is_full=True)

    def in_thread(self, function: Callable[..., _T], *arguments: object, **named: object) -> Deferred[_T]:
        """Run what may block."""
        return deferToThreadPool(self.reactor, self.pool, function, *arguments, **named)

    async def _open(self, digest: str, size: int) -> CachedBlob:
        identity = BlobIdentity(Digest.parse(digest), Chunking(size, self.chunk_size or chunk_size_for(size)))
        path = self.files.path_of(identity.digest)
        opened = await self.in_thread(self.files.open, identity)
        if opened.damage:
            self._log.warn("the cached copy {path} was dropped: {damage}", path=path, damage=opened.damage)
        if not opened.kept:
            self._log.error(
                "no space is left for a cache file in {path}, and nothing there can be evicted; until the "
                "next mount, what is read is fetched and not kept",
                path=self.path,
            )
        cached = CachedBlob(self, opened.file, path, opened.chunks, opened.kept)
        if opened.kept:
            await self._looked(0 if opened.chunks.complete else self._budget)
        return cached

    async def _room(self) -> int:
        try:
            return await self.in_thread(self.files.room)
        except (*FAILURES, CacheError) as error:
            self._cannot_look(error)
            return 0

    def _look(self, *, disk_is_full: bool = False) -> None:
        if self._looking or self.reactor.seconds() < self._not_before:
            return
        wanted = max(self._budget, 2 * self._refused)
        _ = Deferred.fromCoroutine(self._looked(wanted, disk_is_full)).addErrback(
            lambda failure: self._log.failure("the cache directory {path}", failure, path=self.path)
        )

    async def _looked(self, wanted: int, disk_is_full: bool = False) -> None:
        """Evict what has to be, and see how much may be stored."""
        self._looking = True
        left, refused, self._refused = self._left, self._refused, 0
        try:
            room = await self.in_thread(self.files.make_room, wanted, disk_is_full=disk_is_full)
        except (*FAILURES, CacheError) as error:
            self._cannot_look(error)
            if is_scarcity(error):
                self._not_before = self.reactor.seconds() + SCARCE_SECONDS
                return
            room = 0
        finally:
            self._looking = False
        taken_meanwhile = max(left - self._left, 0)
        self._left = room - taken_meanwhile
        full = room < min(max(refused, self.chunk_size or MAX_CHUNK_SIZE), wanted)
        if full:
            self._not_before = self.reactor.seconds() + LOOK_SECONDS
        if full and not self._full:
            self._log.warn(
                "the cache directory {path} is full ({limit}its disk has too little free space), and all of "
                "it is in use; what is read now is not kept",
                path=self.path,
                limit="" if self.limit is None else f"--cache-size is {self.limit} bytes, or ",
            )
        elif self._full and not full:
            self._log.info("the cache directory {path} has room again", path=self.path)
        self._full = full

    def _cannot_look(self, error: Exception) -> None:
        self._log.error(
            "cannot look into the cache directory {path}: {error}", path=self.path, error=told(error)
        )
