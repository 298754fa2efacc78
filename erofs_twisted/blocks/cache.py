"""The cache directory: a file for each blob, shared by every process on the host.

What one process stores can be read at once by all, through the page cache. A little later a thread brings it
on disk; so a crash of the system costs the last seconds' chunks, one of a process nothing, and neither ever
yields a wrong byte.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeVar

import attrs
from twisted.internet.defer import Deferred
from twisted.internet.threads import deferToThreadPool
from twisted.logger import Logger

from erofs_twisted.blocks.blobfile import BlobFile, UsedElsewhere, is_in_use
from erofs_twisted.blocks.cached import CachedBlob, CorruptBlob
from erofs_twisted.blocks.chunks import CHUNK_SIZE, Chunking, ChunkMap
from erofs_twisted.blocks.header import BlobIdentity, DamagedFile, OtherVersion
from erofs_twisted.errors import MountError
from erofs_twisted.registry.digest import Digest

if TYPE_CHECKING:
    from twisted.python.threadpool import ThreadPool

__all__ = ["CacheDirectory", "CacheError", "CachedBlob", "CorruptBlob"]

_T = TypeVar("_T")


class CacheError(MountError):
    """The cache directory cannot be used."""


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
            except UsedElsewhere as error:
                raise CacheError(
                    f"a process of another system, or of a container with a boot id of its own, uses {path}; "
                    "a cache directory is for one system: choose another with --cache-dir"
                ) from error
            except OtherVersion as error:
                if error.newer and is_in_use(path):
                    raise CacheError(
                        f"{path} is in use: {error}; choose another directory with --cache-dir"
                    ) from error
                damage = str(error)
                os.unlink(path)
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
