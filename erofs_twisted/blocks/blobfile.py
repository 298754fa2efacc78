"""One blob's file in the cache: its bytes, sparse, then a map of the chunks that are there.

One file holds both, so that no crash can pair a map with other data. From byte 0 on it is the blob; at the
next multiple of 4096 comes a block with a header, and after that one byte a chunk. Several processes may
have the file open, each writes the same bytes at the same places, and none ever takes a mark back or cuts
the file short: a file that is found damaged is unlinked, and a new one made in its place.

Everything here blocks, except `BlobFile.write`, which goes to the page cache.
"""

from __future__ import annotations

import fcntl
import os
import stat
import struct
import zlib
from collections.abc import Callable, Iterable, Sequence

import attrs

from erofs_twisted.blocks.chunks import PRESENT, Chunking, ChunkMap
from erofs_twisted.registry.digest import Digest

MAGIC = b"EROFSTWM"
VERSION = 1

_BLOCK = 4096
_HEADER = struct.Struct("<8sHHIQ144s")
"""Magic, version, bits of the chunk size, header's CRC-32 (computed with 0 here), blob size, digest."""
_VERIFIED_AT = 255
_HASH_STEP = 1024 * 1024
_IOV_MAX = os.sysconf("SC_IOV_MAX")


class DamagedFile(Exception):
    """The file in the cache is not one of this blob, or not whole; it may be replaced."""


class OtherDigest(Exception):
    """The blob's bytes have another digest than they should."""


@attrs.frozen
class BlobIdentity:
    """Which blob a file holds."""

    digest: Digest
    chunking: Chunking


@attrs.define
class BlobFile:
    """An open file of the cache."""

    identity: BlobIdentity
    fd: int
    verified: bool
    """Was the whole blob once found to have its digest?"""

    @classmethod
    def open(cls, path: str, identity: BlobIdentity) -> tuple[BlobFile, ChunkMap]:
        """The file and its map. Raises FileNotFoundError, `DamagedFile`, or another OSError."""
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
        try:
            if not stat.S_ISREG(os.fstat(fd).st_mode) or os.fstat(fd).st_size != _file_size(identity):
                raise DamagedFile("it has another size")
            block = os.pread(fd, _BLOCK, _header_offset(identity))
            if not block.startswith(_header(identity)):
                raise DamagedFile("its header is not this blob's")
            file = cls(identity, fd, verified=block[_VERIFIED_AT] == PRESENT)
            chunks = file.read_map()
            if file.verified and not chunks.complete:
                raise DamagedFile("it was verified, but is not complete")
            fcntl.flock(fd, fcntl.LOCK_SH)
        except BaseException:
            os.close(fd)
            raise
        return file, chunks

    @classmethod
    def create(cls, path: str, identity: BlobIdentity) -> BlobFile:
        """Make the file, which does not exist yet, with nothing of the blob in it. Raises OSError."""
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        try:
            os.ftruncate(fd, _file_size(identity))
            _write_fully(fd, [_header(identity)], _header_offset(identity))
            fcntl.flock(fd, fcntl.LOCK_SH)
        except BaseException:
            os.close(fd)
            os.unlink(path)
            raise
        return cls(identity, fd, verified=False)

    def is_at(self, path: str) -> bool:
        """Is this still the file of that name?"""
        try:
            return os.path.samestat(os.stat(path, follow_symlinks=False), os.fstat(self.fd))
        except FileNotFoundError:
            return False

    def write(self, offset: int, pieces: Sequence[bytes | memoryview]) -> None:
        """Write a part of the blob, without a mark. Raises OSError, also for a full disk."""
        _write_fully(self.fd, pieces, offset)

    def read_map(self) -> ChunkMap:
        """The chunks that are marked on disk, by any process. Raises `DamagedFile`."""
        count = self.identity.chunking.count
        data = os.pread(self.fd, count, _map_offset(self.identity))
        try:
            if len(data) != count:
                raise ValueError("cut short")
            return ChunkMap.from_bytes(data)
        except ValueError as error:
            raise DamagedFile(f"its map is not one ({error})") from error

    def mark(self, runs: Iterable[tuple[int, int]]) -> None:
        """Mark chunks [first, end) that were written, once their bytes are safe on disk. Raises OSError."""
        os.fdatasync(self.fd)
        for first, end in runs:
            _write_fully(self.fd, [bytes((PRESENT,)) * (end - first)], _map_offset(self.identity) + first)

    def verify(self, cancelled: Callable[[], bool]) -> bool:
        """Hash the blob, which is all there; False if ``cancelled`` said so before it was done.

        Raises `OtherDigest`, or OSError.
        """
        expected, size = self.identity.digest, self.identity.chunking.size
        found = expected.hasher()
        buffer = memoryview(bytearray(min(_HASH_STEP, size)))
        offset = 0
        while offset < size:
            if cancelled():
                return False
            got = os.preadv(self.fd, [buffer[: size - offset]], offset)
            if not got:
                raise OtherDigest(f"the cached copy ends at byte {offset}")
            found.update(buffer[:got])
            offset += got
        if found.hexdigest() != expected.encoded:
            raise OtherDigest(f"its bytes have the digest {expected.algorithm}:{found.hexdigest()}")
        os.fdatasync(self.fd)
        _write_fully(self.fd, [bytes((PRESENT,))], _header_offset(self.identity) + _VERIFIED_AT)
        self.verified = True
        return True

    def close(self) -> None:
        """Close the file, and give back its lock."""
        os.close(self.fd)


def _header_offset(identity: BlobIdentity) -> int:
    return -(-identity.chunking.size // _BLOCK) * _BLOCK


def _map_offset(identity: BlobIdentity) -> int:
    return _header_offset(identity) + _BLOCK


def _file_size(identity: BlobIdentity) -> int:
    return _map_offset(identity) + identity.chunking.count


def _header(identity: BlobIdentity) -> bytes:
    chunking = identity.chunking

    def packed(crc: int) -> bytes:
        digest = identity.digest.encode("ascii")
        return _HEADER.pack(MAGIC, VERSION, chunking.bits, crc, chunking.size, digest)

    return packed(zlib.crc32(packed(0)))


def _write_fully(fd: int, pieces: Sequence[bytes | memoryview], offset: int) -> None:
    length = sum(map(len, pieces))
    if len(pieces) > _IOV_MAX:
        pieces = [b"".join(pieces)]
    written = os.pwritev(fd, pieces, offset)
    if written < length:
        # A short write says that the next one will fail, with the reason.
        rest = memoryview(b"".join(pieces))
        while written < length:
            written += os.pwrite(fd, rest[written:], offset + written)
