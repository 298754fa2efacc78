"""The power fails while cache and records are written: a real file system, on a disk that keeps no more."""

from __future__ import annotations

import os
import random
import shutil
import signal
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import attrs
from twisted.trial.unittest import SynchronousTestCase

from erofs_twisted.blocks import blobfile
from erofs_twisted.blocks.blobfile import BlobFile
from erofs_twisted.blocks.chunks import ChunkMap
from erofs_twisted.blocks.header import DamagedFile
from erofs_twisted.state.journal import RECORD, Journal
from tests import cachewriter, journalwriter
from tests.cachewriter import CHUNK, COUNT, IDENTITY, chunk
from tests.daemon import run

DISK = "erofs-twisted-power-cut"
DISK_SIZE = 128 << 20
SECTOR = 512
CUTS = 50
SHORTEST, LONGEST = 0.02, 0.5
"""Seconds of writing before the power fails."""


@attrs.define
class Writer:
    """A process that writes to the disk, and what it says."""

    pid: int
    said: int

    @classmethod
    def fork(cls, write: Callable[[Path, Callable[[str], object]], object], path: Path) -> Writer:
        reading, writing = os.pipe2(os.O_NONBLOCK)
        pid = os.fork()
        if pid == 0:
            try:
                write(path, lambda text: os.write(writing, f"{text}\n".encode()))
            finally:
                os._exit(1)
        os.close(writing)
        return cls(pid, reading)

    def lines(self) -> list[str]:
        """What it has said since it was last asked."""
        try:
            return os.read(self.said, 1 << 20).decode().splitlines()
        except BlockingIOError:
            return []

    def end(self) -> None:
        os.kill(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)
        os.close(self.said)


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

    def write_until_the_power_fails(self, seconds: float) -> tuple[int, dict[int, int]]:
        """How many syncs of the cache are done before, and the steps of the mounts on record; the disk keeps
        none of the writes that come then."""
        self.do("dmsetup", "create", DISK, "--noudevsync", *self.table("linear", self.loop, "0"))
        minor = self.do("dmsetup", "info", "--columns", "--noheadings", "-o", "minor", DISK)
        self.do("mount", f"/dev/dm-{minor}", self.mountpoint)
        (self.mountpoint / "blob").unlink(missing_ok=True)
        shutil.rmtree(self.mountpoint / "state", ignore_errors=True)
        caching = Writer.fork(cachewriter.main, self.mountpoint / "blob")
        recording = Writer.fork(journalwriter.main, self.mountpoint / "state")
        try:
            time.sleep(seconds)
            synced, recorded = len(caching.lines()), recording.lines()
            self.do("dmsetup", "suspend", "--noudevsync", "--nolockfs", "--noflush", DISK)
            dead = self.table("flakey", self.loop, "0", "0", "3600", "1", "drop_writes")
            self.do("dmsetup", "load", DISK, *dead)
            self.do("dmsetup", "resume", "--noudevsync", DISK)
            # They go on as if nothing had happened.
            caching.lines()
            deadline = time.monotonic() + 10
            while not caching.lines():
                self.assertLess(time.monotonic(), deadline, "the writer is stuck")
                time.sleep(0.01)
        finally:
            caching.end()
            recording.end()
        self.do("umount", self.mountpoint)
        self.do("dmsetup", "remove", "--noudevsync", "--retry", DISK)
        return synced, {int(number): int(step) for number, step in map(str.split, recorded)}

    def chunks(self) -> int:
        """How many the cache says are there, all of which must be right."""
        next_boot = self.patch(blobfile, "boot_id", lambda: b"the next boot".ljust(36))
        try:
            file, chunks = BlobFile.open(str(self.mountpoint / "blob"), IDENTITY)
        except (DamagedFile, FileNotFoundError):
            return 0
        finally:
            next_boot.restore()
        try:
            self.assert_right(file, chunks)
        finally:
            file.close()
        return COUNT - chunks.missing

    def assert_right(self, file: BlobFile, chunks: ChunkMap) -> None:
        for first, end in chunks.runs_present(0, COUNT):
            for number in range(first, end):
                found = os.pread(file.fd, CHUNK, number * CHUNK)
                self.assertEqual(chunk(number), found, f"chunk {number}")

    def assert_on_record(self, recorded: dict[int, int]) -> None:
        journal = Journal(self.mountpoint / "state")
        there = {record.mountpoint: record.size for record in journal.records()}
        damaged = len([*journal.state_dir.glob(f"*/{RECORD}")]) - len(there)
        self.assertEqual(0, damaged, "a record is there as a whole or not at all")
        for number, step in recorded.items():
            self.assertGreaterEqual(there[journalwriter.mountpoint(number)], step, f"mount {number}")

    def test_no_chunk_is_there_whose_bytes_are_not_and_no_record_is_lost(self) -> None:
        seed = random.randrange(1000)
        moments = random.Random(seed)
        found: list[tuple[Any, ...]] = []
        for cut in range(CUTS):
            seconds = moments.uniform(SHORTEST, LONGEST)
            synced, recorded = self.write_until_the_power_fails(seconds)
            self.do("mount", self.loop, self.mountpoint)
            try:
                chunks = self.chunks()
                self.assert_on_record(recorded)
            except Exception as error:
                raise AssertionError(f"cut {cut} of seed {seed}, after {seconds:.3f} s") from error
            finally:
                self.do("umount", self.mountpoint)
            if synced > 1:
                # A sync brings the marks of the one before it on disk too.
                self.assertGreater(chunks, 0, f"cut {cut} of seed {seed}, after {synced} syncs")
            found.append((synced, chunks, len(recorded)))
        syncs, chunks, records = map(sum, zip(*found, strict=True))
        print(f"\n{CUTS} cuts, seed {seed}: {syncs} syncs, {chunks} chunks and {records} records are there")
        self.assertGreater(min(syncs, chunks, records), CUTS)
