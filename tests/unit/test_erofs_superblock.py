from __future__ import annotations

import struct
from datetime import UTC, datetime
from typing import Any

from hypothesis import given
from hypothesis import strategies as st
from twisted.trial.unittest import SynchronousTestCase

from erofs_twisted.erofs.crc32c import crc32c
from erofs_twisted.erofs.superblock import SUPERBLOCK_OFFSET, Superblock, SuperblockError

SIZE = 100 * 4096
FIELDS: dict[str, tuple[str, int]] = {
    "magic": ("<I", 0),
    "checksum": ("<I", 4),
    "compatible": ("<I", 8),
    "block_bits": ("<B", 12),
    "extension_slots": ("<B", 13),
    "root_nid": ("<H", 14),
    "inodes": ("<Q", 16),
    "epoch": ("<Q", 24),
    "blocks": ("<I", 36),
    "meta_block": ("<I", 40),
    "xattr_block": ("<I", 44),
    "uuid": ("16s", 48),
    "volume_name": ("16s", 64),
    "incompatible": ("<I", 80),
    "compression": ("<H", 84),
    "extra_devices": ("<H", 86),
    "build_seconds": ("<I", 108),
    "root_nid_48bit": ("<Q", 112),
}
"""``struct erofs_super_block``: a format and an offset for each field (Linux, fs/erofs/erofs_fs.h)."""


def image(checksummed: bool = False, **fields: Any) -> bytes:
    """The first 4096 bytes of an image that is fine, but for ``fields``."""
    data = bytearray(4096)
    fine: dict[str, Any] = {"magic": 0xE0F5E1E2, "block_bits": 12, "root_nid": 36, "blocks": 100}
    if checksummed:
        fine["compatible"] = 1
    fine.update(fields)
    for name, value in fine.items():
        form, offset = FIELDS[name]
        struct.pack_into(form, data, SUPERBLOCK_OFFSET + offset, value)
    if checksummed:
        end = max(1 << fine["block_bits"], SUPERBLOCK_OFFSET)
        if end == SUPERBLOCK_OFFSET:
            end += 1 << fine["block_bits"]
        struct.pack_into("<I", data, SUPERBLOCK_OFFSET + 4, crc32c(bytes(data[SUPERBLOCK_OFFSET:end])))
    return bytes(data)


class CRC32CTests(SynchronousTestCase):
    def test_it_has_the_check_value_of_the_catalogue(self) -> None:
        self.assertEqual(0xE3069283, crc32c(b"123456789") ^ 0xFFFFFFFF)

    def test_it_has_the_kernels_start_for_a_superblock(self) -> None:
        """fs/erofs/super.c begins with 0x5045B54A: what the magic number and an empty checksum leave."""
        self.assertEqual(0x5045B54A, crc32c(struct.pack("<II", 0xE0F5E1E2, 0)))

    @given(st.binary(), st.binary())
    def test_it_goes_on_where_it_stopped(self, first: bytes, second: bytes) -> None:
        self.assertEqual(crc32c(first + second), crc32c(second, crc32c(first)))


class FineTests(SynchronousTestCase):
    def test_it_reads_every_field(self) -> None:
        found = Superblock.parse(
            image(
                block_bits=9,
                blocks=800,
                meta_block=7,
                xattr_block=3,
                inodes=42,
                epoch=1_700_000_000,
                build_seconds=99,
                uuid=bytes(range(16)),
                volume_name=b"rootfs\0\0\0\0\0\0\0\0\0\0",
                incompatible=0x3,
                compression=0x9,
            ),
            SIZE,
        )
        self.assertEqual((512, 800, 800 * 512), (found.block_size, found.blocks, found.size))
        self.assertEqual((36, 7, 3, 42), (found.root_nid, found.meta_block, found.xattr_block, found.inodes))
        self.assertEqual(datetime.fromtimestamp(1_700_000_099, UTC), found.built)
        self.assertEqual("00010203-0405-0607-0809-0a0b0c0d0e0f", str(found.uuid))
        self.assertEqual("rootfs", found.volume_name)
        self.assertEqual(("0padding", "compr_cfgs/big_pcluster"), found.features)
        self.assertEqual(("lz4", "zstd"), found.compression)

    def test_48_bit_addresses_move_the_root_and_widen_the_count(self) -> None:
        found = Superblock.parse(image(incompatible=0x80, root_nid=0, root_nid_48bit=70), SIZE)
        self.assertEqual((70, 100), (found.root_nid, found.blocks))
        wider = image(incompatible=0x80, root_nid=1, root_nid_48bit=70)
        self.assertRaises(SuperblockError, Superblock.parse, wider, SIZE)

    def test_48_bit_addresses_may_leave_the_root_where_it_was(self) -> None:
        found = Superblock.parse(image(incompatible=0x80, root_nid=36), SIZE)
        self.assertEqual((36, 100), (found.root_nid, found.blocks))

    def test_a_root_in_the_metabox_is_not_looked_for_among_the_inodes(self) -> None:
        Superblock.parse(image(incompatible=0x180, root_nid=0, root_nid_48bit=1 << 63), SIZE)

    def test_the_image_may_be_smaller_than_the_layer(self) -> None:
        self.assertEqual(4096, Superblock.parse(image(blocks=1), SIZE).size)

    def test_lz4_is_what_an_image_without_configurations_is_compressed_with(self) -> None:
        self.assertEqual(("lz4",), Superblock.parse(image(incompatible=1), SIZE).compression)
        self.assertEqual((), Superblock.parse(image(), SIZE).compression)

    def test_a_time_that_no_calendar_has_is_no_error(self) -> None:
        self.assertIsNone(Superblock.parse(image(epoch=(1 << 64) - 1), SIZE).built)

    def test_a_checksum_covers_the_first_block(self) -> None:
        for bits in (9, 10, 11, 12):
            data = image(checksummed=True, block_bits=bits)
            Superblock.parse(data, SIZE)
            last = SUPERBLOCK_OFFSET + (1 << bits) if bits < 11 else 1 << bits
            damaged = bytearray(data)
            damaged[last - 1] ^= 1
            self.assertRaises(SuperblockError, Superblock.parse, bytes(damaged), SIZE)


class RefusedTests(SynchronousTestCase):
    def refusal(self, data: bytes, size: int = SIZE) -> str:
        return str(self.assertRaises(SuperblockError, Superblock.parse, data, size))

    def test_a_layer_too_short_for_a_superblock(self) -> None:
        self.assertIn("it has 20 bytes", self.refusal(bytes(20), 20))

    def test_another_format_is_named_where_it_is_known(self) -> None:
        for start, name in (
            (b"\x1f\x8b", "gzip"),
            (b"\x28\xb5\x2f\xfd", "zstd"),
            (b"hsqs", "squashfs"),
            (bytes(257) + b"ustar", "a tar archive"),
        ):
            self.assertIn(f"it looks like {name};", self.refusal(start.ljust(4096, b"\0")))
        self.assertNotIn("looks like", self.refusal(bytes(4096)))

    def test_a_block_size_that_linux_cannot_mount(self) -> None:
        for bits in (0, 8, 13, 255):
            self.assertIn("mkfs.erofs -b 4096", self.refusal(image(block_bits=bits)))

    def test_a_wrong_checksum(self) -> None:
        self.assertIn("checksum", self.refusal(image(compatible=1)))

    def test_a_first_block_that_is_cut_off_under_its_checksum(self) -> None:
        self.assertIn("cut off", self.refusal(image(checksummed=True)[:2000], 2000))

    def test_unknown_features_are_listed_beside_the_known_ones(self) -> None:
        message = self.refusal(image(incompatible=0x40000201))
        self.assertIn("0x200, 0x40000000 (beside 0padding)", message)

    def test_unknown_compression(self) -> None:
        self.assertIn("0x30", self.refusal(image(incompatible=2, compression=0x31)))

    def test_an_image_over_several_devices(self) -> None:
        self.assertIn("device_table names 2 more", self.refusal(image(incompatible=8, extra_devices=2)))

    def test_an_image_that_is_longer_than_its_layer(self) -> None:
        self.assertIn("cut off", self.refusal(image(blocks=101)))

    def test_a_superblock_that_points_beyond_the_image(self) -> None:
        for fields in ({"meta_block": 100}, {"xattr_block": 101}, {"meta_block": 99, "root_nid": 128}):
            self.assertIn("damaged", self.refusal(image(**fields)))

    def test_extension_slots_beyond_the_first_block(self) -> None:
        self.assertIn("damaged", self.refusal(image(extension_slots=200)))


class AnyBytesTests(SynchronousTestCase):
    @given(st.binary(max_size=1300), st.integers(0, 1 << 64))
    def test_bytes_are_an_image_or_an_error(self, data: bytes, size: int) -> None:
        self.parse(data, size)

    @given(
        st.fixed_dictionaries(
            {},
            optional={
                name: st.integers(0, (1 << 8 * struct.calcsize(form)) - 1)
                for name, (form, _) in FIELDS.items()
                if form != "16s" and name != "magic"
            },
        ),
        st.booleans(),
        st.integers(1152, 1 << 63),
    )
    def test_any_field_may_have_any_value(self, fields: dict[str, int], checksummed: bool, size: int) -> None:
        if checksummed:
            fields["block_bits"] = fields.get("block_bits", 0) % 4 + 9
        self.parse(image(checksummed, **fields), size)

    def parse(self, data: bytes, size: int) -> None:
        try:
            found = Superblock.parse(data, size)
        except SuperblockError as error:
            self.assertTrue(str(error))
        else:
            self.assertLessEqual(found.size, size)
