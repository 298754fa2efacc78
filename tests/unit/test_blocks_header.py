"""What a cache file says about itself."""

from __future__ import annotations

import struct
import zlib

from hypothesis import given
from hypothesis import strategies as st
from twisted.trial.unittest import SynchronousTestCase

from erofs_twisted.blocks import header
from erofs_twisted.blocks.chunks import Chunking
from erofs_twisted.blocks.header import (
    BLOCK,
    BOOT_AT,
    POISONED_AT,
    TRAILER_SIZE,
    VERIFIED_AT,
    VERSION,
    BlobIdentity,
    DamagedFile,
    OtherVersion,
    State,
    find_header,
    read_header,
)
from erofs_twisted.registry.digest import Digest

BOOT = b"4f8c1f3e-0000-4000-8000-000000000000"
IDENTITIES = st.builds(
    lambda data, algorithm, size, bits: BlobIdentity(Digest.of(data, algorithm), Chunking(size, 1 << bits)),
    st.binary(max_size=4),
    st.sampled_from(("sha256", "sha512")),
    st.integers(0, 1 << 50),
    st.integers(0, 24),
)


def block_of(identity: BlobIdentity) -> bytes:
    return identity.new_block(BOOT).ljust(BLOCK, b"\0")


class HeaderTests(SynchronousTestCase):
    @given(IDENTITIES)
    def test_it_tells_whose_file_it_is_and_where_things_lie(self, identity: BlobIdentity) -> None:
        self.assertEqual(identity, read_header(block_of(identity)))
        self.assertEqual(identity.header_offset, find_header(identity.trailer()))
        self.assertGreaterEqual(identity.header_offset, identity.chunking.size)
        self.assertEqual(0, identity.header_offset % BLOCK)
        end = identity.marks_offset + identity.chunking.count + TRAILER_SIZE
        self.assertEqual((TRAILER_SIZE, end), (len(identity.trailer()), identity.file_size))

    @given(IDENTITIES, st.integers(0, 167), st.integers(1, 255))
    def test_no_byte_of_it_can_change(self, identity: BlobIdentity, at: int, change: int) -> None:
        block = bytearray(block_of(identity))
        block[at] ^= change
        self.assertRaises(DamagedFile, read_header, bytes(block))

    @given(IDENTITIES, st.integers(0, TRAILER_SIZE - 1), st.integers(1, 255))
    def test_no_byte_of_the_trailer_can_change(self, identity: BlobIdentity, at: int, change: int) -> None:
        trailer = bytearray(identity.trailer())
        trailer[at] ^= change
        self.assertRaises(DamagedFile, find_header, bytes(trailer))

    @given(st.binary(max_size=300))
    def test_noise_is_no_header_and_no_other_error(self, noise: bytes) -> None:
        for block in (noise, header.MAGIC + noise):
            self.assertRaises(DamagedFile, read_header, block)
            self.assertRaises(DamagedFile, find_header, block[:TRAILER_SIZE])

    def test_another_version_is_known_as_such_and_by_its_age(self) -> None:
        for version, newer in ((VERSION - 1, False), (VERSION + 1, True)):

            def packed(checksum: int, version: int = version) -> bytes:
                return struct.pack("<8sHxxIQ", header.MAGIC, version, checksum, 4096)

            with self.assertRaises(OtherVersion) as raised:
                find_header(packed(zlib.crc32(packed(0))))
            self.assertEqual(newer, raised.exception.newer)
            self.assertIn("a newer" if newer else "an older", str(raised.exception))


class StateTests(SynchronousTestCase):
    @given(IDENTITIES)
    def test_a_new_file_is_of_this_boot_and_nothing_was_found_of_it(self, identity: BlobIdentity) -> None:
        self.assertEqual(State(BOOT, verified=False, poisoned=False), State.of(block_of(identity)))

    @given(st.booleans(), st.booleans())
    def test_what_was_found_is_told(self, verified: bool, poisoned: bool) -> None:
        block = bytearray(BLOCK)
        block[BOOT_AT : BOOT_AT + len(BOOT)] = BOOT
        block[VERIFIED_AT], block[POISONED_AT] = 0xC5 * verified, 0xC5 * poisoned
        self.assertEqual(State(BOOT, verified, poisoned), State.of(bytes(block)))

    @given(st.sampled_from((VERIFIED_AT, POISONED_AT)), st.integers(1, 255))
    def test_no_other_byte_passes_for_an_answer(self, at: int, value: int) -> None:
        block = bytearray(BLOCK)
        block[at] = value
        if value == 0xC5:
            State.of(bytes(block))
        else:
            self.assertRaises(DamagedFile, State.of, bytes(block))

    def test_a_block_that_is_cut_short_is_damaged(self) -> None:
        self.assertRaises(DamagedFile, State.of, bytes(VERIFIED_AT))
