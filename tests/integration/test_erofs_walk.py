"""What we read in images that mkfs.erofs makes is the tree that they were made of."""

from __future__ import annotations

import atexit
import functools
import os
import shutil
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path

from twisted.trial.unittest import SynchronousTestCase

from erofs_twisted.erofs.directory import entries
from erofs_twisted.erofs.inode import SLOT, Inode
from erofs_twisted.erofs.superblock import Superblock
from erofs_twisted.erofs.walk import Walk
from tests.images import build_erofs
from tests.scenery import BIG, scenery

GRANULE = 64 * 1024
OPTIONS = (
    (),
    ("-zlz4hc",),
    ("-zlz4hc", "-Elegacy-compress"),
    ("-zlz4hc", "-C65536", "-Eztailpacking,fragments,dedupe"),
    ("-Eforce-inode-compact",),
    ("-Eforce-inode-extended",),
    ("-Enoinline_data",),
    ("--chunksize=4096",),
    ("--chunksize=65536", "-Eforce-chunk-indexes"),
    ("-zlz4hc", "--chunksize=65536"),
)
Entry = tuple[int, int]
"""A file's kind, and its size; 0 for a directory, whose size each file system has its own idea of."""


class ReadImage:
    """An image, read as the format's description says, without a walk."""

    def __init__(self, path: Path) -> None:
        self.data = path.read_bytes()
        self.superblock = Superblock.parse(self.data[:4096], len(self.data))

    def contents(self) -> dict[str, Entry]:
        return dict(self._below(self.superblock.root_nid, ""))

    def _below(self, nid: int, path: str) -> Iterator[tuple[str, Entry]]:
        for number, _, name in self._entries(nid):
            if name not in (b".", b".."):
                child = os.path.join(path, os.fsdecode(name))
                inode = Inode.parse(self.data, self._place(number))
                yield child, (inode.kind, 0 if inode.is_directory else inode.size)
                if inode.is_directory:
                    yield from self._below(number, child)

    def _entries(self, nid: int) -> Iterator[tuple[int, int, bytes]]:
        place, size = self._place(nid), self.superblock.block_size
        runs = Inode.parse(self.data, place).runs(place, size)
        whole = b"".join(self.data[offset : offset + length] for offset, length in runs)
        for start in range(0, len(whole), size):
            yield from entries(whole[start : start + size])

    def _place(self, nid: int) -> int:
        return self.superblock.meta_block * self.superblock.block_size + nid * SLOT


def tree_contents(tree: Path) -> dict[str, Entry]:
    found = {}
    for path in tree.rglob("*"):
        status = path.lstat()
        kind = stat.S_IFMT(status.st_mode)
        found[str(path.relative_to(tree))] = (kind, 0 if kind == stat.S_IFDIR else status.st_size)
    return found


@functools.cache
def made() -> tuple[Path, dict[tuple[str, ...], ReadImage]]:
    """A tree, and the images of it by their options; once a process."""
    directory = Path(tempfile.mkdtemp(prefix="erofs-walk-"))
    atexit.register(shutil.rmtree, directory, ignore_errors=True)
    tree = directory / "tree"
    shutil.copytree(scenery().tree, tree, symlinks=True, ignore=shutil.ignore_patterns(BIG))
    os.mkfifo(tree / "fifo")
    many = tree / "many"
    many.mkdir()
    for number in range(1000):
        (many / f"a name that fills the directory's blocks soon, {number:05}").touch()
    os.setxattr(many, "user.on-a-directory", b"x" * 200)
    os.setxattr(tree / "executable", "user.on-a-file", b"y" * 3)
    path = directory / "image"
    return tree, {options: ReadImage(build_erofs(tree, path, *options)) for options in OPTIONS}


class RealImageTests(SynchronousTestCase):
    def setUp(self) -> None:
        self.tree, self.images = made()

    def test_every_file_is_there_with_its_kind_and_size(self) -> None:
        expected = tree_contents(self.tree)
        for options, image in self.images.items():
            self.assertEqual(expected, image.contents(), options)

    def test_a_walk_sees_them_all_in_few_rounds(self) -> None:
        expected = tree_contents(self.tree)
        for options, image in self.images.items():
            walk = Walk(image.superblock, len(image.data), GRANULE)
            rounds = self.walk_through(walk, image.data)
            self.assertEqual([], walk.trouble, options)
            self.assertEqual(len(expected) + 1, walk.inodes, options)
            directories = sum(kind == stat.S_IFDIR for kind, _ in expected.values())
            self.assertEqual(directories + 1, walk.directories, options)
            # The tree is 32 directories deep.
            self.assertLessEqual(rounds, 8, options)

    def test_a_walk_through_an_image_that_lost_its_end_says_so(self) -> None:
        image = self.images[()]
        walk = Walk(image.superblock, len(image.data) // 4, GRANULE)
        self.walk_through(walk, image.data)
        self.assertTrue(walk.trouble)

    def walk_through(self, walk: Walk, data: bytes) -> int:
        """Returns how many rounds it took."""
        rounds, at_hand = 0, set()
        while True:
            while (found := walk.look()) is not None:
                start, end = found
                if {start // GRANULE, (end - 1) // GRANULE} <= at_hand:
                    walk.take(data[start:end])
                else:
                    walk.postpone()
            wanted = walk.wanted()
            if not wanted:
                return rounds
            rounds += 1
            for start, end in wanted:
                at_hand.update(range(start // GRANULE, -(-end // GRANULE)))
                walk.arrived(start, end)
