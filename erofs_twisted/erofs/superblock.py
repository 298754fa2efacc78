"""The superblock of an EROFS image: is this an image that a kernel can mount from one device?

Layout: Linux, fs/erofs/erofs_fs.h, ``struct erofs_super_block``. All integers are little-endian.
"""

from __future__ import annotations

import struct
from datetime import UTC, datetime
from uuid import UUID

import attrs

from erofs_twisted.erofs.crc32c import crc32c
from erofs_twisted.errors import MountError

SUPERBLOCK_OFFSET = 1024
"""Where the superblock starts in an image."""
SUPERBLOCK_SIZE = 128
"""Bytes of the superblock without its extension slots."""
MAGIC = 0xE0F5E1E2
MIN_BLOCK_BITS, MAX_BLOCK_BITS = 9, 12
"""Block sizes from 512 to 4096: Linux mounts none that is larger than a page."""

_LAYOUT = struct.Struct("<IIIBBHQQIIII16s16sIHHHBBIQ4xIQ8x")
_CHECKSUM = slice(4, 8)
_INODE_SLOT = 32
_EXTENSION_SLOT = 16
_MAX_EXTENDED_SIZE = 4096 - SUPERBLOCK_OFFSET

COMPAT_CHECKSUM = 0x1
INCOMPAT_ZERO_PADDING = 0x1
INCOMPAT_COMPRESSION_CONFIGURATIONS = 0x2
INCOMPAT_48BIT = 0x80
INCOMPAT_METABOX = 0x100
_INCOMPATIBLE_FEATURES = {
    INCOMPAT_ZERO_PADDING: "0padding",
    INCOMPAT_COMPRESSION_CONFIGURATIONS: "compr_cfgs/big_pcluster",
    0x4: "chunked_file",
    0x8: "device_table/compr_head2",
    0x10: "ztailpacking",
    0x20: "fragments/dedupe",
    0x40: "xattr_prefixes",
    INCOMPAT_48BIT: "48bit",
    INCOMPAT_METABOX: "metabox",
}
_COMPRESSION_ALGORITHMS = {0x1: "lz4", 0x2: "lzma", 0x4: "deflate", 0x8: "zstd"}


class SuperblockError(MountError):
    """The bytes are not an EROFS image, or not one that can be mounted from a single device."""


@attrs.frozen
class Superblock:
    """What an image says of itself; `parse` has checked it against the image's size."""

    block_size: int
    blocks: int
    """The image's length in blocks; 0 where its writer left it out."""
    root_nid: int
    meta_block: int
    """The block where the inodes start."""
    xattr_block: int
    """The block where the shared extended attributes start."""
    inodes: int
    built: datetime | None
    """When mkfs.erofs made it (UTC); None for a time that no calendar has."""
    uuid: UUID
    volume_name: str
    features: tuple[str, ...]
    """Incompatible features, which the kernel must know; two names where the format has one bit for both."""
    compression: tuple[str, ...]
    """The compression algorithms that the image may use; empty where nothing is compressed."""

    @property
    def size(self) -> int:
        """Bytes that the file system covers."""
        return self.blocks * self.block_size

    @classmethod
    def parse(cls, data: bytes, size: int) -> Superblock:
        """Read the superblock from ``data``, the first 4096 bytes of an image of ``size``, or all of it.

        Raises `SuperblockError`.
        """
        end = SUPERBLOCK_OFFSET + SUPERBLOCK_SIZE
        if len(data) < end:
            raise SuperblockError(
                f"not an EROFS image: it has {size} bytes and a superblock ends at {end}; "
                "was the layer pushed as EROFS?"
            )
        (
            magic,
            checksum,
            compatible,
            block_bits,
            extension_slots,
            root_nid_or_blocks_high,
            inodes,
            epoch,
            _nanoseconds,
            blocks,
            meta_block,
            xattr_block,
            uuid,
            volume_name,
            incompatible,
            compression,
            extra_devices,
            _device_slot,
            _directory_block_bits,
            _prefix_count,
            _prefix_start,
            _packed_nid,
            build_seconds,
            root_nid_48bit,
        ) = _LAYOUT.unpack_from(data, SUPERBLOCK_OFFSET)
        _check_magic(magic, data)
        _check_block_bits(block_bits)
        if compatible & COMPAT_CHECKSUM:
            _check_checksum(checksum, data, 1 << block_bits)
        _check_extension(extension_slots)
        features = _features(incompatible)
        _check_single_device(extra_devices)
        root_nid = root_nid_or_blocks_high
        if incompatible & INCOMPAT_48BIT and root_nid_48bit:
            blocks |= root_nid_or_blocks_high << 32
            root_nid = root_nid_48bit
        parsed = cls(
            block_size=1 << block_bits,
            blocks=blocks,
            root_nid=root_nid,
            meta_block=meta_block,
            xattr_block=xattr_block,
            inodes=inodes,
            built=_time(epoch + build_seconds),
            uuid=UUID(bytes=uuid),
            volume_name=volume_name.partition(b"\0")[0].decode("utf-8", "replace"),
            features=features,
            compression=_compression(incompatible, compression),
        )
        parsed._check_extent(size, root_in_metabox=bool(incompatible & INCOMPAT_METABOX))
        return parsed

    def _check_extent(self, size: int, *, root_in_metabox: bool) -> None:
        if self.size > size:
            raise SuperblockError(
                f"the EROFS image is cut off: its superblock says {self.blocks} blocks of "
                f"{self.block_size} bytes ({self.size} bytes), the layer has {size}; "
                "push the whole image again"
            )
        root = self.meta_block * self.block_size + self.root_nid * _INODE_SLOT
        for name, start, length in (
            ("the inodes start", self.meta_block * self.block_size, _INODE_SLOT),
            ("the shared extended attributes start", self.xattr_block * self.block_size, 0),
            ("the root directory is", 0 if root_in_metabox else root, _INODE_SLOT),
        ):
            if start + length > size:
                raise SuperblockError(
                    f"damaged EROFS superblock: {name} at byte {start} of an image of {size} bytes; "
                    "check the image with fsck.erofs and push it again"
                )


def _check_magic(magic: int, data: bytes) -> None:
    if magic == MAGIC:
        return
    looks = _guess(data)
    raise SuperblockError(
        f"not an EROFS image: no EROFS magic number at byte {SUPERBLOCK_OFFSET} (found 0x{magic:08x})"
        + (f"; it looks like {looks}" if looks else "")
        + "; make the layer with mkfs.erofs and push it uncompressed as a whole"
    )


def _guess(data: bytes) -> str | None:
    for prefix, name in (
        (b"\x1f\x8b", "gzip"),
        (b"\x28\xb5\x2f\xfd", "zstd"),
        (b"hsqs", "squashfs"),
        (b"\xfd7zXZ\0", "xz"),
    ):
        if data.startswith(prefix):
            return name
    return "a tar archive" if data[257:262] == b"ustar" else None


def _check_block_bits(block_bits: int) -> None:
    if not MIN_BLOCK_BITS <= block_bits <= MAX_BLOCK_BITS:
        raise SuperblockError(
            f"the EROFS image has blocks of 2^{block_bits} bytes; blocks of 512 to 4096 bytes can be "
            "mounted: make the image with mkfs.erofs -b 4096"
        )


def _check_checksum(expected: int, data: bytes, block_size: int) -> None:
    end = block_size if block_size > SUPERBLOCK_OFFSET else SUPERBLOCK_OFFSET + block_size
    block = bytearray(data[SUPERBLOCK_OFFSET:end])
    if len(block) < end - SUPERBLOCK_OFFSET:
        raise SuperblockError(
            f"the EROFS image is cut off: its first block ends at byte {end}, after {len(data)} bytes there "
            "is no more; push the whole image again"
        )
    block[_CHECKSUM] = bytes(4)
    actual = crc32c(bytes(block))
    if actual != expected:
        raise SuperblockError(
            f"damaged EROFS superblock: its checksum is 0x{actual:08x}, it should be 0x{expected:08x}; "
            "check the image with fsck.erofs and push it again"
        )


def _check_extension(slots: int) -> None:
    extended = SUPERBLOCK_SIZE + slots * _EXTENSION_SLOT
    if extended > _MAX_EXTENDED_SIZE:
        raise SuperblockError(
            f"damaged EROFS superblock: it claims {extended} bytes, {_MAX_EXTENDED_SIZE} is the most there "
            "is; check the image with fsck.erofs and push it again"
        )


def _features(incompatible: int) -> tuple[str, ...]:
    unknown = incompatible & ~sum(_INCOMPATIBLE_FEATURES)
    known = tuple(name for bit, name in _INCOMPATIBLE_FEATURES.items() if incompatible & bit)
    if unknown:
        bits = ", ".join(f"0x{1 << n:x}" for n in range(32) if unknown >> n & 1)
        beside = f" (beside {', '.join(known)})" if known else ""
        raise SuperblockError(
            f"the EROFS image needs incompatible features that are not known here: {bits}{beside}; "
            "make it with an older mkfs.erofs or fewer -E options, or use a newer erofs-twisted"
        )
    return known


def _check_single_device(extra_devices: int) -> None:
    if extra_devices:
        raise SuperblockError(
            f"the EROFS image is spread over several devices (device_table names {extra_devices} more), "
            "which one layer does not hold; make it without --blobdev, or merge it into one image"
        )


def _compression(incompatible: int, field: int) -> tuple[str, ...]:
    if not incompatible & INCOMPAT_COMPRESSION_CONFIGURATIONS:
        # The field is then the LZ4 window, which old writers leave at 0 for its default.
        return ("lz4",) if incompatible & INCOMPAT_ZERO_PADDING or field else ()
    unknown = field & ~sum(_COMPRESSION_ALGORITHMS)
    if unknown:
        raise SuperblockError(
            f"the EROFS image uses compression algorithms that are not known here (0x{unknown:x}); "
            f"make it with one of {', '.join(_COMPRESSION_ALGORITHMS.values())}"
        )
    return tuple(name for bit, name in _COMPRESSION_ALGORITHMS.items() if field & bit)


def _time(seconds: int) -> datetime | None:
    try:
        return datetime.fromtimestamp(seconds, UTC)
    except (OverflowError, ValueError, OSError):
        return None
