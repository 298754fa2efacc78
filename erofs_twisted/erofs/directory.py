"""Directories: blocks of entries, each with a name and the number of an inode.

Layout: Linux, fs/erofs/erofs_fs.h, ``struct erofs_dirent``; a block has its entries first, then their names.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator

from erofs_twisted.erofs.inode import MetadataError

ENTRY_SIZE = 12

_ENTRY = struct.Struct("<QHBx")
_NAME_OFFSET = struct.Struct("<8xH")
_MAX_NAME = 255


def entries(block: bytes | memoryview) -> Iterator[tuple[int, int, bytes]]:
    """(inode number, type, name) of each entry of a directory's block; also ``.`` and ``..``.

    The last block of a directory may be shorter than the others. Raises `MetadataError` at the first entry
    that is wrong.
    """
    count = entry_count(block)
    table = block[: count * ENTRY_SIZE]
    offset, end = count * ENTRY_SIZE, len(block)
    numbered = list(_ENTRY.iter_unpack(table))
    for index, (nid, start, kind) in enumerate(numbered):
        stop = numbered[index + 1][1] if index + 1 < count else end
        if start != offset or not start < stop <= end:
            raise MetadataError(f"a directory's entry {index} has its name at bytes {start} to {stop}")
        name = bytes(block[start:stop])
        if index + 1 == count:
            name = name.partition(b"\0")[0]
        if not 0 < len(name) <= _MAX_NAME:
            raise MetadataError(f"a directory's entry {index} has a name of {len(name)} bytes")
        yield nid, kind, name
        offset = stop


def entry_count(block: bytes | memoryview) -> int:
    """How many entries a directory's block has. Raises `MetadataError`."""
    if len(block) < ENTRY_SIZE:
        raise MetadataError(f"a directory's block has {len(block)} bytes")
    (first_name,) = _NAME_OFFSET.unpack_from(block)
    if not ENTRY_SIZE <= first_name < len(block) or first_name % ENTRY_SIZE:
        raise MetadataError(f"a directory's names start at byte {first_name} of {len(block)}")
    return int(first_name) // ENTRY_SIZE
