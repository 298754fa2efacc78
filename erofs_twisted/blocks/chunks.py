"""A blob is cached by chunks: which ones a byte range touches, and which ones are there."""

from __future__ import annotations

import re
from collections.abc import Iterator

import attrs

CHUNK_SIZE = 4 * 1024
"""What a small blob is cut in: the blocks of its file system, for its metadata may lie scattered."""
MAX_CHUNK_SIZE = 64 * 1024
MANY_CHUNKS = 1 << 19
"""Beyond these, chunks are larger, up to `MAX_CHUNK_SIZE`, so that the maps of large blobs stay small."""

ABSENT = 0x00
"""A chunk's mark, one byte: it is not there."""
PRESENT = 0xC5
"""It is there, and safe on disk. A block that a crash left with other data is not likely to be full of it."""
FRESH = 0x3A
"""It was written by some process of this boot, and may not be safe on disk yet."""

_VALUES = bytes((ABSENT, PRESENT))
_FRESH_AS_PRESENT = bytes.maketrans(bytes((FRESH,)), bytes((PRESENT,)))
_FRESH_AS_ABSENT = bytes.maketrans(bytes((FRESH,)), bytes((ABSENT,)))


def chunk_size_for(size: int) -> int:
    """Into what a blob of ``size`` bytes is best cut. Every process must find the same."""
    chunk_size = CHUNK_SIZE
    while chunk_size < MAX_CHUNK_SIZE and size > chunk_size * MANY_CHUNKS:
        chunk_size *= 2
    return chunk_size


@attrs.frozen
class Chunking:
    """How a blob of ``size`` bytes is cut: ``chunk_size`` is a power of two, the last chunk is shorter."""

    size: int
    chunk_size: int = CHUNK_SIZE
    bits: int = attrs.field(init=False)
    """The chunk that holds byte ``n`` is ``n >> bits``."""
    count: int = attrs.field(init=False)

    def __attrs_post_init__(self) -> None:
        if self.size < 0 or self.chunk_size < 1 or self.chunk_size & (self.chunk_size - 1):
            raise ValueError(f"cannot cut {self.size} bytes in chunks of {self.chunk_size}")
        object.__setattr__(self, "bits", self.chunk_size.bit_length() - 1)
        object.__setattr__(self, "count", -(-self.size // self.chunk_size))

    def span(self, offset: int, length: int) -> tuple[int, int]:
        """The chunks [first, end) that hold [offset, offset + length); length > 0."""
        return offset >> self.bits, ((offset + length - 1) >> self.bits) + 1

    def start(self, chunk: int) -> int:
        """The first byte of a chunk; of the chunk after the last, the blob's end."""
        return min(chunk << self.bits, self.size)

    def whole(self, first: int, length: int) -> int:
        """Of ``length`` bytes from the start of the chunk ``first`` on, the end of the whole chunks."""
        end = self.start(first) + length
        return self.count if end == self.size else end >> self.bits

    def length(self, first: int, end: int | None = None) -> int:
        """Bytes of the chunks [first, end); of one chunk, where no end is given."""
        return self.start(first + 1 if end is None else end) - self.start(first)


class ChunkMap:
    """Which of ``count`` chunks are there.

    One byte a chunk, in memory as on disk: 256 KiB a GiB buy a search in C on the path of every read, and a
    process can write its own chunks' bytes on disk without touching those that another one writes.
    """

    __slots__ = ("_flags", "_missing", "complete")

    complete: bool
    """Is every chunk there? Kept up to date, to be read on the path of every read."""

    def __init__(self, count: int) -> None:
        self._flags = bytearray(count)
        self._missing = count
        self.complete = not count

    @classmethod
    def from_bytes(cls, data: bytes | bytearray) -> ChunkMap:
        """The map that `to_bytes` gave. Raises ValueError for bytes that no map consists of."""
        if foreign := data.translate(None, _VALUES):
            raise ValueError(f"0x{foreign[0]:02x} is no chunk's mark")
        chunks = cls(len(data))
        chunks._flags[:] = data
        chunks._count()
        return chunks

    @classmethod
    def from_marks(cls, marks: bytes, *, with_fresh: bool = True) -> ChunkMap:
        """What a file's marks say is there. Raises ValueError for a byte that is no mark."""
        return cls.from_bytes(marks.translate(_FRESH_AS_PRESENT if with_fresh else _FRESH_AS_ABSENT))

    def copy(self) -> ChunkMap:
        """A map of its own of the same chunks."""
        return ChunkMap.from_bytes(self._flags)

    def to_bytes(self) -> bytes:
        """A byte a chunk, `PRESENT` or `ABSENT`."""
        return bytes(self._flags)

    def __len__(self) -> int:
        return len(self._flags)

    @property
    def missing(self) -> int:
        """How many chunks are not there."""
        return self._missing

    def present(self, first: int, end: int) -> bool:
        """Are all of the chunks [first, end) there?"""
        return self._flags.find(ABSENT, first, end) < 0

    def set(self, first: int, end: int) -> None:
        """The chunks [first, end), which exist, are there now."""
        self._missing -= self._flags.count(ABSENT, first, end)
        self._flags[first:end] = bytes((PRESENT,)) * (end - first)
        self.complete = not self._missing

    def take_over(self, first: int, marks: bytes) -> bool:
        """The chunks from ``first`` on that a file's marks show are there now; True if that is any more."""
        missing = self._missing
        for mark in (PRESENT, FRESH):
            for start, end in runs_of(mark, marks):
                self.set(first + start, first + end)
        return self._missing < missing

    def merge(self, other: ChunkMap) -> None:
        """What is there in ``other``, of the same length, is there now."""
        ours, theirs = int.from_bytes(self._flags, "little"), int.from_bytes(other._flags, "little")
        self._flags[:] = (ours | theirs).to_bytes(len(self._flags), "little")
        self._count()

    def keep(self, other: ChunkMap) -> None:
        """What is not there in ``other``, of the same length, is there no more."""
        ours, theirs = int.from_bytes(self._flags, "little"), int.from_bytes(other._flags, "little")
        self._flags[:] = (ours & theirs).to_bytes(len(self._flags), "little")
        self._count()

    def unset(self, first: int, end: int) -> None:
        """The chunks [first, end), which exist, are there no more."""
        self._flags[first:end] = bytes(end - first)
        self._count()

    def clear(self) -> None:
        """No chunk is there any more."""
        self.unset(0, len(self._flags))

    def runs_missing(self, first: int, end: int) -> Iterator[tuple[int, int]]:
        """The runs [from, to) of chunks in [first, end) that are not there, in order, as long as they go.

        The map must not change while this is iterated.
        """
        return _runs(self._flags, ABSENT, PRESENT, first, end)

    def runs_present(self, first: int, end: int) -> Iterator[tuple[int, int]]:
        """Likewise, of chunks that are there."""
        return _runs(self._flags, PRESENT, ABSENT, first, end)

    def _count(self) -> None:
        self._missing = self._flags.count(ABSENT)
        self.complete = not self._missing


def _runs(flags: bytearray, value: int, other: int, first: int, end: int) -> Iterator[tuple[int, int]]:
    while first < end and (start := flags.find(value, first, end)) >= 0:
        stop = flags.find(other, start, end)
        first = end if stop < 0 else stop
        yield start, first


def runs_of(mark: int, marks: bytes) -> Iterator[tuple[int, int]]:
    """The runs [from, to) of one mark in a file's marks, in order, as long as they go."""
    for run in re.finditer(b"%b+" % re.escape(bytes((mark,))), marks):
        yield run.span()
