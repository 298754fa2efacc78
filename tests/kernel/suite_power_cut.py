"""The power fails while the cache is written: a real file system, over a disk that takes no more writes."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from twisted.trial.unittest import SynchronousTestCase

from erofs_twisted.blocks import blobfile
from erofs_twisted.blocks.blobfile import BlobFile
from erofs_twisted.blocks.chunks import ChunkMap
from erofs_twisted.blocks.header import DamagedFile
from tests.cachewriter import CHUNK, COUNT, IDENTITY, chunk
from tests.daemon import PROJECT, run

DISK = "erofs-twisted-power-cut"
DISK_SIZE = 128 << 20
SECTOR = 512


class PowerCutTests(SynchronousTestCase):
    def setUp(self) -> None:
        self.directory = Path(tempfile.mkdtemp(prefix="power-cut-"))
        self.addCleanup(shutil.rmtree, self.directory)
        self.mountpoint = self.directory / "mnt"
        self.mountpoint.mkdir()
        image = self.directory / "disk"
        with image.open("wb") as file:
            file.truncate(DISK_SIZE)
        self.do("mkfs.ext4", "-q", image)
        self.do("modprobe", "dm-flakey")
        self.loop = self.do("losetup", "--find", "--show", image)
        self.addCleanup(run, "losetup", "--detach", self.loop)
        self.addCleanup(run, "dmsetup", "remove", "--noudevsync", "--retry", DISK)
        self.addCleanup(run, "umount", "-l", self.mountpoint)

    def do(self, *words: str | Path) -> str:
        done = run(*words)
        self.assertEqual(0, done.returncode, f"{words}: {done.stderr}")
        return done.stdout.strip()

    def table(self, *target: str) -> tuple[str, str]:
        return "--table", " ".join(("0", str(DISK_SIZE // SECTOR), *target))

    def write_until_the_power_fails(self, syncs: int) -> None:
        """Syncs that are done before; the disk keeps none of the writes that come then."""
        self.do("dmsetup", "create", DISK, "--noudevsync", *self.table("linear", self.loop, "0"))
        minor = self.do("dmsetup", "info", "--columns", "--noheadings", "-o", "minor", DISK)
        self.do("mount", f"/dev/dm-{minor}", self.mountpoint)
        path = self.mountpoint / "blob"
        path.unlink(missing_ok=True)
        command = [sys.executable, "-m", "tests.cachewriter", path]
        writer = subprocess.Popen(command, cwd=PROJECT, stdout=subprocess.PIPE)
        assert writer.stdout is not None
        try:
            with writer.stdout:
                for _ in range(syncs):
                    self.assertTrue(writer.stdout.readline())
                self.do("dmsetup", "suspend", "--noudevsync", "--nolockfs", "--noflush", DISK)
                dead = self.table("flakey", self.loop, "0", "0", "3600", "1", "drop_writes")
                self.do("dmsetup", "load", DISK, *dead)
                self.do("dmsetup", "resume", "--noudevsync", DISK)
                # It goes on as if nothing had happened.
                self.assertTrue(writer.stdout.readline())
        finally:
            writer.kill()
            writer.wait()
        self.do("umount", self.mountpoint)
        self.do("dmsetup", "remove", "--noudevsync", "--retry", DISK)

    def found(self) -> ChunkMap:
        """What is there after the restart, all of which must be right."""
        self.do("mount", self.loop, self.mountpoint)
        try:
            file, chunks = BlobFile.open(str(self.mountpoint / "blob"), IDENTITY)
        except (DamagedFile, FileNotFoundError):
            self.do("umount", self.mountpoint)
            return ChunkMap(COUNT)
        try:
            for first, end in chunks.runs_present(0, COUNT):
                for number in range(first, end):
                    found = os.pread(file.fd, CHUNK, number * CHUNK)
                    self.assertEqual(chunk(number), found, f"chunk {number}")
        finally:
            file.close()
            self.do("umount", self.mountpoint)
        return chunks

    def test_no_chunk_is_there_whose_bytes_are_not(self) -> None:
        self.patch(blobfile, "boot_id", lambda: b"the next boot".ljust(36))
        for syncs in (1, 2, 3, 5, 8):
            self.write_until_the_power_fails(syncs)
            there = COUNT - self.found().missing
            if syncs > 1:
                # A sync brings the marks of the one before it on disk too.
                self.assertGreater(there, 0, f"after {syncs} syncs")
