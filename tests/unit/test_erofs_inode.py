from __future__ import annotations

import stat
import struct
from typing import Any

from hypothesis import given
from hypothesis import strategies as st
from twisted.trial.unittest import SynchronousTestCase

from erofs_twisted.erofs.directory import entries
from erofs_twisted.erofs.inode import (
    DataLayout,
    Inode,
    MetadataError,
    is_plain_file,
    shared_xattrs,
    xattr_entry_size,
)
from tests.unit.erofs_trees import BLOCK, directory, inode

PLACE = 16 * BLOCK
DIRECTORY = stat.S_IFDIR | 0o755
LINK = stat.S_IFLNK | 0o777


class InodeTests(SynchronousTestCase):
    def test_a_compact_inode(self) -> None:
        found = Inode.parse(inode(DIRECTORY, 0, size=5000, start_block=7, links=3))
        self.assertEqual(Inode(stat.S_IFDIR, DataLayout.FLAT_PLAIN, 5000, 32, 0, 7, 0), found)
        self.assertTrue(found.is_directory)
        self.assertEqual([(7 * BLOCK, 5000)], found.runs(PLACE, BLOCK))

    def test_an_extended_inode(self) -> None:
        found = Inode.parse(
            inode(stat.S_IFREG | 0o600, 0, size=1 << 40, start_block=7, extended=True, links=2)
        )
        self.assertEqual((64, 1 << 40, 7 | 2 << 32), (found.header_size, found.size, found.start_block))

    def test_an_inode_is_read_where_it_lies(self) -> None:
        data = b"x" * 32 + inode(size=9)
        self.assertEqual(9, Inode.parse(data, 32).size)

    def test_the_high_part_of_an_address_is_there_where_a_compact_inode_has_no_count_of_links(self) -> None:
        regular = Inode.parse(inode(size=1, start_block=7, links=2, flags=0x10))
        self.assertEqual(7 | 2 << 32, regular.start_block)
        # In a directory the same bit says that "." is left out.
        directory = Inode.parse(inode(DIRECTORY, size=1, start_block=7, links=2, flags=0x10))
        self.assertEqual(7, directory.start_block)

    def test_attributes_lie_between_the_inode_and_its_data(self) -> None:
        found = Inode.parse(inode(LINK, 2, size=10, xattr_count=3))
        self.assertEqual((20, 52), (found.xattr_size, found.body))
        self.assertEqual([(PLACE + 52, 10)], found.runs(PLACE, BLOCK))

    def test_inline_data_is_only_what_fills_no_block(self) -> None:
        found = Inode.parse(inode(DIRECTORY, 2, size=2 * BLOCK + 100, start_block=50))
        self.assertEqual([(50 * BLOCK, 2 * BLOCK), (PLACE + 32, 100)], found.runs(PLACE, BLOCK))
        whole = Inode.parse(inode(DIRECTORY, 2, size=2 * BLOCK, start_block=50))
        self.assertEqual([(50 * BLOCK, 2 * BLOCK)], whole.runs(PLACE, BLOCK))

    def test_a_hole_has_no_run(self) -> None:
        for extended, links in ((False, 1), (True, 0xFFFF)):
            found = Inode.parse(inode(size=BLOCK, start_block=0xFFFFFFFF, extended=extended, links=links))
            self.assertEqual((None, []), (found.start_block, found.runs(PLACE, BLOCK)))

    def test_a_device_has_no_data(self) -> None:
        found = Inode.parse(inode(stat.S_IFCHR | 0o600, 0, start_block=0x103))
        self.assertEqual((None, []), (found.start_block, found.runs(PLACE, BLOCK)))

    def test_inline_data_across_a_blocks_end_is_refused(self) -> None:
        found = Inode.parse(inode(DIRECTORY, 2, size=BLOCK - 40))
        self.assertRaises(MetadataError, found.runs, PLACE + 32, BLOCK)
        self.assertEqual([(PLACE + 32, BLOCK - 40)], found.runs(PLACE, BLOCK))

    def test_what_is_not_flat_has_no_runs(self) -> None:
        for layout in (1, 3, 4):
            self.assertRaises(MetadataError, Inode.parse(inode(layout=layout)).runs, PLACE, BLOCK)

    def test_a_file_with_neither_attributes_nor_a_map_is_told_at_a_glance(self) -> None:
        for layout in range(5):
            for extended in (False, True):
                self.assertEqual(layout in (0, 2), is_plain_file(inode(layout=layout, extended=extended)))
        for data in (inode(DIRECTORY), inode(LINK, 2), inode(xattr_count=1), inode(flags=0x20), inode()[:31]):
            self.assertFalse(is_plain_file(data))

    def test_what_no_inode_can_be_is_refused(self) -> None:
        for data in (
            b"",
            inode()[:31],
            inode(extended=True)[:63],
            inode(layout=5),
            inode(flags=0x20),
            inode(mode=0o644),
            inode(extended=True, size=1 << 63),
            inode(layout=4, start_block=0x80),
        ):
            self.assertRaises(MetadataError, Inode.parse, data)


class MapTests(SynchronousTestCase):
    def size(self, place: int = PLACE, **fields: Any) -> int:
        return Inode.parse(inode(**fields)).map_size(place, BLOCK)

    def test_flat_files_have_none(self) -> None:
        self.assertEqual(32, self.size(size=10 * BLOCK))
        self.assertEqual(32 + 12, self.size(layout=2, xattr_count=1))

    def test_a_compressed_files_is_as_long_as_if_nothing_were_compressed(self) -> None:
        # Aligned to 8, a header, and 8 or 4 bytes a block.
        self.assertEqual(48 + 16 + 8 * 3, self.size(layout=1, size=2 * BLOCK + 1, xattr_count=1))
        self.assertEqual(32 + 16 + 4 * 2, self.size(layout=3, size=2 * BLOCK))

    def test_one_of_chunks_is_a_table(self) -> None:
        self.assertEqual(32 + 4 * 5, self.size(layout=4, size=5 * BLOCK))
        self.assertEqual(32 + 8 * 3, self.size(layout=4, size=5 * BLOCK, start_block=0x21))
        self.assertEqual(48 + 8, self.size(layout=4, size=1, start_block=0x20, xattr_count=1))


class XattrTests(SynchronousTestCase):
    def test_shared_ones_are_named_by_number(self) -> None:
        body = struct.pack("<IB7xII", 0, 2, 5, 1000) + b"inline ones"
        self.assertEqual([5, 1000], shared_xattrs(body))
        self.assertEqual([], shared_xattrs(b""))

    def test_more_than_fit_are_refused(self) -> None:
        self.assertRaises(MetadataError, shared_xattrs, struct.pack("<IB7xI", 0, 2, 5))
        self.assertRaises(MetadataError, shared_xattrs, bytes(8))

    def test_an_entry_says_its_size(self) -> None:
        self.assertEqual(4 + 12, xattr_entry_size(struct.pack("<BBH", 7, 6, 4)))
        self.assertRaises(MetadataError, xattr_entry_size, b"123")


class DirectoryTests(SynchronousTestCase):
    LISTED = [(b".", 36, 2), (b"..", 36, 2), (b"a", 40, 1), (b"longer name", 1 << 40, 7)]

    def test_entries_come_in_order_with_their_names(self) -> None:
        expected = [(nid, kind, name) for name, nid, kind in self.LISTED]
        self.assertEqual(expected, list(entries(directory(self.LISTED))))

    def test_the_last_name_ends_with_the_block_or_before_it(self) -> None:
        padded = directory(self.LISTED).ljust(BLOCK, b"\0")
        self.assertEqual(list(entries(directory(self.LISTED))), list(entries(padded)))

    def test_damaged_blocks_are_refused(self) -> None:
        good = directory(self.LISTED)
        for offset, value in ((8, 0), (8, 11), (8, 13), (8, 60000), (20, 5), (20, 48), (44, 60000)):
            damaged = bytearray(good)
            struct.pack_into("<H", damaged, offset, value)
            self.assertRaises(MetadataError, list, entries(bytes(damaged)))
        for block in (b"", good[:11], good[:48], directory([(b"", 1, 1)]), directory([(b"n" * 256, 1, 1)])):
            self.assertRaises(MetadataError, list, entries(block))


class AnyBytesTests(SynchronousTestCase):
    @given(st.binary(max_size=80), st.integers(0, 1 << 50))
    def test_bytes_are_an_inode_with_places_or_an_error(self, data: bytes, place: int) -> None:
        try:
            found = Inode.parse(data)
            self.assertGreaterEqual(found.map_size(place, BLOCK), found.body)
            for _, length in found.runs(place, BLOCK):
                self.assertGreater(length, 0)
        except MetadataError as error:
            self.assertTrue(str(error))

    @given(st.binary(min_size=32, max_size=64), st.sampled_from((0, 1, 4, 5)))
    def test_what_is_told_at_a_glance_is_what_all_of_the_inode_says(self, data: bytes, form: int) -> None:
        data = struct.pack("<HH", form, 0) + data[4:]
        try:
            found = Inode.parse(data)
        except MetadataError:
            return
        self.assertEqual(found.kind == stat.S_IFREG, is_plain_file(data))

    @given(st.binary(max_size=300))
    def test_bytes_are_entries_or_an_error(self, data: bytes) -> None:
        try:
            for _, _, name in entries(data):
                self.assertTrue(0 < len(name) <= 255)
        except MetadataError as error:
            self.assertTrue(str(error))

    @given(st.lists(st.tuples(st.binary(min_size=1, max_size=20), st.integers(0, (1 << 64) - 1)), min_size=1))
    def test_what_was_written_is_read(self, listed: list[tuple[bytes, int]]) -> None:
        listed = [(name.replace(b"\0", b"0"), nid) for name, nid in listed]
        found = entries(directory([(name, nid, 1) for name, nid in listed]))
        self.assertEqual(listed, [(name, nid) for nid, _, name in found])

    @given(st.binary(max_size=1100))
    def test_bytes_are_attributes_or_an_error(self, data: bytes) -> None:
        try:
            self.assertLessEqual(4 * len(shared_xattrs(data)), len(data))
        except MetadataError as error:
            self.assertTrue(str(error))
