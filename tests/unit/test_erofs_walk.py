from __future__ import annotations

import stat
import struct

from hypothesis import given, settings
from hypothesis import strategies as st
from twisted.trial.unittest import SynchronousTestCase

from erofs_twisted.erofs.walk import Walk, WalkLimits
from tests.unit.erofs_trees import BLOCK, ROOT, HandMade, inode

GRANULE = 4 * BLOCK
DIR, FILE, LINK = stat.S_IFDIR, stat.S_IFREG, stat.S_IFLNK


def at(block: int, slot: int = 0) -> int:
    """The number of an inode in a block."""
    return block * BLOCK // 32 + slot


def walk_of(image: HandMade, **limits: int) -> Walk:
    return Walk(image.superblock, len(image.data), GRANULE, WalkLimits(**limits))


def go(walk: Walk, image: HandMade, *there: int) -> list[list[int]]:
    """Walk to the end; only the granules ``there`` are at hand at first. Returns what each round fetched."""
    data, at_hand, rounds = bytes(image.data), set(there), []
    while True:
        while (found := walk.look()) is not None:
            start, end = found
            if all(granule in at_hand for granule in range(start // GRANULE, -(-end // GRANULE))):
                walk.take(data[start:end])
            else:
                walk.postpone()
        wanted = walk.wanted()
        if not wanted:
            return rounds
        rounds.append([granule for s, e in wanted for granule in range(s // GRANULE, -(-e // GRANULE))])
        at_hand.update(rounds[-1])
        for start, end in wanted:
            walk.arrived(start, end)


class WalkTests(SynchronousTestCase):
    def tree(self) -> HandMade:
        """The root in granule 2; of its directories one is in 4, with data in 6 and a file in 8."""
        image = HandMade(64)
        image.dir(ROOT, {"sub": (at(16), DIR), "near": (ROOT + 40, FILE), "link": (ROOT + 50, LINK)})
        image.file(ROOT + 40, size=10)
        image.file(ROOT + 50, kind=LINK, content=b"near")
        image.dir(at(16), {"far": (at(33), FILE)}, block=25)
        image.file(at(33), size=10)
        return image

    def test_each_round_wants_all_that_is_known_and_missing(self) -> None:
        image = self.tree()
        walk = walk_of(image)
        self.assertEqual([[2], [4], [6], [8]], go(walk, image))
        self.assertEqual((5, 2, []), (walk.inodes, walk.directories, walk.trouble))

    def test_what_is_at_hand_costs_no_round(self) -> None:
        image = self.tree()
        self.assertEqual([], go(walk_of(image), image, 2, 4, 6, 8))
        self.assertEqual([[6]], go(walk_of(image), image, 2, 4, 8))

    def test_a_granule_is_wanted_once(self) -> None:
        image = self.tree()
        walk = walk_of(image)
        self.assertIsNotNone(walk.look())
        walk.postpone()
        self.assertEqual([(2 * GRANULE, 3 * GRANULE)], walk.wanted())
        self.assertEqual([], walk.wanted())

    def test_what_has_come_without_being_wanted_is_looked_at_too(self) -> None:
        image = self.tree()
        walk = walk_of(image)
        for _ in range(2):
            walk.look()
            walk.postpone()
            walk.arrived(2 * GRANULE, 3 * GRANULE)
        self.assertEqual(["what has arrived at byte 32768 cannot be read"], walk.trouble)

    def test_inodes_before_the_first_block_of_inodes_have_wrapped_numbers(self) -> None:
        image = HandMade(64, meta_block=8, root=0)
        image.put(8 * BLOCK, bytes(BLOCK))
        before = HandMade(64)
        before.dir(ROOT, {"early": ((at(4) - at(8)) % (1 << 64), FILE)})
        before.file(at(4))
        image.data = before.data
        walk = walk_of(image)
        self.assertEqual([[2], [1]], go(walk, image))
        self.assertEqual((2, []), (walk.inodes, walk.trouble))

    def test_directories_may_be_any_number_of_blocks(self) -> None:
        image = HandMade(64)
        names = {f"file-{number}": (at(20, number), FILE) for number in range(10)}
        image.dir(ROOT, names, block=30)
        image.put(31 * BLOCK, image.data[30 * BLOCK : 31 * BLOCK])
        image.put(ROOT * 32, inode(DIR | 0o755, 0, size=2 * BLOCK, start_block=30))
        for number in range(10):
            image.file(at(20, number))
        walk = walk_of(image)
        self.assertEqual([[2], [7], [5]], go(walk, image))
        self.assertEqual(21, walk.inodes)

    def test_a_compressed_files_map_is_wanted_as_far_as_it_is_likely_to_be_used_first(self) -> None:
        image = HandMade(64)
        image.dir(ROOT, {"compressed": (at(19), FILE), "chunks": (at(27), FILE)})
        image.put(19 * BLOCK, inode(layout=3, size=4000 * BLOCK))
        image.put(27 * BLOCK, inode(layout=4, size=6000 * BLOCK))
        self.assertEqual([[2], [4, 6], [5, 7]], go(walk_of(image, map_size=2 * BLOCK), image))
        self.assertEqual([[2], [4, 6], [5, 7, 8]], go(walk_of(image), image))

    def test_a_links_target_is_wanted_wherever_it_is(self) -> None:
        image = HandMade(64)
        image.dir(ROOT, {"link": (ROOT + 50, LINK)})
        image.put((ROOT + 50) * 32, inode(LINK | 0o777, 0, size=300, start_block=40))
        self.assertEqual([[2], [10]], go(walk_of(image), image))

    def test_shared_attributes_are_wanted_each_once_and_whole(self) -> None:
        image = HandMade(64, xattr_block=43)
        image.dir(ROOT, {"one": (ROOT + 40, FILE), "two": (ROOT + 50, FILE)})
        body = struct.pack("<IB7xI", 0, 1, BLOCK // 4 - 2)
        for number in (40, 50):
            image.put((ROOT + number) * 32, inode(xattr_count=2), body)
        image.put(44 * BLOCK - 8, struct.pack("<BBH", 8, 6, 16))
        walk = walk_of(image)
        self.assertEqual([[2], [10], [11]], go(walk, image))
        self.assertEqual([], walk.trouble)

    def test_an_inode_across_a_granules_end_needs_both(self) -> None:
        image = HandMade(64)
        place = at(20) - 1
        image.dir(ROOT, {"across": (place, FILE)})
        image.put(place * 32, inode(extended=True))
        walk = walk_of(image)
        self.assertEqual([[2], [4, 5]], go(walk, image))
        self.assertEqual(2, walk.inodes)
        self.assertEqual([[4, 5]], go(walk_of(image), image, 2, 4))


class DamagedTests(SynchronousTestCase):
    def trouble(self, image: HandMade, **limits: int) -> str:
        walk = walk_of(image, **limits)
        go(walk, image)
        return "; ".join(walk.trouble)

    def test_directories_in_a_circle_are_walked_once(self) -> None:
        image = HandMade(64)
        image.dir(ROOT, {"sub": (at(16), DIR), "self": (ROOT, DIR), "lie": (at(16), FILE)})
        image.dir(at(16), {"up": (ROOT, DIR), "lie": (ROOT, FILE)})
        walk = walk_of(image)
        self.assertEqual([[2], [4]], go(walk, image))
        self.assertEqual(2, walk.directories)

    def test_no_place_beyond_the_image_is_looked_at(self) -> None:
        image = HandMade(64)
        image.dir(ROOT, {"beyond": (at(64), FILE), "first": (0, FILE), "far": ((1 << 63) + 1, FILE)})
        self.assertIn("is not within its 262144 bytes", self.trouble(image))
        image.put(ROOT * 32, inode(DIR | 0o755, 0, size=BLOCK, start_block=64))
        self.assertIn("is beyond its end", self.trouble(image))

    def test_a_damaged_inode_is_left_out(self) -> None:
        image = HandMade(64)
        image.dir(ROOT, {"bad": (at(16), FILE), "good": (at(20), FILE)})
        image.put(16 * BLOCK, b"\xff" * 64)
        image.file(at(20))
        walk = walk_of(image)
        self.assertEqual([[2], [4, 5]], go(walk, image))
        self.assertEqual(2, walk.inodes)
        self.assertIn("format 0xffff, which is not known here (byte 65536)", walk.trouble[0])

    def test_it_ends_at_so_many_inodes(self) -> None:
        image = HandMade(64)
        image.dir(ROOT, {f"f{number}": (at(16, number), FILE) for number in range(20)})
        self.assertEqual("it has more than 20 inodes", self.trouble(image, inodes=20))
        self.assertNotIn("more than", self.trouble(image, inodes=21))

    def test_it_ends_at_so_many_bytes_of_directories(self) -> None:
        image = HandMade(64)
        image.dir(ROOT, {"sub": (at(16), DIR)})
        image.put(16 * BLOCK, inode(DIR | 0o755, 0, size=20 * BLOCK, start_block=20))
        self.assertIn("more than 40000 bytes", self.trouble(image, directory_bytes=40000))

    def test_it_wants_no_more_than_so_many_granules(self) -> None:
        image = HandMade(64)
        image.dir(ROOT, {f"f{block}": (at(block), FILE) for block in (16, 20, 24)})
        for block in (16, 20, 24):
            image.put(block * BLOCK, inode(layout=3, size=9000 * BLOCK))
        walk = walk_of(image, granules=3)
        rounds = go(walk, image)
        self.assertEqual([1, 2], [len(granules) for granules in rounds])
        self.assertEqual(["it is spread over more than 3 places"], walk.trouble)

    def test_it_follows_no_more_than_so_many_shared_attributes(self) -> None:
        image = HandMade(64, xattr_block=40)
        image.dir(ROOT, {"one": (ROOT + 40, FILE)})
        body = struct.pack("<IB7x3I", 0, 3, 0, 4096, 8192)
        image.put((ROOT + 40) * 32, inode(xattr_count=4), body)
        self.assertEqual([[2], [10]], go(walk_of(image, shared_xattrs=1), image))

    def test_inodes_in_a_metabox_are_out_of_reach(self) -> None:
        image = HandMade(64, root=1 << 63, features=("metabox",))
        self.assertEqual("its inodes are compressed, in a metabox", self.trouble(image))

    @settings(max_examples=200, deadline=None)
    @given(st.data())
    def test_any_bytes_end_the_walk(self, data: st.DataObject) -> None:
        image = HandMade(32, xattr_block=3)
        image.dir(ROOT, {"sub": (at(9), DIR), "f": (at(12), FILE)})
        image.dir(at(9), {"up": (ROOT, DIR), "g": (at(12), FILE)}, block=14)
        image.put(12 * BLOCK, inode(xattr_count=3), struct.pack("<IB7xI", 0, 1, 5))
        for offset in data.draw(st.lists(st.integers(8 * BLOCK, 15 * BLOCK - 1), max_size=8)):
            near = data.draw(st.sampled_from((8 * BLOCK, 9 * BLOCK, 12 * BLOCK, 14 * BLOCK)))
            image.put(near + offset % 128, data.draw(st.binary(min_size=1, max_size=8)))
        walk = walk_of(image, inodes=500, directory_bytes=100_000)
        for fetched in go(walk, image):
            self.assertTrue(all(0 <= granule < 8 for granule in fetched))
        self.assertLessEqual(walk.inodes, 500)
