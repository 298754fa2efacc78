"""Which pages of a file are in memory, told without touching any of them."""

from __future__ import annotations

import ctypes
import mmap
import os
from time import monotonic

PAGE = mmap.PAGESIZE
AHEAD = 512 * 1024
"""Bytes that are looked at at a time where reads follow each other."""
KNOWN_SECONDS = 0.02
"""How long what was seen so is believed. A page that leaves memory meanwhile is read by sendfile, as one is
that leaves it between the look and the sending."""
MAP_FAILED = ctypes.c_void_p(-1).value

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = (
    ctypes.c_void_p,
    ctypes.c_size_t,
    ctypes.c_int,
    ctypes.c_int,
    ctypes.c_int,
    ctypes.c_longlong,
)
_libc.munmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t)
_mincore = _libc.mincore
_mincore.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p)


class Residency:
    """The pages of the open file ``fd``, by mincore(2) over a mapping that nobody reads through.

    The mapping holds the file itself, whatever becomes of ``fd``, until `close`. Raises OSError where the
    file cannot be mapped, or the system call is not allowed. Not for files of other users, unless we may
    write to them: of those the kernel says that all is in memory.

    cachestat(2) takes a third of the time, but counts pages that are still being read too.
    """

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._address = 0
        self._size = 0
        self._pages = bytearray()
        self._vector = 0
        self._known_from = self._known_to = 0
        self._known_until = 0.0
        self._asked_to = -1
        self._map()

    def covers(self, offset: int, length: int) -> bool:
        """Whether every page of [offset, offset + length) is in memory and can be read at once."""
        end = offset + length
        if self._known_from <= offset and end <= self._known_to and monotonic() < self._known_until:
            return True
        if end > self._size and not self._grown_to(end):
            return False
        start = offset - offset % PAGE
        stop = end
        if offset == self._asked_to:  # reads follow each other: look further, for those to come
            stop = min(max(end, start + AHEAD), self._size)
        self._asked_to = end
        count = (stop - start + PAGE - 1) // PAGE
        if count > len(self._pages):
            self._make_room(count)
        if _mincore(self._address + start, stop - start, self._vector):
            return False
        missing = self._pages.find(0, 0, count)
        known_to = stop if missing < 0 else start + missing * PAGE
        if stop > end:
            self._known_from, self._known_to = offset, known_to
            self._known_until = monotonic() + KNOWN_SECONDS
        return known_to >= end

    def close(self) -> None:
        """Give the mapping up. Idempotent."""
        self._known_to = 0
        if self._address:
            _libc.munmap(self._address, self._size)
            self._address = self._size = 0

    def _map(self) -> None:
        size = os.fstat(self._fd).st_size
        if not size:
            return  # there is nothing to map, and nothing to read either
        address = _libc.mmap(None, size, mmap.PROT_READ, mmap.MAP_SHARED, self._fd, 0)
        if address in (None, MAP_FAILED):
            raise _last_error()
        self._address, self._size = address, size
        self._make_room(1)
        if _mincore(address, 1, self._vector):
            error = _last_error()
            self.close()
            raise error

    def _grown_to(self, end: int) -> bool:
        if not self._address or os.fstat(self._fd).st_size < end:
            return False
        self.close()
        self._map()
        return end <= self._size

    def _make_room(self, count: int) -> None:
        self._pages = bytearray(count)
        self._vector = ctypes.addressof(ctypes.c_char.from_buffer(self._pages))


def _last_error() -> OSError:
    number = ctypes.get_errno()
    return OSError(number, os.strerror(number))
