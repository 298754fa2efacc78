"""Daemons that are killed while their mounts are read: no reader notices more than a pause."""

from __future__ import annotations

import random
import signal
import time
from typing import Any

from tests.daemon import Daemon, DaemonTestCase, mounts
from tests.killing import PART
from tests.processes import BIN, run
from tests.reading import Reader
from tests.scenery import BIG, contents, scenery, sha256
from tests.servers import tool

READERS = 4
KILLS = 3
REQUEUED = 2.5
"""Seconds that a request in flight takes at most, once the new daemon is there: until the kernel's timer."""


class TakeOverTests(DaemonTestCase):
    attach = "nbd"
    is_warm = True

    def taken_over(self, daemon: Daemon, **more: Any) -> Daemon:
        """By the same command, and ready."""
        successor = self.again(daemon, **more)
        successor.ready()
        return successor

    def assert_whole_and_ends_well(self, daemon: Daemon) -> None:
        self.assertEqual(sha256(scenery().tree / BIG), sha256(daemon.mountpoint / BIG))
        self.assert_same(contents(scenery().tree / PART), contents(daemon.mountpoint / PART))
        daemon.signal(signal.SIGTERM)
        self.assert_ends_well(daemon)

    def test_readers_notice_a_pause_and_no_more(self) -> None:
        daemon = self.mounted(self.registry.image("taken"), "--fill", "off", is_warm=False)
        device = daemon.ready().device
        original = scenery().tree / BIG
        readers = [Reader(daemon.mountpoint / BIG, original, seed) for seed in range(READERS)]
        for reader in readers:
            self.addCleanup(reader.kill)
        seed = random.randrange(1000)
        moments = random.Random(seed)
        longest_start = 0.0
        # The first of them as a user starts it, with all its imports.
        for is_warm in (False, *[True] * (KILLS - 1)):
            time.sleep(REQUEUED + moments.random())
            self.kill(daemon)
            began = time.monotonic()
            daemon = self.taken_over(daemon, is_warm=is_warm)
            longest_start = max(longest_start, time.monotonic() - began)
            self.assertEqual(device, daemon.ready().device)
            daemon.says("took over")
        time.sleep(REQUEUED)
        longest = max(reader.end()["pauses"][0] for reader in readers)
        print(f"\nstart {longest_start:.2f} s, longest pause of a reader {longest:.2f} s, seed {seed}")
        self.assertLess(longest, longest_start + REQUEUED)
        self.assert_whole_and_ends_well(daemon)

    def test_reattach_starts_daemons_for_all_that_have_none(self) -> None:
        first, second = [self.mounted(self.registry.image("lost", tag), name=tag) for tag in ("lz4", "plain")]
        self.kill(first)
        told = run(BIN / "erofs-nbd", "reattach", "--all", "--dry-run", "--state-dir", first.state_dir)
        self.assertEqual((0, ""), (told.returncode, told.stderr))
        device = next(mount.source for mount in mounts() if mount.path == str(first.mountpoint))
        plan = [f"serve {device} again", f"leave {first.mountpoint} mounted"]
        self.assertEqual([f"{first.mountpoint}: {step}" for step in plan], told.stdout.splitlines())
        done = run(BIN / "erofs-nbd", "reattach", "--all", "--state-dir", first.state_dir)
        self.assertEqual((0, ""), (done.returncode, done.stderr))
        record = first.record()
        assert record is not None
        adopted = Daemon(first.directory, first.image, first.options)
        adopted.pid = record.pid
        self._daemons.append(adopted)
        self.assertEqual(sha256(scenery().tree / BIG), sha256(first.mountpoint / BIG))
        for daemon in (adopted, second):
            daemon.signal(signal.SIGTERM)
            self.assertEqual(0, daemon.ended(), daemon.log)
        self.assert_nothing_left(first, adopted, second)

    def test_the_registry_is_not_needed_for_what_is_in_the_cache(self) -> None:
        daemon = self.mounted(self.registry.image("offline"), "--fill", "full")
        self.kill(daemon)
        self.registry.go_down()
        self.addCleanup(self.registry.come_back)
        self.assert_whole_and_ends_well(self.taken_over(daemon))

    def test_a_device_whose_mount_was_taken_away_is_mounted_again(self) -> None:
        daemon = self.mounted(self.registry.image("unmounted"))
        device = daemon.ready().device
        self.kill(daemon)
        self.assertEqual(0, run("umount", daemon.mountpoint).returncode)
        successor = self.taken_over(daemon)
        self.assertEqual(device, successor.ready().device)
        self.assert_whole_and_ends_well(successor)

    def test_a_mount_whose_device_was_disconnected_is_made_anew(self) -> None:
        daemon = self.mounted(self.registry.image("bereft"))
        device = daemon.ready().device
        self.kill(daemon)
        self.assertEqual(0, run(tool("nbd-client"), "-d", device).returncode)
        successor = self.taken_over(daemon)
        self.assertEqual(1, len([each for each in mounts() if each.path == str(daemon.mountpoint)]))
        self.assert_whole_and_ends_well(successor)

    def test_another_image_is_refused_and_the_mount_waits_on(self) -> None:
        daemon = self.mounted(self.registry.image("first"))
        self.kill(daemon)
        other = self.again(daemon, image=self.registry.image("second", "plain"), foreground=True)
        self.assertEqual(1, other.ended())
        self.assertIn("waits for a daemon", other.log)
        self.assert_whole_and_ends_well(self.taken_over(daemon))
