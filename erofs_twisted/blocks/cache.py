"""The cache directory: a file for each blob, shared by every process on the host.

What is stored can be read at once, through the page cache. It is marked on disk a little later, by a thread
and after its bytes are safe there; so a crash costs the last seconds' chunks, and never yields a wrong byte.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Callable, Coroutine, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any, TypeVar

import attrs
from twisted.internet.defer import Deferred, DeferredLock, fail, succeed
from twisted.internet.threads import deferToThreadPool
from twisted.logger import Logger

from erofs_twisted.blocks.blobfile import BlobFile, BlobIdentity, DamagedFile, OtherDigest
from erofs_twisted.blocks.chunks import CHUNK_SIZE, Chunking, ChunkMap
from erofs_twisted.errors import MountError, ReadError
from erofs_twisted.registry.digest import Digest

if TYPE_CHECKING:
    from twisted.python.threadpool import ThreadPool

FLUSH_SECONDS = 5.0
"""How long a stored chunk may go without its mark on disk."""

_T = TypeVar("_T")


class CacheError(MountError):
    """The cache directory cannot be used."""


class CorruptBlob(ReadError):
    """All of a blob is there, and its digest is not the one it should have."""


@attrs.frozen
class CacheDirectory:
    """The files below ``path``: ``sha256/HEX`` holds the blob ``sha256:HEX``.

    ``pool`` is where files are opened, synced and hashed; it is started, and outlives every open blob.
    """

    reactor: Any
    pool: ThreadPool
    path: str
    chunk_size: int = CHUNK_SIZE

    _log = Logger()

    def open(self, digest: str, size: int) -> Deferred[CachedBlob]:
        """Open the blob's file, or make it.

        The Deferred fails with `CacheError`, or `erofs_twisted.registry.errors.InvalidDigest`.
        """
        return Deferred.fromCoroutine(self._open(digest, size))

    async def _open(self, digest: str, size: int) -> CachedBlob:
        named = Digest.parse(digest)
        path = os.path.join(self.path, named.algorithm, named.encoded)
        identity = BlobIdentity(named, Chunking(size, self.chunk_size))
        try:
            file, chunks, damage = await self.in_thread(self._open_file, path, identity)
        except OSError as error:
            raise CacheError(
                f"cannot use the cache directory {self.path}: {error}; choose another with --cache-dir"
            ) from error
        if damage:
            self._log.warn("the cached copy {path} was dropped: {damage}", path=path, damage=damage)
        return CachedBlob(self, file, path, chunks)

    def in_thread(self, function: Callable[..., _T], *arguments: object) -> Deferred[_T]:
        """Run what may block."""
        return deferToThreadPool(self.reactor, self.pool, function, *arguments)

    def _open_file(self, path: str, identity: BlobIdentity) -> tuple[BlobFile, ChunkMap, str]:
        os.makedirs(self.path, 0o700, exist_ok=True)
        with self._locked():
            os.makedirs(os.path.dirname(path), 0o700, exist_ok=True)
            damage = ""
            try:
                return *BlobFile.open(path, identity), damage
            except FileNotFoundError:
                pass
            except DamagedFile as error:
                damage = str(error)
                os.unlink(path)
            return BlobFile.create(path, identity), ChunkMap(identity.chunking.count), damage

    def remove(self, file: BlobFile, path: str) -> None:
        """Unlink an open file, unless another took its name meanwhile. Blocks; raises OSError."""
        with self._locked():
            if file.is_at(path):
                os.unlink(path)

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """Nobody else opens, makes or unlinks a file here meanwhile. Raises `CacheError`."""
        fd = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            status = os.fstat(fd)
            if status.st_uid != os.geteuid() or status.st_mode & 0o022:
                raise CacheError(
                    f"others may write to the cache directory {self.path}, so what it holds cannot be "
                    "trusted; give it to the user that runs this, mode 0700, or "
                    "choose another with --cache-dir"
                )
            fcntl.flock(fd, fcntl.LOCK_EX)
            yield
        finally:
            os.close(fd)


class CachedBlob:
    """One blob in the cache, open for reading and filling until `close`.

    Read `chunks` to see what is there, and the file ``fd`` at the blob's own offsets to get it.
    """

    _log = Logger()

    def __init__(self, directory: CacheDirectory, file: BlobFile, path: str, chunks: ChunkMap) -> None:
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
        self._unmarked = ChunkMap(self.chunking.count)
        self._timer: Any = None
        self._flushing = DeferredLock()
        self._verifying: list[Deferred[None]] | None = None
        self._writes_fail = False
        self._closing = False
        self._verify_when_complete()

    def store(self, chunk: int, pieces: Sequence[bytes | memoryview]) -> bool:
        """Keep a whole chunk. It is there if this returns True, else it could not be kept (disk full)."""
        if self._closing or self.error:
            return False
        try:
            self._file.write(self.chunking.start(chunk), pieces)
        except OSError as error:
            if not self._writes_fail:
                self._log.error(
                    "cannot write to the cache file {path}: {error}; what is read now is not kept",
                    path=self._path,
                    error=error,
                )
            self._writes_fail = True
            return False
        if self._writes_fail:
            self._log.info("the cache file {path} can be written again", path=self._path)
            self._writes_fail = False
        self.chunks.set(chunk, chunk + 1)
        self._unmarked.set(chunk, chunk + 1)
        if self._timer is None:
            self._timer = self._directory.reactor.callLater(FLUSH_SECONDS, self._flush_now)
        self._verify_when_complete()
        return True

    def flush(self) -> Deferred[None]:
        """Mark on disk all that is stored, and see what other processes have marked. It does not fail: what
        cannot be kept safe is there no more, and logged."""
        return Deferred.fromCoroutine(self._flush())

    def verify(self) -> Deferred[None]:
        """Hash the blob, all of which must be there, unless that was done before.

        The Deferred fails with `CorruptBlob` if it has another digest; then it is dropped from the cache, and
        cannot be read. It fails with `ReadError` if that cannot be told.
        """
        if self.error is not None:
            return fail(self.error)
        if self._file.verified:
            return succeed(None)
        if self._closing or not self.chunks.complete:
            return fail(ReadError(f"the blob {self.digest} cannot be verified: not all of it is there"))
        done: Deferred[None] = Deferred()
        self._verification().append(done)
        return done

    def close(self) -> Deferred[None]:
        """Flush, and close the file: nothing may be read from it any more. Call it once."""
        self._closing = True
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

    def _flush_now(self) -> None:
        self._in_background(self._flush())

    async def _flush(self) -> None:
        async with self._flushing:
            if self._timer is not None:
                if self._timer.active():
                    self._timer.cancel()
                self._timer = None
            runs = list(self._unmarked.runs_present(0, len(self._unmarked)))
            self._unmarked.clear()
            if not runs or self.error:
                return
            try:
                on_disk = await self._directory.in_thread(self._mark, runs)
            except (OSError, DamagedFile) as error:
                # After a failed sync the page cache may lose what was written.
                for first, end in runs:
                    self.chunks.unset(first, end)
                self._log.error(
                    "cannot flush the cache file {path}: {error}; what was not safe is fetched again",
                    path=self._path,
                    error=error,
                )
                return
            if not self._closing and not self.error:
                self.chunks.merge(on_disk)
                self._verify_when_complete()

    def _mark(self, runs: list[tuple[int, int]]) -> ChunkMap:
        self._file.mark(runs)
        return self._file.read_map()

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
        error: ReadError | None
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
        await self._flush()
        if not self._closing and not self.chunks.complete:
            return ReadError(f"the blob {self.digest} cannot be verified: parts of it were lost")
        try:
            if await self._directory.in_thread(self._file.verify, lambda: self._closing):
                self._log.info("the blob {digest} is complete, its digest is right", digest=self.digest)
                return None
            return ReadError(f"the blob {self.digest} was closed before it was verified")
        except OSError as error:
            self._log.error("cannot verify the cache file {path}: {error}", path=self._path, error=error)
            return ReadError(f"the blob {self.digest} cannot be verified: {error}")
        except OtherDigest as mismatch:
            return await self._poison(str(mismatch))

    async def _poison(self, reason: str) -> CorruptBlob:
        self.error = CorruptBlob(
            f"the blob {self.digest} is corrupt: {reason}; its origin served wrong bytes, or the cache's "
            "disk changed them: check both, then mount again"
        )
        self.chunks.clear()
        self._log.critical("{error} (no read of it succeeds from now on)", error=self.error)
        try:
            await self._directory.in_thread(self._directory.remove, self._file, self._path)
        except OSError as error:
            self._log.error("cannot remove the cache file {path}: {error}", path=self._path, error=error)
        return self.error
