"""Inodes: what kind of file, how long, and where the rest of what describes it lies.

Layout: Linux, fs/erofs/erofs_fs.h, ``struct erofs_inode_compact`` and ``erofs_inode_extended``; what follows
an inode: fs/erofs/xattr.h, zmap.c, data.c. All integers are little-endian.
"""

from __future__ import annotations

import stat
import struct
from enum import IntEnum

import attrs

from erofs_twisted.errors import ErofsTwistedError

SLOT = 32
"""An inode's number times this is its place, from the first block of the inodes."""
COMPACT_SIZE, EXTENDED_SIZE = 32, 64
SHARED_XATTR_UNIT = 4
"""A shared extended attribute's number times this is its place, from the first block of those."""
NID_IN_METABOX = 1 << 63
"""Such an inode lies, compressed, within the data of another one."""

_COMPACT = struct.Struct("<HHHHI4xI")
_EXTENDED = struct.Struct("<HHHHQI")
_EXTENDED_BIT = 0x01
_LAYOUT_SHIFT, _LAYOUT_MASK = 1, 0x7
_NO_LINK_COUNT = 0x10
"""In the inode of what is no directory: there is one link, its count is the high part of an address."""
_KNOWN_FORMAT = 0x1F
_CHUNK_BITS, _CHUNK_INDEXES, _KNOWN_CHUNK_FORMAT = 0x1F, 0x20, 0x7F
_XATTR_HEADER = 12
_BEGINNING = struct.Struct("<HHH")
_FLAT_FORMATS = frozenset(
    extended | layout << _LAYOUT_SHIFT | flag
    for extended in (0, _EXTENDED_BIT)
    for layout in (0, 2)
    for flag in (0, _NO_LINK_COUNT)
)
_XATTR_ENTRY = struct.Struct("<BBH")
_MAP_HEADERS = 8 + 8
"""The header of a compressed file's map, and what pads it, or its first indexes, to be aligned."""
_NO_BLOCK = 0xFFFFFFFF
_NO_BLOCK_48BIT = 0xFFFFFFFFFFFF
_WITH_BLOCKS = frozenset({stat.S_IFREG, stat.S_IFDIR, stat.S_IFLNK})
_KINDS = _WITH_BLOCKS | {stat.S_IFCHR, stat.S_IFBLK, stat.S_IFIFO, stat.S_IFSOCK}


class MetadataError(ErofsTwistedError):
    """An inode or a directory is damaged, or of a kind that is not known here."""


class DataLayout(IntEnum):
    """How an inode says where its file's data is."""

    FLAT_PLAIN = 0
    """One run of blocks."""
    COMPRESSED_FULL = 1
    FLAT_INLINE = 2
    """One run of blocks, and what does not fill the last one right behind the inode."""
    COMPRESSED_COMPACT = 3
    CHUNK_BASED = 4
    """A table of blocks behind the inode."""


_LAYOUTS = tuple(DataLayout)


@attrs.frozen(slots=True)
class Inode:
    """One inode, without what `stat` alone shows: owner, times, links."""

    kind: int
    """``stat.S_IFREG`` and so on."""
    layout: DataLayout
    size: int
    """The file's, in bytes."""
    header_size: int
    xattr_size: int
    """Bytes of extended attributes behind the header."""
    start_block: int | None
    """Where the run of blocks starts; None where there is none (a hole, a device)."""
    chunk_format: int

    @property
    def body(self) -> int:
        """Where, from the inode's start, what follows its extended attributes is: data, a map, a table."""
        return self.header_size + self.xattr_size

    @property
    def is_directory(self) -> bool:
        return self.kind == stat.S_IFDIR

    @property
    def is_compressed(self) -> bool:
        return self.layout in (DataLayout.COMPRESSED_FULL, DataLayout.COMPRESSED_COMPACT)

    @classmethod
    def parse(cls, data: bytes | memoryview, offset: int = 0) -> Inode:
        """The inode at ``offset`` of ``data``, in which it lies whole. Raises `MetadataError`."""
        if offset + COMPACT_SIZE > len(data):
            raise MetadataError(f"an inode is cut off after {len(data) - offset} bytes")
        form, xattrs, mode, links_or_high, size, low = _COMPACT.unpack_from(data, offset)
        extended = form & _EXTENDED_BIT
        if extended:
            if offset + EXTENDED_SIZE > len(data):
                raise MetadataError(f"an extended inode is cut off after {len(data) - offset} bytes")
            form, xattrs, mode, links_or_high, size, low = _EXTENDED.unpack_from(data, offset)
        layout = form >> _LAYOUT_SHIFT & _LAYOUT_MASK
        if form & ~_KNOWN_FORMAT or layout >= len(_LAYOUTS):
            raise MetadataError(f"an inode has the format 0x{form:x}, which is not known here")
        kind = stat.S_IFMT(mode)
        if kind not in _KINDS:
            raise MetadataError(f"an inode has the mode 0{mode:o}, of which there are no files")
        if size >> 63:
            raise MetadataError(f"an inode says that its file has {size} bytes")
        chunk_format = low & 0xFFFF if layout == DataLayout.CHUNK_BASED else 0
        if chunk_format & ~_KNOWN_CHUNK_FORMAT:
            raise MetadataError(f"an inode has chunks of the format 0x{chunk_format:x}, not known here")
        return cls(
            kind,
            _LAYOUTS[layout],
            size,
            EXTENDED_SIZE if extended else COMPACT_SIZE,
            _XATTR_HEADER + 4 * (xattrs - 1) if xattrs else 0,
            _start_block(form, kind, layout, low, links_or_high),
            chunk_format,
        )

    def runs(self, place: int, block_size: int) -> list[tuple[int, int]]:
        """(offset, length) of the data in an image, in order, of an inode at ``place`` whose layout is flat.

        Empty where all of it is a hole. Raises `MetadataError`, also for another layout.
        """
        tail = self.size % block_size if self.layout is DataLayout.FLAT_INLINE else 0
        if tail and (place + self.body) % block_size + tail > block_size:
            raise MetadataError(f"the inode at {place} has data behind it that crosses a block's end")
        if self.layout not in (DataLayout.FLAT_PLAIN, DataLayout.FLAT_INLINE):
            raise MetadataError(f"the inode at {place} has the layout {self.layout.name}, its data no place")
        found = []
        if self.size > tail and self.start_block is not None:
            found.append((self.start_block * block_size, self.size - tail))
        if tail:
            found.append((place + self.body, tail))
        return found

    def map_size(self, place: int, block_size: int) -> int:
        """How many bytes from the start of the inode, at ``place``, say where its data is: at most.

        A compressed file's map is taken for as long as it would be without any compression.
        """
        if self.layout is DataLayout.CHUNK_BASED:
            unit = 8 if self.chunk_format & _CHUNK_INDEXES else 4
            chunk = block_size << (self.chunk_format & _CHUNK_BITS)
            return _aligned(place + self.body, unit) - place + unit * -(-self.size // chunk)
        if not self.is_compressed:
            return self.body
        index = 8 if self.layout is DataLayout.COMPRESSED_FULL else 4
        return _aligned(place + self.body, 8) - place + _MAP_HEADERS + index * -(-self.size // block_size)


def is_plain_file(data: bytes | memoryview) -> bool:
    """Is an inode that of a regular file that has neither attributes nor a map? Most are, and nothing else of
    them has to be read. It takes a fraction of the time of `Inode.parse`, and checks no more than that."""
    if len(data) < COMPACT_SIZE:
        return False
    form, xattrs, mode = _BEGINNING.unpack_from(data)
    return not xattrs and form in _FLAT_FORMATS and stat.S_IFMT(mode) == stat.S_IFREG


def shared_xattrs(body: bytes | memoryview) -> list[int]:
    """The numbers of the shared extended attributes that an inode's own (``xattr_size`` bytes) refer to.

    Raises `MetadataError`.
    """
    if not body:
        return []
    count = body[4] if len(body) > 4 else 0
    if len(body) < _XATTR_HEADER + 4 * count:
        raise MetadataError(f"{count} shared attributes do not fit in an inode's {len(body)} bytes of them")
    return list(struct.unpack_from(f"<{count}I", body, _XATTR_HEADER))


def xattr_entry_size(data: bytes | memoryview) -> int:
    """The bytes of an extended attribute, from the first four. Raises `MetadataError`."""
    if len(data) < _XATTR_ENTRY.size:
        raise MetadataError(f"an extended attribute is cut off after {len(data)} bytes")
    name_length, _, value_size = _XATTR_ENTRY.unpack_from(data)
    return _aligned(_XATTR_ENTRY.size + name_length + value_size, 4)


def _start_block(form: int, kind: int, layout: int, low: int, high: int) -> int | None:
    if kind not in _WITH_BLOCKS or layout not in (DataLayout.FLAT_PLAIN, DataLayout.FLAT_INLINE):
        return None
    if form & _EXTENDED_BIT or (form & _NO_LINK_COUNT and kind != stat.S_IFDIR):
        block, none = low | high << 32, _NO_BLOCK_48BIT
    else:
        block, none = low, _NO_BLOCK
    return None if block == none else block


def _aligned(offset: int, unit: int) -> int:
    return -(-offset // unit) * unit
