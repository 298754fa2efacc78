"""The files in a cache directory: opened, counted, and evicted when there is no room. All of it blocks."""

from __future__ import annotations

import errno
import fcntl
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import attrs

from erofs_twisted.blocks.blobfile import BlobFile, UsedElsewhere, is_in_use
from erofs_twisted.blocks.chunks import ChunkMap
from erofs_twisted.blocks.header import BlobIdentity, DamagedFile, OtherVersion
from erofs_twisted.errors import MountError
from erofs_twisted.registry.digest import HEX_LENGTH, Digest
from erofs_twisted.registry.errors import InvalidDigest

RESERVE_SHARE = 20
"""One part in so many of the file system is left free,"""
RESERVE_MOST = 1 << 30
"""but no more bytes than this."""

NO_SPACE = frozenset({errno.ENOSPC, errno.EDQUOT})
_STAT_BLOCK = 512


class CacheError(MountError):
    """The cache directory cannot be used."""


@attrs.frozen
class Opened:
    """A blob's file, and what there is to say about it."""

    file: BlobFile
    chunks: ChunkMap
    damage: str = ""
    """Why the file that was there before was dropped."""
    kept: bool = True
    """False: there is no room for a file, and this one can keep nothing."""


@attrs.frozen
class Entry:
    """A blob's file in the directory."""

    digest: Digest
    path: str
    allocated: int
    """Bytes that it takes on the disk."""
    last_used: float
    """In seconds since 1970."""
    in_use: bool


@attrs.frozen
class CacheFiles:
    """The files below ``path``: ``sha256/HEX`` holds the blob ``sha256:HEX``. Others are left alone.

    ``limit`` is how many bytes of the disk they may take, None: any number. Whatever it is, a reserve of the
    file system stays free.
    """

    path: str
    limit: int | None = None

    def path_of(self, digest: Digest) -> str:
        return os.path.join(self.path, digest.algorithm, digest.encoded)

    def open(self, identity: BlobIdentity) -> Opened:
        """Open a blob's file, or make it. Raises `CacheError`."""
        try:
            os.makedirs(self.path, 0o700, exist_ok=True)
            with self.locked():
                try:
                    return self._open_or_create(identity)
                except OSError as error:
                    if error.errno not in NO_SPACE:
                        raise
                self._evict(identity.file_size - identity.header_offset)
                try:
                    return self._open_or_create(identity)
                except OSError as error:
                    if error.errno not in NO_SPACE:
                        raise
                    chunks = ChunkMap(identity.chunking.count)
                    return Opened(BlobFile.nowhere(identity), chunks, kept=False)
        except OSError as error:
            raise self.unusable(error) from error

    def remove(self, file: BlobFile, path: str) -> None:
        """Unlink an open file, unless another took its name meanwhile. Raises OSError, `CacheError`."""
        with self.locked():
            if file.is_at(path):
                os.unlink(path)

    def entries(self) -> list[Entry]:
        """All blobs. Raises OSError, `CacheError`."""
        with self.locked():
            return list(self._entries())

    def open_again(self, entry: Entry, identity: BlobIdentity) -> tuple[BlobFile, ChunkMap]:
        """Open a file that is there. Raises `DamagedFile`, `UsedElsewhere`, or OSError."""
        with self.locked():
            return BlobFile.open(entry.path, identity)

    def evict(self, entry: Entry) -> bool:
        """Unlink a blob's file, unless it is in use. Raises OSError, `CacheError`."""
        with self.locked():
            return _unlink_if_idle(entry.path)

    def make_room(self, wanted: int, *, disk_is_full: bool = False) -> int:
        """Evict what is not in use, least recently used first, until ``wanted`` bytes can be stored.

        How many there are room for then, as far as can be seen, at most ``wanted``. ``disk_is_full``: there
        was no space on it a moment ago, whatever the file system says that is free. Raises OSError,
        `CacheError`.
        """
        with self.locked():
            if disk_is_full:
                self._evict(wanted)
            room = self._room()
            if room < wanted:
                self._evict(wanted - room)
                room = self._room()
            return max(min(room, wanted), 0)

    def room(self) -> int:
        """How many bytes can be stored if all that is not in use is evicted. Raises OSError, `CacheError`."""
        with self.locked():
            idle = sum(entry.allocated for entry in self._entries() if not entry.in_use)
            return max(self._room() + idle, 0)

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Nobody else opens, makes or unlinks a file here meanwhile. Raises OSError, `CacheError`."""
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

    def unusable(self, error: OSError) -> CacheError:
        return CacheError(
            f"cannot use the cache directory {self.path}: {error}; choose another with --cache-dir"
        )

    def _open_or_create(self, identity: BlobIdentity) -> Opened:
        path, damage = self.path_of(identity.digest), ""
        os.makedirs(os.path.dirname(path), 0o700, exist_ok=True)
        try:
            return Opened(*BlobFile.open(path, identity))
        except FileNotFoundError:
            pass
        except UsedElsewhere as error:
            raise CacheError(
                f"a process of another system, or of a container with a boot id of its own, uses {path}; "
                "a cache directory is for one system: choose another with --cache-dir"
            ) from error
        except DamagedFile as error:
            if isinstance(error, OtherVersion) and error.newer and is_in_use(path):
                raise CacheError(f"{path} is in use: {error}; choose another with --cache-dir") from error
            damage = str(error)
            os.unlink(path)
        return Opened(BlobFile.create(path, identity), ChunkMap(identity.chunking.count), damage)

    def _entries(self) -> Iterator[Entry]:
        for algorithm in HEX_LENGTH:
            try:
                names = sorted(os.listdir(os.path.join(self.path, algorithm)))
            except FileNotFoundError:
                continue
            for name in names:
                with suppress(InvalidDigest, FileNotFoundError):
                    digest = Digest.parse(f"{algorithm}:{name}")
                    path = self.path_of(digest)
                    status = os.stat(path, follow_symlinks=False)
                    if stat.S_ISREG(status.st_mode):
                        size = status.st_blocks * _STAT_BLOCK
                        yield Entry(digest, path, size, status.st_mtime, is_in_use(path))

    def _room(self) -> int:
        """How many bytes can be stored as it is; negative, if there are too many already."""
        system = os.statvfs(self.path)
        reserve = min(system.f_blocks * system.f_frsize // RESERVE_SHARE, RESERVE_MOST)
        free = system.f_bavail * system.f_frsize - reserve
        if self.limit is None:
            return free
        return min(free, self.limit - sum(entry.allocated for entry in self._entries()))

    def _evict(self, wanted: int) -> None:
        idle = [entry for entry in self._entries() if not entry.in_use]
        for entry in sorted(idle, key=lambda entry: entry.last_used):
            if wanted <= 0:
                return
            if _unlink_if_idle(entry.path):
                wanted -= entry.allocated


def _unlink_if_idle(path: str) -> bool:
    try:
        if is_in_use(path):
            return False
        os.unlink(path)
    except FileNotFoundError:
        return False
    return True
