"""A walk through all of an image's inodes and directories, by whoever has its bytes; it reads nothing itself.

What it looks at is what the kernel reads for ``find`` and ``ls -lR``: inodes, directories, links' targets,
shared extended attributes; and, since a file's first read needs it and it lies with the inode, where the data
of each file is. Not the data.
"""

from __future__ import annotations

import stat
from array import array
from typing import NamedTuple

import attrs

from erofs_twisted.erofs.directory import entries
from erofs_twisted.erofs.inode import (
    EXTENDED_SIZE,
    NID_IN_METABOX,
    SHARED_XATTR_UNIT,
    SLOT,
    Inode,
    MetadataError,
    is_plain_file,
    shared_xattrs,
    xattr_entry_size,
)
from erofs_twisted.erofs.superblock import SUPERBLOCK_OFFSET, Superblock

ByteRange = tuple[int, int]
"""[start, end)."""

_XATTR_ENTRY = 4
_SHARED_HEADER = 12 + 4 * 255
_WRAP = (1 << 64) - 1


@attrs.frozen
class WalkLimits:
    """Where a walk ends, so that no image, damaged or made for it, holds it up."""

    inodes: int = 1 << 20
    directory_bytes: int = 128 * 1024 * 1024
    map_size: int = 64 * 1024
    """What is wanted of a single file's map at most: its reads will bring the rest."""
    shared_xattrs: int = 1 << 16
    granules: int = 1 << 17
    """Wanted in all; what lies in others is left out."""


class Walk:
    """`look` says what it looks at next; then `take` gives it the bytes, or `postpone` puts that off.

    What was put off is `wanted`, in whole granules; once `arrived` says that a granule is there, it is looked
    at again. The walk has ended when there is nothing to look at, and nothing that it waits for: what it has
    seen until then is all there is, or `trouble` says why not.

    It keeps 8 bytes for each inode that it is to look at, a number for each directory it has been in, and a
    little for each granule that it waits for.
    """

    def __init__(
        self, superblock: Superblock, size: int, granule: int, limits: WalkLimits | None = None
    ) -> None:
        self.inodes = 0
        """Seen; one with several names counts several times."""
        self.trouble: list[str] = []
        """What is damaged, or beyond a limit: the first few."""
        self._block_size = superblock.block_size
        self._meta = superblock.meta_block * superblock.block_size
        self._xattrs = superblock.xattr_block * superblock.block_size
        self._metabox = "metabox" in superblock.features
        self._size = size
        self._granule = granule
        self._limits = limits or WalkLimits()
        self._inodes_left = self._limits.inodes
        self._directory_bytes_left = self._limits.directory_bytes
        self._ready = _Work()
        self._waiting: dict[int, _Work] = {}
        """By a granule that has not arrived."""
        self._arrived: set[int] = set()
        self._wanted: set[int] = set()
        """Since the last call of `wanted`."""
        self._asked: set[int] = set()
        self._been_in: set[int] = set()
        self._shared: set[int] = set()
        self._current: _Item | None = None
        self._add_inode(superblock.root_nid)

    @property
    def directories(self) -> int:
        """Seen."""
        return len(self._been_in)

    def look(self) -> ByteRange | None:
        """The next bytes to look at; None if there are none for now. After it comes `take` or `postpone`."""
        item = self._current = self._ready.pop(self._block_size)
        if item is None:
            return None
        return item.offset, min(item.offset + item.length, self._size)

    def take(self, data: bytes) -> None:
        """The bytes that it looked for."""
        item = self._current
        assert item is not None
        self._arrived.add(item.offset // self._granule)
        try:
            if item.kind == _INODE:
                self._see_inode(item.offset, data)
            elif item.kind == _DIRECTORY:
                self._see_directory(data)
            elif item.kind == _XATTRS:
                self._see_xattrs(data)
            else:
                self._touch(item.offset, xattr_entry_size(data))
        except MetadataError as error:
            self._note(f"{error} (byte {item.offset})")

    def postpone(self) -> None:
        """The bytes that it looked for are not there."""
        item = self._current
        assert item is not None
        missing = self._missing(item.offset, item.length)
        if not missing:
            self._note(f"what has arrived at byte {item.offset} cannot be read")
            return
        if self._want(missing):
            self._waiting.setdefault(missing[0], _Work()).push(item)

    def wanted(self) -> list[ByteRange]:
        """What is wanted that was not so at the last call: ranges of whole granules, in order and apart."""
        runs: list[ByteRange] = []
        for granule in sorted(self._wanted):
            start = granule * self._granule
            end = min(start + self._granule, self._size)
            if runs and runs[-1][1] == start:
                runs[-1] = (runs[-1][0], end)
            else:
                runs.append((start, end))
        self._asked |= self._wanted
        self._wanted.clear()
        return runs

    def arrived(self, start: int, end: int) -> None:
        """The granules of a range can be read now, if they ever can."""
        for granule in range(start // self._granule, -(-end // self._granule)):
            self._arrived.add(granule)
            waiting = self._waiting.pop(granule, None)
            if waiting is not None:
                self._ready.extend(waiting)

    def _see_inode(self, place: int, data: bytes) -> None:
        if is_plain_file(data):
            self.inodes += 1
            return
        inode = Inode.parse(data)
        self.inodes += 1
        if inode.xattr_size:
            self._push(_XATTRS, place + inode.header_size, min(inode.xattr_size, _SHARED_HEADER))
        if inode.is_directory:
            if place in self._been_in:
                return
            self._been_in.add(place)
            for offset, length in inode.runs(place, self._block_size):
                self._add_directory(offset, length)
        elif inode.kind == stat.S_IFLNK and not inode.is_compressed:
            for offset, length in inode.runs(place, self._block_size):
                self._touch(offset, min(length, self._block_size))
        else:
            self._touch(place, min(inode.map_size(place, self._block_size), self._limits.map_size))

    def _see_directory(self, block: bytes) -> None:
        for nid, _, name in entries(block):
            if name not in (b".", b".."):
                self._add_inode(nid)

    def _see_xattrs(self, body: bytes) -> None:
        for number in shared_xattrs(body):
            if number not in self._shared and len(self._shared) < self._limits.shared_xattrs:
                self._shared.add(number)
                self._push(_SHARED, self._xattrs + number * SHARED_XATTR_UNIT, _XATTR_ENTRY)

    def _add_inode(self, nid: int) -> None:
        if self._metabox and nid & NID_IN_METABOX:
            self._note("its inodes are compressed, in a metabox")
            return
        if not self._inodes_left:
            self._stop(f"it has more than {self._limits.inodes} inodes")
            return
        self._inodes_left -= 1
        # As the kernel reckons: numbers before the first block of the inodes have wrapped around.
        self._push(_INODE, (self._meta + nid * SLOT) & _WRAP, EXTENDED_SIZE)

    def _add_directory(self, offset: int, length: int) -> None:
        if length > self._directory_bytes_left:
            self._stop(f"its directories have more than {self._limits.directory_bytes} bytes")
            return
        self._directory_bytes_left -= length
        if offset + length > self._size:
            self._note(f"a directory of {length} bytes at byte {offset} is beyond its end")
            return
        self._push(_DIRECTORY, offset, length)

    def _push(self, kind: int, offset: int, length: int) -> None:
        if SUPERBLOCK_OFFSET <= offset < self._size:
            self._ready.push(_Item(kind, offset, length))
        else:
            self._note(f"byte {offset} is not within its {self._size} bytes")

    def _touch(self, offset: int, length: int) -> None:
        """Want what need not be looked at."""
        if 0 <= offset < self._size:
            self._want(self._missing(offset, length))

    def _want(self, granules: list[int]) -> bool:
        """False if they are beyond the limit."""
        for granule in granules:
            if granule not in self._asked and granule not in self._wanted:
                if len(self._asked) + len(self._wanted) >= self._limits.granules:
                    self._note(f"it is spread over more than {self._limits.granules} places")
                    return False
                self._wanted.add(granule)
        return True

    def _missing(self, offset: int, length: int) -> list[int]:
        """The granules of a range that have not arrived."""
        end = min(offset + max(length, 1), self._size)
        touched = range(offset // self._granule, -(-end // self._granule))
        return [granule for granule in touched if granule not in self._arrived]

    def _stop(self, trouble: str) -> None:
        """A limit is reached: look at nothing more."""
        self._note(trouble)
        self._ready = _Work()
        self._waiting.clear()

    def _note(self, trouble: str) -> None:
        if len(self.trouble) < _TROUBLES and trouble not in self.trouble:
            self.trouble.append(trouble)


_TROUBLES = 5
_INODE, _DIRECTORY, _XATTRS, _SHARED = range(4)


class _Item(NamedTuple):
    """Something to look at."""

    kind: int
    offset: int
    length: int


class _Work:
    """Items, the last first, except that directories wait for all the rest: so there are never many."""

    __slots__ = ("_inodes", "_others", "_runs")

    def __init__(self) -> None:
        self._inodes = array("Q")
        self._runs = array("Q")
        """Offset and length of each."""
        self._others: list[_Item] = []

    def push(self, item: _Item) -> None:
        if item.kind == _INODE:
            self._inodes.append(item.offset)
        elif item.kind == _DIRECTORY:
            self._runs.append(item.offset)
            self._runs.append(item.length)
        else:
            self._others.append(item)

    def extend(self, other: _Work) -> None:
        self._inodes.extend(other._inodes)
        self._runs.extend(other._runs)
        self._others.extend(other._others)

    def pop(self, block_size: int) -> _Item | None:
        """The next item; of directories, a block at a time."""
        if self._others:
            return self._others.pop()
        if self._inodes:
            return _Item(_INODE, self._inodes.pop(), EXTENDED_SIZE)
        if not self._runs:
            return None
        length, offset = self._runs.pop(), self._runs.pop()
        if length > block_size:
            self._runs.extend((offset + block_size, length - block_size))
            length = block_size
        return _Item(_DIRECTORY, offset, length)
