"""There is no memory for a while, where a mount is read: its readers go on, and the cache is used again."""

from __future__ import annotations

import os
import shutil
import signal
import tempfile
import time
from pathlib import Path

from tests.daemon import DaemonTestCase, nbd_devices_in_use
from tests.faultydaemon import FaultyDaemon
from tests.processes import run, until
from tests.reading import Reader
from tests.scarcity import CACHE_CALLS, PAGE_CALLS, SERVING_CALL
from tests.scenery import BIG, scenery, sha256

READERS = 2
FLUSHED = 6.0
"""Seconds, after which the cache has tried to bring on disk what it has."""
DISK_SIZE = 64 << 20
AGAIN = 10.0
"""Seconds in which the cache is used again, at most."""
SHORT = 1.5
"""Seconds for which a read of cached bytes is tried again."""


class MemoryTests(DaemonTestCase):
    is_warm = True

    def read_all_along(self, repository: str) -> tuple[FaultyDaemon, list[Reader]]:
        """A mount of an image that is not compressed, and readers of it."""
        daemon = FaultyDaemon(
            self.directory / "d",
            self.registry.image(repository, "plain"),
            ("--attach", "nbd", "--fill", "off"),
        )
        daemon.cache_dir = self.disk()
        self._daemons.append(daemon)
        daemon.start()
        daemon.ready()
        readers = [Reader(daemon.mountpoint / BIG, scenery().tree / BIG, seed) for seed in range(READERS)]
        for reader in readers:
            self.addCleanup(reader.kill)
        return daemon, readers

    def disk(self) -> Path:
        """A directory on a disk, from which pages can be dropped, as they cannot from a tmpfs."""
        home = Path(tempfile.mkdtemp(prefix="memory-"))
        self.addCleanup(shutil.rmtree, home)
        image, mountpoint = home / "disk", home / "mnt"
        mountpoint.mkdir()
        with image.open("wb") as file:
            file.truncate(DISK_SIZE)
        run("mkfs.ext4", "-q", image, check=True)
        run("mount", "-o", "loop", image, mountpoint, check=True)
        self.addCleanup(run, "umount", "-l", mountpoint)
        return mountpoint

    def requests(self, repository: str) -> int:
        return self.registry.counts(repository).requests

    def assert_cached_again(self, daemon: FaultyDaemon, repository: str) -> None:
        """What is read again costs no request, soon after."""
        big = daemon.mountpoint / BIG

        def is_cached() -> bool:
            before = self.requests(repository)
            os.posix_fadvise((fd := os.open(big, os.O_RDONLY)), 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(fd)
            self.assertEqual(sha256(scenery().tree / BIG), sha256(big))
            return self.requests(repository) == before

        until("all is in the cache", is_cached, AGAIN)
        reader = Reader(big, scenery().tree / BIG, READERS)
        before = self.requests(repository)
        time.sleep(1)
        self.assertGreater(reader.end()["reads"], 0)
        self.assertEqual(before, self.requests(repository))

    def drop_pages(self, daemon: FaultyDaemon) -> None:
        """What is in the cache must be read from its disk."""
        (blob,) = (daemon.cache_dir / "sha256").iterdir()
        fd = os.open(blob, os.O_RDWR)
        os.fsync(fd)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(fd)

    def test_reads_go_on_without_the_cache_and_it_is_used_again(self) -> None:
        daemon, readers = self.read_all_along("scarce")
        for error in ("ENOMEM", "MemoryError"):
            with daemon.without_memory(*CACHE_CALLS, error=error):
                time.sleep(FLUSHED)
                daemon.says("cannot flush the cache file")
                before = self.requests("scarce")
                until("what is read is fetched", lambda before=before: self.requests("scarce") > before + 5)
            self.assert_cached_again(daemon, "scarce")
        with daemon.without_memory(*PAGE_CALLS):
            self.drop_pages(daemon)
            time.sleep(SHORT)
        longest = max(reader.end()["pauses"][0] for reader in readers)
        print(f"\nlongest read {longest:.2f} s")
        self.assertGreater(longest, SHORT / 2, "it was tried again")
        daemon.says("can be written again")
        daemon.signal(signal.SIGTERM)
        self.assert_ends_well(daemon)

    def test_one_request_that_finds_none_fails_and_the_others_go_on(self) -> None:
        daemon, readers = self.read_all_along("starved")
        devices = nbd_devices_in_use()
        with daemon.without_memory(SERVING_CALL, error="MemoryError", times=1):
            until("a reader has ended", lambda: any(not reader.runs for reader in readers))
            (starved,) = [reader for reader in readers if not reader.runs]
            (other,) = [reader for reader in readers if reader.runs]
            time.sleep(0.5)
            starved.end("EIO")
            self.assertGreater(other.end()["reads"], 0)
        self.assertIn("out of memory", daemon.says("failed: out of memory"))
        self.assertEqual(devices, nbd_devices_in_use())
        self.assert_cached_again(daemon, "starved")
        daemon.signal(signal.SIGTERM)
        self.assert_ends_well(daemon)
