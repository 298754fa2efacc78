"""The power fails while a cache and a journal are written: a real file system, over a disk that takes no more
writes."""

from __future__ import annotations

import os
import select
import shutil
import signal
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from random import Random

import attrs
from twisted.trial.unittest import SynchronousTestCase

from erofs_twisted.blocks import blobfile
from erofs_twisted.blocks.blobfile import BlobFile
from erofs_twisted.blocks.header import DamagedFile
from erofs_twisted.files import UNFINISHED
from erofs_twisted.state.journal import RECORD, Journal
from erofs_twisted.syscalls import mount, umount
from tests import cachewriter, journalwriter
from tests.cachewriter import CHUNK, COUNT, IDENTITY, chunk
from tests.journalwriter import Histories
from tests.processes import run

CUTS = 50
QUIET = 4
"""One in so many cuts is made when nobody writes any more."""
DISK = "erofs-twisted-power-cut"
DISK_SIZE = 64 << 20
SECTOR = 512
MOST_RECORDS = 16
"""Acknowledgements that are waited for, at most, before a cut."""
LATER = 0.02
"""Seconds, at most, from there to the cut, and from the cut to the end."""
SEED = "POWER_CUT_SEED"
"""In the environment: the number that an earlier run has printed."""


class Writer:
    """A process that calls ``write`` with a way to tell what it does, until `kill`."""

    def __init__(self, write: Callable[[Callable[[str], None]], object]) -> None:
        self._reading, writing = os.pipe()
        self._rest = b""
        self._pid = os.fork()
        if self._pid == 0:
            try:
                write(lambda line: os.write(writing, line.encode() + b"\n"))
            finally:
                os._exit(1)
        os.close(writing)
        os.set_blocking(self._reading, False)

    def lines(self) -> list[str]:
        """What it has told since."""
        try:
            while data := os.read(self._reading, 1 << 16):
                self._rest += data
        except BlockingIOError:
            pass
        *lines, self._rest = self._rest.split(b"\n")
        return [line.decode() for line in lines]

    def wait(self, seconds: float = 30.0) -> None:
        """Until it tells something."""
        if not select.select([self._reading], [], [], seconds)[0]:
            raise AssertionError(f"it has told nothing for {seconds:g} s")

    def kill(self) -> list[str]:
        """What it has told before."""
        os.kill(self._pid, signal.SIGKILL)
        _, status = os.waitpid(self._pid, 0)
        lines = self.lines()
        os.close(self._reading)
        if status != signal.SIGKILL:
            raise AssertionError(f"a writer ended by itself, with status {status}")
        return lines


@attrs.define
class Disk:
    """A file system, and whether its disk keeps what is written to it."""

    directory: Path
    _loop: str = attrs.field(init=False, default="")
    _device: str = attrs.field(init=False, default="")

    @property
    def mountpoint(self) -> Path:
        return self.directory / "mnt"

    def make(self) -> None:
        self.mountpoint.mkdir()
        image = self.directory / "disk"
        with image.open("wb") as file:
            file.truncate(DISK_SIZE)
        do("mkfs.ext4", "-q", image)
        do("modprobe", "dm-flakey")
        self._loop = do("losetup", "--find", "--show", image)
        do("dmsetup", "create", DISK, "--noudevsync", *self._alive())
        minor = do("dmsetup", "info", "--columns", "--noheadings", "-o", "minor", DISK)
        self._device = f"/dev/dm-{minor}"
        mount(self._device, str(self.mountpoint), "ext4", 0, "")

    def remove(self) -> None:
        run("umount", "-l", self.mountpoint)
        run("dmsetup", "remove", "--noudevsync", "--retry", DISK)
        if self._loop:
            run("losetup", "--detach", self._loop)

    def prepare_cut(self) -> None:
        dead = table("flakey", self._loop, "0", "0", "3600", "1", "drop_writes")
        do("dmsetup", "load", DISK, *dead)

    def cut(self) -> None:
        """From now on nothing is kept, and nobody notices."""
        do("dmsetup", "resume", "--noudevsync", "--nolockfs", "--noflush", DISK)

    def restart(self) -> None:
        """The file system as it is after a boot."""
        umount(str(self.mountpoint))
        do("dmsetup", "load", DISK, *self._alive())
        do("dmsetup", "resume", "--noudevsync", DISK)
        mount(self._device, str(self.mountpoint), "ext4", 0, "")

    def _alive(self) -> tuple[str, str]:
        return table("linear", self._loop, "0")


def table(*target: str) -> tuple[str, str]:
    return "--table", " ".join(("0", str(DISK_SIZE // SECTOR), *target))


def do(*words: str | Path) -> str:
    done = run(*words)
    if done.returncode != 0:
        raise AssertionError(f"{words}: {done.stderr}")
    return done.stdout.strip()


class PowerCutTests(SynchronousTestCase):
    def setUp(self) -> None:
        self.directory = Path(tempfile.mkdtemp(prefix="power-cut-"))
        self.addCleanup(shutil.rmtree, self.directory)
        self.disk = Disk(self.directory)
        self.addCleanup(self.disk.remove)
        self.disk.make()
        self.blob = self.disk.mountpoint / "blob"
        self.journal = Journal(self.disk.mountpoint / "var" / "state")
        self.content = b"".join(map(chunk, range(COUNT)))
        self.boot = 0
        self.patch(blobfile, "boot_id", lambda: b"boot %31d" % self.boot)
        self.records = self.chunks = self.left = 0

    def write_until_the_power_fails(self, chosen: Random, *, is_quiet: bool) -> Histories:
        """Where it ``is_quiet``, nothing comes on disk after what was acknowledged last by what is written
        then."""
        histories = Histories.found(self.journal)
        seed, wanted = chosen.randrange(1 << 30), chosen.randint(1, MOST_RECORDS)
        before, after = chosen.random() * LATER, chosen.random() * LATER
        self.disk.prepare_cut()

        def write(tell: Callable[[str], None]) -> None:
            if not is_quiet:
                cachewriter.fill(str(self.blob))
            journalwriter.write(self.journal.state_dir, seed, wanted if is_quiet else None, tell)

        writer = Writer(write)
        try:
            acknowledged = 0
            while acknowledged < wanted:
                writer.wait()
                acknowledged += histories.hear(writer.lines(), has_power=True)
            time.sleep(before)
            acknowledged += histories.hear(writer.lines(), has_power=True)
            self.disk.cut()
            time.sleep(after)
        finally:
            histories.hear(writer.kill(), has_power=False)
        self.records += acknowledged
        return histories

    def check_records(self, histories: Histories) -> None:
        state_dir = self.journal.state_dir
        self.left += len(list(state_dir.glob(f"*/{UNFINISHED}*")))
        self.journal.tidy()
        self.assertEqual({}, histories.lost(self.journal))
        # Nothing is half written any more, or set aside.
        records = {path.parent / RECORD for path in state_dir.glob("*/*")}
        self.assertEqual(records, {*state_dir.glob("*/*")})
        self.assertEqual({path.parent for path in records}, {*state_dir.glob("*")})

    def check_chunks(self) -> None:
        """All that is there must be right."""
        try:
            file, chunks = BlobFile.open(str(self.blob), IDENTITY)
        except FileNotFoundError:
            return
        except DamagedFile:
            self.blob.unlink()
            return
        try:
            for first, end in chunks.runs_present(0, COUNT):
                start, stop = first * CHUNK, end * CHUNK
                if os.pread(file.fd, stop - start, start) != self.content[start:stop]:
                    raise AssertionError(f"one of the chunks {first} to {end - 1} is wrong")
        finally:
            file.close()
        self.chunks += COUNT - chunks.missing
        if chunks.complete:
            self.blob.unlink()

    def test_no_record_is_lost_and_no_chunk_is_there_whose_bytes_are_not(self) -> None:
        seed = int(os.environ.get(SEED) or Random().randrange(1 << 30))
        chosen = Random(seed)
        began = time.monotonic()
        for cut in range(CUTS):
            try:
                histories = self.write_until_the_power_fails(chosen, is_quiet=cut % QUIET == 0)
                self.disk.restart()
                self.boot += 1
                self.check_records(histories)
                self.check_chunks()
            except Exception as error:
                raise AssertionError(f"cut {cut} of {SEED}={seed}: {error}") from error
        print(
            f"\n{SEED}={seed}: {CUTS} cuts in {time.monotonic() - began:.0f} s; {self.records} records "
            f"acknowledged, {self.left} left half written, {self.chunks} chunks compared"
        )
        self.assertGreater(self.records, CUTS)
        self.assertGreater(self.chunks, CUTS * cachewriter.RUN)
