"""What is served from files without a wait for their disk, and threads that wait for it.

A page that is not in memory is read in from the disk, and whoever touches it waits. On the reactor's thread
that would hold up every client of every export, also those whose bytes are at hand. So a file is looked at
first; what is missing is read in by a thread, and sent afterwards.
"""

from __future__ import annotations

import errno
import os
import time
from collections import deque
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import attrs
from twisted.internet.defer import Deferred, fail
from twisted.logger import Logger
from twisted.python.failure import Failure

from erofs_twisted.errors import ReadError
from erofs_twisted.interfaces import FileSpan, Segment
from erofs_twisted.nbd.residency import Residency
from erofs_twisted.nbd.transport import Sendable
from erofs_twisted.pool import SystemCallPool

THREADS = 32
"""Readings at any one time."""

THREADS_PER_DISK = 8
"""Of those, for one disk: the others are left to the disks that still answer."""

PIECE = 1 << 20
"""Bytes that a thread reads at a time."""

PATIENCE = 1.0
"""Seconds that the end waits for threads; those that a disk holds longer are left to it."""

SCARCE = (0.1, 0.2, 0.4, 0.8, 1.6)
"""Seconds that a thread waits before it tries again where the kernel has no memory for what it reads."""

_NOWAIT = os.RWF_NOWAIT


@attrs.define(eq=False)
class _Reading:
    """A range of a file that is to be read in. ``keep`` is whether its bytes are wanted here too."""

    span: FileSpan
    keep: bool
    done: Deferred[bytearray | None]


@attrs.define(eq=False)
class _Disk:
    waiting: deque[_Reading] = attrs.field(factory=deque)
    running: int = 0


class DiskReaders:
    """Threads that read spans of files in. They start when they are needed, and end with `stop`.

    ``make_pool`` is for tests. All but the reading itself is on the reactor's thread.
    """

    def __init__(self, reactor: Any, make_pool: Callable[[], Any] | None = None) -> None:
        self._reactor = reactor
        self._make_pool = make_pool or self._system_call_pool
        self._pool: Any = None
        self._disks: dict[int, _Disk] = {}

    def read(self, span: FileSpan, *, keep: bool) -> Deferred[bytearray | None]:
        """Read ``span`` in; the Deferred fires with its bytes if they are to be kept, else with None.

        It fails with `ReadError` where the disk does. Until it fires or is cancelled the span must be valid.
        Cancelling it leaves a thread that waits for the disk to itself.
        """
        try:
            device = os.fstat(span.fd).st_dev
        except OSError as error:
            return fail(ReadError(f"file descriptor {span.fd}: {error.strerror}"))
        disk = self._disks.setdefault(device, _Disk())
        reading = _Reading(span, keep, Deferred(lambda _: self._withdraw(disk, reading)))
        disk.waiting.append(reading)
        self._start(disk)
        return reading.done

    async def stop(self) -> None:
        """End the threads, or leave them behind after `PATIENCE`: what they read from is theirs."""
        pool, self._pool = self._pool, None
        if pool is not None:
            await pool.stop()

    def _start(self, disk: _Disk) -> None:
        while disk.waiting and disk.running < THREADS_PER_DISK:
            reading = disk.waiting.popleft()
            try:
                # The file is closed, and its number another's, when it is served no longer. A thread that
                # a disk holds for longer than that has a number of its own.
                fd = os.dup(reading.span.fd)
            except OSError as error:
                reading.done.errback(ReadError(f"file descriptor {reading.span.fd}: {error.strerror}"))
                continue
            disk.running += 1
            if self._pool is None:
                self._pool = self._make_pool()
            self._pool.callInThreadWithCallback(
                partial(self._settle, disk, reading),
                _read_and_close,
                fd,
                reading.span.offset,
                reading.span.length,
                reading.keep,
            )

    def _settle(self, disk: _Disk, reading: _Reading, _: bool, result: bytearray | Failure | None) -> None:
        """In the thread."""
        self._reactor.callFromThread(self._ended, disk, reading, result)

    def _ended(self, disk: _Disk, reading: _Reading, result: bytearray | Failure | None) -> None:
        disk.running -= 1
        if not reading.done.called:
            if isinstance(result, Failure):
                reading.done.errback(result)
            else:
                reading.done.callback(result)
        self._start(disk)

    def _withdraw(self, disk: _Disk, reading: _Reading) -> None:
        if reading in disk.waiting:
            disk.waiting.remove(reading)

    def _system_call_pool(self) -> SystemCallPool:
        return SystemCallPool(self._reactor, THREADS, PATIENCE, name="disk-reads")


class FilePages:
    """The open file ``fd``, as one client is served from it. To be asked on the reactor's thread, where it
    never waits for a disk, and only as long as spans of the file are valid."""

    _log = Logger()

    has: Callable[[int, int], bool]
    """Whether a range, an offset and a length, is in memory."""

    def __init__(self, fd: int, readers: DiskReaders) -> None:
        self._fd = fd
        self._readers = readers
        self._residency: Residency | None = None
        self._reading = 0
        self._takes_nowait = True
        try:
            self._residency = Residency(fd)
            self.has = self._residency.covers
        except OSError as error:
            self.has = _cannot_tell
            self._log.info(
                "it cannot be told what of file descriptor {fd} is in memory ({error}): threads read what is "
                "served from it",
                fd=fd,
                error=error,
            )

    def peek(self, offset: int, length: int) -> bytes | bytearray | None:
        """The bytes of a range, if all of them are in memory, else None."""
        if self._takes_nowait and not self._reading:
            data = bytearray(length)
            try:
                count = os.preadv(self._fd, (data,), offset, _NOWAIT)
            except OSError as error:
                if error.errno != errno.EOPNOTSUPP:
                    return None  # EAGAIN: not all is there. Whatever else it is, a thread will find out.
                self._takes_nowait = False
            else:
                return data if count == length else None
        # RWF_NOWAIT is not for every file system. And each time that it says no, it has also told the disk
        # to read: a disk that is behind makes it wait to be told.
        if not self.has(offset, length):
            return None
        found = os.pread(self._fd, length, offset)
        return found if len(found) == length else None

    def bring(self, span: FileSpan, *, keep: bool) -> Deferred[Sendable]:
        """Have a span of this file read in: the bytes where they are to be kept or it cannot be told what of
        the file is in memory, else the span. The Deferred fails with `ReadError`."""
        self._reading += 1
        bytes_or_none = self._readers.read(span, keep=keep or self._residency is None)
        return bytes_or_none.addBoth(self._brought, span)

    def close(self) -> None:
        """Let go of the file."""
        if self._residency is not None:
            self._residency.close()
            self._residency = None

    def _brought(self, result: bytearray | Failure | None, span: FileSpan) -> Sendable | Failure:
        self._reading -= 1
        return span if result is None else result


class Files(dict[int, FilePages]):
    """The files that one client is served from, by their descriptors; they are met as they come."""

    def __init__(self, readers: DiskReaders) -> None:
        super().__init__()
        self._readers = readers

    def __missing__(self, fd: int) -> FilePages:
        pages = self[fd] = FilePages(fd, self._readers)
        return pages

    async def load(self, segments: Sequence[Segment], inline: int) -> list[Sendable]:
        """Have ``segments`` read in; spans of up to ``inline`` bytes become bytes. Raises `ReadError`."""
        loaded: list[Sendable] = []
        for each in segments:
            if isinstance(each, FileSpan):
                loaded.append(await self[each.fd].bring(each, keep=each.length <= inline))
            else:
                loaded.append(each)
        return loaded

    def bring_again(self, span: FileSpan) -> Deferred[Sendable] | None:
        """Have a span read in that was in memory a while ago; None where it still is."""
        pages = self[span.fd]
        return None if pages.has(span.offset, span.length) else pages.bring(span, keep=False)

    def close(self) -> None:
        """Let go of all of them. Readings under way have to be cancelled before."""
        for pages in self.values():
            pages.close()
        self.clear()


def _cannot_tell(offset: int, length: int) -> bool:
    return False


def _read_and_close(fd: int, offset: int, length: int, keep: bool) -> bytearray | None:
    pauses = iter(SCARCE)
    try:
        while True:
            try:
                return _read(fd, offset, length, keep)
            except OSError as error:
                if error.errno != errno.ENOMEM or (pause := next(pauses, None)) is None:
                    raise
                time.sleep(pause)
    except OSError as error:
        raise ReadError(f"cannot read {_name(fd)}: {error.strerror}") from error
    finally:
        os.close(fd)


def _read(fd: int, offset: int, length: int, keep: bool) -> bytearray | None:
    buffer = bytearray(length if keep else min(length, PIECE))
    view = memoryview(buffer)
    done = 0
    while done < length:
        start = done if keep else 0
        count = os.preadv(fd, (view[start : start + min(PIECE, length - done)],), offset + done)
        if not count:
            raise ReadError(f"{_name(fd)} has {done} of {length} bytes at {offset}")
        done += count
    return buffer if keep else None


def _name(fd: int) -> str:
    return os.readlink(f"/proc/self/fd/{fd}")
