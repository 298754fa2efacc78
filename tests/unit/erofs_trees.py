"""EROFS images made by hand, so that a test can put each inode and each directory where it likes."""

from __future__ import annotations

import stat
import struct
from collections.abc import Mapping, Sequence
from uuid import UUID

import attrs

from erofs_twisted.erofs.superblock import Superblock

BLOCK = 4096
ROOT = 8 * BLOCK // 32
"""The number of the root's inode, unless another is given: right at block 8."""
TYPES = {stat.S_IFREG: 1, stat.S_IFDIR: 2, stat.S_IFLNK: 7}


def inode(
    mode: int = stat.S_IFREG | 0o644,
    layout: int = 0,
    *,
    size: int = 0,
    start_block: int = 0,
    xattr_count: int = 0,
    extended: bool = False,
    links: int = 1,
    flags: int = 0,
) -> bytes:
    """An inode as it lies on disk: ``struct erofs_inode_compact`` or ``erofs_inode_extended``."""
    form = int(extended) | layout << 1 | flags
    if extended:
        head = struct.pack("<HHHHQI", form, xattr_count, mode, links, size, start_block)
        return head.ljust(64, b"\0")
    head = struct.pack("<HHHHIII", form, xattr_count, mode, links, size, 0, start_block)
    return head.ljust(32, b"\0")


def directory(entries: Sequence[tuple[bytes, int, int]]) -> bytes:
    """A directory's block, of (name, inode number, type), as mkfs.erofs writes it."""
    names, table, offset = b"", b"", 12 * len(entries)
    for name, nid, kind in entries:
        table += struct.pack("<QHBB", nid, offset + len(names), kind, 0)
        names += name
    return table + names


@attrs.define
class HandMade:
    """An image of ``blocks`` blocks, zeros at first."""

    blocks: int
    root: int = ROOT
    inodes: int = 0
    features: tuple[str, ...] = ()
    xattr_block: int = 1
    meta_block: int = 0
    data: bytearray = attrs.field(init=False)

    def __attrs_post_init__(self) -> None:
        self.data = bytearray(self.blocks * BLOCK)

    def put(self, offset: int, *parts: bytes) -> None:
        """Write bytes."""
        whole = b"".join(parts)
        self.data[offset : offset + len(whole)] = whole

    def file(self, nid: int, *, kind: int = stat.S_IFREG, size: int = 0, content: bytes = b"") -> None:
        """A file, or a link with its target behind the inode."""
        layout = 2 if content else 0
        self.put(nid * 32, inode(kind | 0o644, layout, size=size or len(content)), content)

    def dir(self, nid: int, entries: Mapping[str, tuple[int, int]], *, block: int | None = None) -> None:
        """A directory of (number, kind) by name: its entries behind the inode, or in the block ``block``."""
        listed = [(b".", nid, 2), (b"..", self.root, 2)]
        listed += [(name.encode(), number, TYPES[kind]) for name, (number, kind) in entries.items()]
        content = directory(sorted(listed))
        if block is None:
            self.put(nid * 32, inode(stat.S_IFDIR | 0o755, 2, size=len(content)), content)
        else:
            self.put(nid * 32, inode(stat.S_IFDIR | 0o755, 0, size=BLOCK, start_block=block))
            last = content.ljust(BLOCK, b"\0")
            self.put(block * BLOCK, last)

    @property
    def superblock(self) -> Superblock:
        """What its superblock would say."""
        return Superblock(
            block_size=BLOCK,
            blocks=self.blocks,
            root_nid=self.root,
            meta_block=self.meta_block,
            xattr_block=self.xattr_block,
            inodes=self.inodes,
            built=None,
            uuid=UUID(int=0),
            volume_name="",
            features=self.features,
            compression=(),
        )
