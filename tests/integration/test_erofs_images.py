"""Superblocks that mkfs.erofs writes, and what dump.erofs says of them."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

from twisted.trial.unittest import SynchronousTestCase

import erofs_twisted
from erofs_twisted.erofs.superblock import Superblock, SuperblockError

SOURCE = Path(erofs_twisted.__file__).parent


def run(program: str, *arguments: str) -> str:
    if shutil.which(program) is None:
        raise AssertionError(f"{program} is missing: apt-get install erofs-utils")
    done = subprocess.run([program, *arguments], check=True, timeout=60, capture_output=True, text=True)
    return done.stdout


class RealImageTests(SynchronousTestCase):
    def parse(self, *options: str) -> tuple[Superblock, dict[str, str]]:
        """Our view of an image, and dump.erofs's: its lines as label and value."""
        path = Path(self.mktemp())
        run("mkfs.erofs", *options, str(path), str(SOURCE))
        dump = dict(re.findall(r"^(.*?): +(.*?) *$", run("dump.erofs", "-s", str(path)), re.MULTILINE))
        data = path.read_bytes()
        return Superblock.parse(data[:4096], len(data)), dump

    def test_we_read_what_dump_erofs_reads(self) -> None:
        for options in (
            (),
            ("-zlz4hc",),
            ("-zlz4hc", "-C65536"),
            ("-zlz4hc", "-Elegacy-compress"),
            ("-zlz4hc", "-C65536", "-Eztailpacking"),
            ("-Enosbcrc",),
            ("--chunksize=65536",),
            ("-T1234567", "-U12345678-1234-1234-1234-123456789abc"),
        ):
            ours, theirs = self.parse(*options)
            self.assertEqual(int(theirs["Filesystem blocks"]), ours.blocks)
            self.assertEqual(int(theirs["Filesystem inode metadata start block"]), ours.meta_block)
            self.assertEqual(int(theirs["Filesystem shared xattr metadata start block"]), ours.xattr_block)
            self.assertEqual(int(theirs["Filesystem root nid"]), ours.root_nid)
            self.assertEqual(int(theirs["Filesystem inode count"]), ours.inodes)
            self.assertEqual(theirs["Filesystem UUID"], str(ours.uuid))
            self.assertEqual("0padding" in theirs["Filesystem features"], "0padding" in ours.features)
            self.assertEqual("chunked_file" in theirs["Filesystem features"], "chunked_file" in ours.features)
            self.assertEqual(("lz4",) if "-zlz4hc" in options else (), ours.compression)

    def test_a_checksum_that_mkfs_erofs_wrote_finds_a_flipped_bit(self) -> None:
        path = Path(self.mktemp())
        run("mkfs.erofs", str(path), str(SOURCE))
        data = bytearray(path.read_bytes())
        for byte in (1024 + 16, 1024 + 127, 4095):
            data[byte] ^= 1
            error = self.assertRaises(SuperblockError, Superblock.parse, bytes(data[:4096]), len(data))
            self.assertIn("checksum", str(error))
            data[byte] ^= 1

    def test_an_image_with_a_blob_device_is_refused(self) -> None:
        path, device = Path(self.mktemp()), Path(self.mktemp())
        run("mkfs.erofs", "--chunksize=65536", f"--blobdev={device}", str(path), str(SOURCE))
        data = path.read_bytes()
        error = self.assertRaises(SuperblockError, Superblock.parse, data[:4096], len(data))
        self.assertIn("device_table names 1 more", str(error))

    def test_an_image_that_lost_its_end_is_refused(self) -> None:
        path = Path(self.mktemp())
        run("mkfs.erofs", str(path), str(SOURCE))
        data = path.read_bytes()
        error = self.assertRaises(SuperblockError, Superblock.parse, data[:4096], len(data) - 4096)
        self.assertIn("cut off", str(error))
