"""One blob's file in the cache, shared by the processes that have it open.

Each writes the same bytes at the same places, and none cuts the file short: one that is found damaged is
unlinked, and a new one made in its place. A chunk's mark follows its bytes at once as `FRESH`, for the
processes of this boot, which see each other's writes in the page cache; and as `PRESENT` when the bytes are
safe on disk. What is fresh in a file that comes from another boot is not believed.

Everything here may block; `write`, `read_marks` and the claims go to the page cache and the kernel alone.
"""

from __future__ import annotations

import errno
import fcntl
import os
import stat
import struct
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import cache

import attrs

from erofs_twisted.blocks.chunks import ABSENT, FRESH, PRESENT, ChunkMap, runs_of
from erofs_twisted.blocks.header import (
    BLOCK,
    BOOT_AT,
    POISONED_AT,
    TRAILER_SIZE,
    VERIFIED_AT,
    BlobIdentity,
    DamagedFile,
    State,
    find_header,
)

_BOOT_ID = "/proc/sys/kernel/random/boot_id"
_FRESH = bytes((FRESH,))
_ABSENT = bytes((ABSENT,))
_PRESENT = bytes((PRESENT,))
_HASH_STEP = 1024 * 1024
_IOV_MAX = os.sysconf("SC_IOV_MAX")
_FLOCK = struct.Struct("@hhqqi0q")
"""struct flock, as fcntl(2) has it with 64-bit offsets: type, whence, start, length, pid."""


FAILURES = (OSError, MemoryError)
"""How a call to the kernel ends that came to nothing."""


def is_scarcity(error: BaseException) -> bool:
    """Is it memory that there was none of? There may be some in a moment."""
    return isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno == errno.ENOMEM)


def told(error: BaseException) -> str:
    """In words; a MemoryError has none."""
    return str(error) or "out of memory"


class OtherDigest(Exception):
    """The blob's bytes have another digest than they should."""


class UsedElsewhere(Exception):
    """A process of another boot has the file open: of another host, or of a container that has its own id."""


@attrs.frozen
class Synced:
    """What a sync found: the chunks that are there, and those known ones that are there no more."""

    there: ChunkMap
    lost: list[tuple[int, int]]
    marked: bool
    """Were chunks marked as present, so that these marks are to be synced in their turn?"""


@attrs.define
class BlobFile:
    """An open file of the cache."""

    identity: BlobIdentity
    fd: int
    verified: bool
    """Was the whole blob once found to have its digest?"""

    @classmethod
    def open(cls, path: str, identity: BlobIdentity) -> tuple[BlobFile, ChunkMap]:
        """The file and what is there of the blob; to be called while nobody else opens it.

        Raises FileNotFoundError, `DamagedFile`, `UsedElsewhere`, or another OSError.
        """
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
        try:
            status = os.fstat(fd)
            if not stat.S_ISREG(status.st_mode):
                raise DamagedFile("it is no file")
            find_header(os.pread(fd, TRAILER_SIZE, max(status.st_size - TRAILER_SIZE, 0)))
            if status.st_size != identity.file_size:
                raise DamagedFile("it has another size")
            block = os.pread(fd, BLOCK, identity.header_offset)
            if not block.startswith(identity.header()):
                raise DamagedFile("its header is not this blob's")
            state = State.of(block)
            if state.poisoned:
                raise DamagedFile("the blob was found to be corrupt")
            file = cls(identity, fd, state.verified)
            if state.boot != boot_id():
                file._enter_boot()
            chunks = file._there()
            if file.verified and not chunks.complete:
                raise DamagedFile("it was verified, but is not complete")
            fcntl.flock(fd, fcntl.LOCK_SH)
            file.touch()
        except BaseException:
            os.close(fd)
            raise
        return file, chunks

    @classmethod
    def create(cls, path: str, identity: BlobIdentity) -> BlobFile:
        """Make the file, which does not exist yet, with nothing of the blob in it. Raises OSError."""
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        try:
            os.ftruncate(fd, identity.file_size)
            # A mark always finds room, so that a full disk is met where data is written.
            os.posix_fallocate(fd, identity.header_offset, identity.file_size - identity.header_offset)
            _write_fully(fd, [identity.new_block(boot_id())], identity.header_offset)
            _write_fully(fd, [identity.trailer()], identity.file_size - TRAILER_SIZE)
            fcntl.flock(fd, fcntl.LOCK_SH)
        except BaseException:
            os.close(fd)
            os.unlink(path)
            raise
        return cls(identity, fd, verified=False)

    @classmethod
    def nowhere(cls, identity: BlobIdentity) -> BlobFile:
        """A file of that shape in no directory, for those who need one though nothing can be kept. Raises
        OSError."""
        fd = os.memfd_create(identity.digest, os.MFD_CLOEXEC)
        os.ftruncate(fd, identity.file_size)
        return cls(identity, fd, verified=False)

    def is_at(self, path: str) -> bool:
        """Is this still the file of that name?"""
        try:
            return os.path.samestat(os.stat(path, follow_symlinks=False), os.fstat(self.fd))
        except FileNotFoundError:
            return False

    def check(self) -> None:
        """Raises `DamagedFile` if the file was cut short, `OtherDigest` if another process found that."""
        self._check_size()
        if State.of(os.pread(self.fd, BLOCK, self.identity.header_offset)).poisoned:
            raise OtherDigest("another process has hashed it")

    def write(self, first: int, end: int, pieces: Sequence[bytes | memoryview]) -> None:
        """Write those of the whole chunks [first, end) that no process has written, and mark them as fresh.

        Raises OSError, also for a full disk, or `DamagedFile`.
        """
        # Writing behind the end of a file that was cut short would fill the gap with zeros.
        self._check_size()
        chunking = self.identity.chunking
        begin = chunking.start(first)
        absent = [
            (first + start, first + stop) for start, stop in runs_of(ABSENT, self.read_marks(first, end))
        ]
        data = None if absent == [(first, end)] else memoryview(b"".join(pieces))
        for start, stop in absent:
            if data is not None:
                pieces = [data[chunking.start(start) - begin : chunking.start(stop) - begin]]
            _write_fully(self.fd, pieces, chunking.start(start))
            self._put_marks(start, _FRESH * (stop - start))

    def read_marks(self, first: int, end: int) -> bytes:
        """The marks of the chunks [first, end) in the file; fewer, if it was cut short. Raises OSError."""
        return os.pread(self.fd, end - first, self.identity.marks_offset + first)

    def sync(self, known: ChunkMap) -> Synced:
        """Bring on disk what is fresh, whoever wrote it, and mark it as present.

        ``known`` are the chunks that the caller took to be there.

        If that fails it raises OSError, and what was fresh is there no more: after a failed sync the page
        cache may lose it. Also raises `DamagedFile`, and then there is nothing to be done.
        """
        before = self._all_marks()
        try:
            os.fdatasync(self.fd)
        except FAILURES as error:
            self._forget_fresh_after(error)
            raise
        after, marked = self._all_marks(), False
        for first, end in runs_of(FRESH, before):
            for start, stop in runs_of(FRESH, after[first:end]):
                self._put_marks(first + start, _PRESENT * (stop - start))
                marked = True
        there = ChunkMap.from_marks(after)
        lost: list[tuple[int, int]] = []
        if not there.complete:
            for first, end in known.runs_present(0, len(known)):
                lost += there.runs_missing(first, end)
        return Synced(there, lost, marked)

    def present(self) -> ChunkMap:
        """The chunks that are safe on disk. Raises `DamagedFile`, or OSError."""
        return ChunkMap.from_marks(self._all_marks(), with_fresh=False)

    def claim(self, first: int, end: int) -> bool:
        """Lock the marks of [first, end), without waiting; False if another open file has locked some.

        Where the file system knows no such locks, True.
        """
        return self._lock(fcntl.F_WRLCK, first, end)

    def release(self, first: int, end: int) -> None:
        """Unlock the marks of [first, end)."""
        self._lock(fcntl.F_UNLCK, first, end)

    def verify(self, cancelled: Callable[[], bool]) -> bool:
        """Hash the blob, which is all there and marked as present, unless another process has done so; False
        if ``cancelled`` said so before it was done.

        Raises `OtherDigest`, or OSError.
        """
        if os.pread(self.fd, 1, self.identity.header_offset + VERIFIED_AT) != _PRESENT:
            if not self.hash(cancelled):
                return False
            self.note_verified()
        self.verified = True
        return True

    def hash(self, cancelled: Callable[[], bool], advance: Callable[[int], None] = lambda _: None) -> bool:
        """As `verify`, whatever was found before, and nothing is noted. ``advance`` hears of bytes done."""
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
            advance(got)
        if found.hexdigest() != expected.encoded:
            raise OtherDigest(f"its bytes have the digest {expected.algorithm}:{found.hexdigest()}")
        return True

    def note_verified(self) -> None:
        """Tell the next who open the file that `hash` was content; all chunks are marked as present. Raises
        OSError."""
        os.fdatasync(self.fd)
        _write_fully(self.fd, [_PRESENT], self.identity.header_offset + VERIFIED_AT)

    def forget_pages(self) -> None:
        """Have what is read next come from the disk, as far as the kernel lets go of it."""
        os.posix_fadvise(self.fd, 0, 0, os.POSIX_FADV_DONTNEED)

    def poison(self) -> None:
        """Tell the other processes that the blob has another digest than it should. Raises OSError."""
        if os.fstat(self.fd).st_size == self.identity.file_size:
            _write_fully(self.fd, [_PRESENT], self.identity.header_offset + POISONED_AT)
            os.fdatasync(self.fd)

    def touch(self) -> None:
        """Say that the file was used now. Its time of last change tells, for that of last access may not be
        kept (noatime). Raises OSError."""
        os.utime(self.fd)

    def close(self) -> None:
        """Close the file, and give back its locks."""
        with suppress(OSError):
            self.touch()
        os.close(self.fd)

    def _enter_boot(self) -> None:
        """Forget what was fresh in another boot."""
        try:
            # A file that somebody has open is of this boot, unless other hosts use it too.
            fcntl.flock(self.fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UsedElsewhere from None
        self._forget_fresh()
        os.fdatasync(self.fd)
        _write_fully(self.fd, [boot_id()], self.identity.header_offset + BOOT_AT)
        os.fdatasync(self.fd)

    def _forget_fresh(self) -> None:
        for first, end in runs_of(FRESH, self._all_marks()):
            self._put_marks(first, _ABSENT * (end - first))

    def _forget_fresh_after(self, error: BaseException) -> None:
        try:
            self._forget_fresh()
        except FAILURES as worse:
            raise DamagedFile(f"{error}, and what may be lost of it cannot be marked ({worse})") from worse

    def _put_marks(self, first: int, marks: bytes) -> None:
        _write_fully(self.fd, [marks], self.identity.marks_offset + first)

    def _there(self) -> ChunkMap:
        return ChunkMap.from_marks(self._all_marks())

    def _all_marks(self) -> bytes:
        self._check_size()
        marks = self.read_marks(0, self.identity.chunking.count)
        if foreign := marks.translate(None, _ABSENT + _FRESH + _PRESENT):
            raise DamagedFile(f"its map has the byte 0x{foreign[0]:02x}")
        return marks

    def _check_size(self) -> None:
        if os.fstat(self.fd).st_size != self.identity.file_size:
            raise DamagedFile("it was cut short")

    def _lock(self, kind: int, first: int, end: int) -> bool:
        start = self.identity.marks_offset + first
        lock = _FLOCK.pack(kind, os.SEEK_SET, start, end - first, 0)
        try:
            fcntl.fcntl(self.fd, fcntl.F_OFD_SETLK, lock)
        except OSError as error:
            return error.errno not in (errno.EAGAIN, errno.EACCES)
        return True


def is_in_use(path: str) -> bool:
    """Does anybody have this file of the cache open? To be called while nobody opens it. Raises OSError."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(fd)
    return False


@cache
def boot_id() -> bytes:
    """The kernel's name for the time since it was started. Raises OSError."""
    with open(_BOOT_ID, "rb") as file:
        return file.read().strip()


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
