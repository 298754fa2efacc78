"""One blob in the cache, open: what is there of it, and what comes in."""

from __future__ import annotations

from collections.abc import Coroutine, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from twisted.internet.defer import Deferred, DeferredLock, fail, succeed
from twisted.logger import Logger

from erofs_twisted.blocks.blobfile import FAILURES, BlobFile, OtherDigest, Synced, is_scarcity, told
from erofs_twisted.blocks.cachefiles import NO_SPACE
from erofs_twisted.blocks.chunks import FRESH, ChunkMap
from erofs_twisted.blocks.header import DamagedFile
from erofs_twisted.errors import ReadError

if TYPE_CHECKING:
    from erofs_twisted.blocks.cache import CacheDirectory

FLUSH_SECONDS = 5.0
"""How long a stored chunk may go without being safe on disk, and how often a file is looked after at all."""


class CorruptBlob(ReadError):
    """All of a blob is there, and its digest is not the one it should have."""


class CachedBlob:
    """One blob in the cache, open for reading and filling until `close`.

    Read `chunks` to see what is there, and the file ``fd`` at the blob's own offsets to get it. Other
    processes may fill the same file: `refresh` takes over what they wrote, `claim` keeps two from fetching
    the same.
    """

    _log = Logger()

    def __init__(
        self, directory: CacheDirectory, file: BlobFile, path: str, chunks: ChunkMap, kept: bool = True
    ) -> None:
        self.digest = file.identity.digest
        self.chunking = file.identity.chunking
        self.size = self.chunking.size
        self.fd = file.fd
        self.chunks = chunks
        self.error: ReadError | None = None
        """Why the blob can be read no more."""
        self._directory = directory
        self._file = file
        self._path = path
        self._unsafe = False
        """May there be chunks or marks in the file that are not on disk?"""
        self._flushing = DeferredLock()
        self._verifying: list[Deferred[None]] | None = None
        self._writes_fail = False
        self._lost = not kept
        """Is the file of no use any more?"""
        self._closing = False
        self._timer: Any = None
        self._wait()
        self._verify_when_complete()

    def store(self, first: int, pieces: Sequence[bytes | memoryview]) -> bool:
        """Keep whole chunks, from ``first`` on, for every process. They are there if this returns True, else
        they could not be kept (disk full)."""
        if self._closing or self._lost or self.error:
            return False
        length = sum(map(len, pieces))
        end = self.chunking.span(self.chunking.start(first), length)[1]
        if not self._directory.take(length):
            return False
        try:
            self._file.write(first, end, pieces)
        except DamagedFile as error:
            self._lose(str(error))
            return False
        except FAILURES as error:
            if not self._writes_fail:
                self._log.error(
                    "cannot write to the cache file {path}: {error}; what is read now is not kept",
                    path=self._path,
                    error=told(error),
                )
            self._writes_fail = True
            if isinstance(error, OSError) and error.errno in NO_SPACE:
                self._directory.disk_is_full()
            return False
        if self._writes_fail:
            self._log.info("the cache file {path} can be written again", path=self._path)
            self._writes_fail = False
        self._unsafe = True
        self.chunks.set(first, end)
        self._verify_when_complete()
        return True

    def refresh(self, first: int, end: int) -> bool:
        """Take over what other processes wrote of the chunks [first, end); True if that is anything."""
        if self._closing or self._lost or self.error:
            return False
        try:
            marks = self._file.read_marks(first, end)
        except FAILURES:
            return False
        if not self.chunks.take_over(first, marks):
            return False
        # Whoever wrote it may have died since.
        self._unsafe = self._unsafe or FRESH in marks
        self._verify_when_complete()
        return True

    def claim(self, first: int, end: int) -> bool:
        """Is it for this process to fetch the chunks [first, end), first < end? False while another process
        has claimed any of them.

        They may have come before: `refresh` after a claim. Claims of the same `CachedBlob` don't exclude each
        other, and end with `release`, with `close`, or with the process.
        """
        return self._closing or self._lost or self._file.claim(first, end)

    def release(self, first: int, end: int) -> None:
        """Give up the claim to the chunks [first, end)."""
        if not self._closing and not self._lost:
            self._file.release(first, end)

    def flush(self) -> Deferred[None]:
        """Bring on disk all that is stored, and see what other processes have stored. It does not fail: what
        cannot be kept safe is there no more, and logged."""
        return Deferred.fromCoroutine(self._flush())

    def verify(self) -> Deferred[None]:
        """Hash the blob, all of which must be there, unless that was done before.

        The Deferred fails with `CorruptBlob` if it has another digest; then it is dropped from the cache, and
        cannot be read. It fails with `ReadError` if that cannot be told.
        """
        if self.error is not None:
            return fail(self.error)
        if self._file.verified and not self._lost:
            return succeed(None)
        if self._closing or not self.chunks.complete:
            return fail(ReadError(f"the blob {self.digest} cannot be verified: not all of it is there"))
        done: Deferred[None] = Deferred()
        self._verification().append(done)
        return done

    def close(self) -> Deferred[None]:
        """Flush, and close the file: nothing may be read from it any more. Call it once."""
        self._closing = True
        self._timer.cancel()
        self.chunks.clear()
        return Deferred.fromCoroutine(self._close())

    async def _close(self) -> None:
        await self._flush()
        if self._verifying is not None:
            ended: Deferred[None] = Deferred()
            self._verifying.append(ended)
            with suppress(ReadError):
                await ended
        await self._directory.in_thread(self._file.close)

    def _wait(self) -> None:
        self._timer = self._directory.reactor.callLater(FLUSH_SECONDS, self._look_after)

    def _look_after(self) -> None:
        self._wait()
        if not self._flushing.locked:
            self._in_background(self._flush())

    async def _flush(self) -> None:
        async with self._flushing:
            if self._lost or self.error:
                return
            unsafe, self._unsafe = self._unsafe, False
            try:
                synced = await self._directory.in_thread(self._synced, self.chunks.copy() if unsafe else None)
            except OtherDigest as error:
                await self._poison(str(error))
            except DamagedFile as error:
                self._lose(str(error))
            except FAILURES as error:
                self._log.error(
                    "cannot flush the cache file {path}: {error}; what was not safe is fetched again",
                    path=self._path,
                    error=told(error),
                )
                await self._keep_what_is_safe()
            else:
                if synced is not None:
                    self._take_over(synced)

    def _take_over(self, synced: Synced) -> None:
        if self._closing or self._lost or self.error:
            return
        self._unsafe = self._unsafe or synced.marked
        self.chunks.merge(synced.there)
        for first, end in synced.lost:
            self.chunks.unset(first, end)
        self._verify_when_complete()

    def _synced(self, known: ChunkMap | None) -> Synced | None:
        self._file.check()
        return None if known is None else self._file.sync(known)

    async def _keep_what_is_safe(self) -> None:
        try:
            safe = await self._directory.in_thread(self._file.present)
        except (*FAILURES, DamagedFile) as error:
            if not is_scarcity(error):
                self._lose(str(error))
                return
            # The marks tell what is safe, and the next flush looks at them.
            self.chunks.clear()
            self._unsafe = True
        else:
            self.chunks.keep(safe)

    def _in_background(self, work: Coroutine[Deferred[Any], Any, None]) -> None:
        _ = Deferred.fromCoroutine(work).addErrback(
            lambda failure: self._log.failure("the cache file {path}", failure, path=self._path)
        )

    def _verify_when_complete(self) -> None:
        if self.chunks.complete and not self._file.verified:
            self._verification()

    def _verification(self) -> list[Deferred[None]]:
        """Those who wait for the verification under way, which starts if there is none."""
        if self._verifying is None:
            self._verifying = []
            self._in_background(self._verify())
        return self._verifying

    async def _verify(self) -> None:
        error: ReadError | None = ReadError(f"the blob {self.digest} could not be verified")
        try:
            error = await self._verified()
        finally:
            waiting, self._verifying = self._verifying or [], None
            for done in waiting:
                if error is None:
                    done.callback(None)
                else:
                    done.errback(error)

    async def _verified(self) -> ReadError | None:
        """Verify; the error if it came to nothing."""
        # All marks come before the flag: a file with the flag alone would be dropped as damaged.
        self._unsafe = True
        await self._flush()
        if self.error is not None:
            return self.error
        if not self._closing and not self.chunks.complete:
            return ReadError(f"the blob {self.digest} cannot be verified: parts of it were lost")
        try:
            if await self._directory.in_thread(self._file.verify, lambda: self._closing or self._lost):
                self._log.info("the blob {digest} is complete, its digest is right", digest=self.digest)
                return None
            return ReadError(f"the blob {self.digest} was closed before it was verified")
        except FAILURES as error:
            reason = told(error)
            self._log.error("cannot verify the cache file {path}: {error}", path=self._path, error=reason)
            return ReadError(f"the blob {self.digest} cannot be verified: {reason}")
        except OtherDigest as mismatch:
            return await self._poison(str(mismatch))

    async def _poison(self, reason: str) -> CorruptBlob:
        self.error = CorruptBlob(
            f"the blob {self.digest} is corrupt: {reason}; its origin served wrong bytes, or the cache's "
            "disk changed them: check both, then mount again"
        )
        self.chunks.clear()
        self._log.critical("{error} (no read of it succeeds from now on)", error=self.error)
        await self._drop(poisoned=True)
        return self.error

    def _lose(self, reason: str) -> None:
        """Go on without the file."""
        if self._lost:
            return
        self._lost = True
        self.chunks.clear()
        self._log.error(
            "the cache file {path} cannot be used any more: {reason}; until the next mount, what is read is "
            "fetched and not kept",
            path=self._path,
            reason=reason,
        )
        self._in_background(self._drop(poisoned=False))

    async def _drop(self, poisoned: bool) -> None:
        try:
            if poisoned:
                await self._directory.in_thread(self._file.poison)
            await self._directory.in_thread(self._directory.files.remove, self._file, self._path)
        except OSError as error:
            self._log.error("cannot remove the cache file {path}: {error}", path=self._path, error=error)
