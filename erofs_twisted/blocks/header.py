"""What a file of the cache says about itself, and where in it what lies.

From byte 0 on the file is the blob, sparse. At the next multiple of 4096 comes a block with a header, then
the marks, a byte a chunk, and at the very end a trailer, which every version of this format has, and by which
the header is found without knowing the blob. One file holds them all, so no crash can pair a map with other
data.
"""

from __future__ import annotations

import struct
import zlib

import attrs

from erofs_twisted.blocks.chunks import ABSENT, PRESENT, Chunking
from erofs_twisted.registry.digest import Digest
from erofs_twisted.registry.errors import InvalidDigest

MAGIC = b"EROFSTWM"
VERSION = 2

BLOCK = 4096
TRAILER_SIZE = 24
POISONED_AT = 254
VERIFIED_AT = 255
BOOT_AT = 256
"""Where in the block these stand, all within one sector."""

_HEADER = struct.Struct("<8sHHIQ144s")
"""Magic, version, bits of the chunk size, header's CRC-32 (computed with 0 here), blob size, digest."""
_TRAILER = struct.Struct("<8sHxxIQ")
"""Magic, version, CRC-32 of the other fields (computed with 0 here), the header's offset."""
_BOOT_LENGTH = 36


class DamagedFile(Exception):
    """The file in the cache is not one of this blob, or not whole; it may be replaced."""


class OtherVersion(DamagedFile):
    """The file is whole, as far as can be told, but of another version of the format."""

    def __init__(self, version: int) -> None:
        age = "a newer" if version > VERSION else "an older"
        super().__init__(f"{age} erofs-twisted wrote it (its format is {version}, not {VERSION})")
        self.newer = version > VERSION


@attrs.frozen
class BlobIdentity:
    """Which blob a file holds, which says where in it what lies."""

    digest: Digest
    chunking: Chunking

    @property
    def header_offset(self) -> int:
        return -(-self.chunking.size // BLOCK) * BLOCK

    @property
    def marks_offset(self) -> int:
        return self.header_offset + BLOCK

    @property
    def file_size(self) -> int:
        return self.marks_offset + self.chunking.count + TRAILER_SIZE

    def header(self) -> bytes:
        """How the block begins."""

        def packed(checksum: int) -> bytes:
            chunking, digest = self.chunking, self.digest.encode()
            return _HEADER.pack(MAGIC, VERSION, chunking.bits, checksum, chunking.size, digest)

        return packed(zlib.crc32(packed(0)))

    def new_block(self, boot: bytes) -> bytes:
        """The block of a file that is made in this boot, up to its last byte that counts."""
        return self.header().ljust(BOOT_AT, b"\0") + boot

    def trailer(self) -> bytes:
        return _packed_trailer(VERSION, self.header_offset)


@attrs.frozen
class State:
    """What else stands in the header's block, and changes."""

    boot: bytes
    """The boot in which the marks were written."""
    verified: bool
    poisoned: bool
    """Was the blob found to have another digest than it should?"""

    @classmethod
    def of(cls, block: bytes) -> State:
        """Raises `DamagedFile`."""
        values = block[VERIFIED_AT:BOOT_AT] + block[POISONED_AT:VERIFIED_AT]
        if len(values) != 2 or values.translate(None, bytes((ABSENT, PRESENT))):
            raise DamagedFile("its header is damaged")
        return cls(
            boot=block[BOOT_AT : BOOT_AT + _BOOT_LENGTH],
            verified=values[0] == PRESENT,
            poisoned=values[1] == PRESENT,
        )


def find_header(trailer: bytes) -> int:
    """The header's offset, from a file's last `TRAILER_SIZE` bytes. Raises `OtherVersion`, `DamagedFile`."""
    try:
        magic, version, _, offset = _TRAILER.unpack(trailer)
    except struct.error:
        raise DamagedFile("it is too short") from None
    if magic != MAGIC or _packed_trailer(version, offset) != trailer:
        raise DamagedFile("its end is not that of a cache file")
    if version != VERSION:
        raise OtherVersion(version)
    return int(offset)


def read_header(block: bytes) -> BlobIdentity:
    """Whose file it is that has this block. Raises `DamagedFile`."""
    try:
        _, _, bits, _, size, digest = _HEADER.unpack_from(block)
        identity = BlobIdentity(
            Digest.parse(digest.rstrip(b"\0").decode("ascii", "replace")), Chunking(size, 1 << bits)
        )
    except (struct.error, ValueError, OverflowError, InvalidDigest):
        raise DamagedFile("its header is damaged") from None
    if not block.startswith(identity.header()):
        raise DamagedFile("its header is damaged")
    return identity


def _packed_trailer(version: int, offset: int) -> bytes:
    checksum = zlib.crc32(_TRAILER.pack(MAGIC, version, 0, offset))
    return _TRAILER.pack(MAGIC, version, checksum, offset)
