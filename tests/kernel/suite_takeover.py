"""Daemons that are killed while their mounts are read: no reader notices more than a pause."""

from __future__ import annotations

import signal
import time

from tests.daemon import BIN, Daemon, DaemonTestCase, mounts, run
from tests.reading import Reader
from tests.scenery import BIG, contents, scenery
from tests.servers import tool

READERS = 4
KILLS = 3


class TakeOverTests(DaemonTestCase):
    attach = "nbd"

    def kill(self, daemon: Daemon) -> None:
        daemon.signal(signal.SIGKILL)
        self.assertEqual(-signal.SIGKILL, daemon.ended())
        daemon.pidfile.unlink()

    def again(self, daemon: Daemon) -> Daemon:
        """The same command."""
        successor = Daemon(daemon.directory, daemon.image, daemon.options)
        self._daemons.append(successor)
        successor.start()
        successor.ready()
        return successor

    def test_readers_notice_a_pause_and_no_more(self) -> None:
        daemon = self.mounted(self.registry.image("taken"), "--fill", "off")
        device = daemon.ready().device
        original = scenery().tree / BIG
        readers = [Reader(daemon.mountpoint / BIG, original, seed) for seed in range(READERS)]
        for reader in readers:
            self.addCleanup(reader.kill)
        longest_start = 0.0
        for _ in range(KILLS):
            # A request that was in flight is sent again up to two seconds after the new daemon is there.
            time.sleep(3.0)
            self.kill(daemon)
            began = time.monotonic()
            daemon = self.again(daemon)
            longest_start = max(longest_start, time.monotonic() - began)
            self.assertEqual(device, daemon.ready().device)
            self.assertIn("took over", daemon.log)
        time.sleep(3.0)
        ends = [reader.end() for reader in readers]
        longest = max(end["pauses"][0] for end in ends)
        print(f"\nstart {longest_start:.2f} s, longest pause of a reader {longest:.2f} s")
        self.assertLess(longest, longest_start + 2.5)
        self.assert_same(contents(scenery().tree), contents(daemon.mountpoint))
        daemon.signal(signal.SIGTERM)
        self.assert_ends_well(daemon)

    def test_reattach_starts_daemons_for_all_that_have_none(self) -> None:
        daemons = [self.mounted(self.registry.image("lost", tag), name=tag) for tag in ("lz4", "plain")]
        shared = daemons[0].state_dir
        for daemon in daemons:
            self.kill(daemon)
        first, _ = daemons
        told = run(BIN / "erofs-nbd", "reattach", "--all", "--dry-run", "--state-dir", shared)
        self.assertEqual((0, ""), (told.returncode, told.stderr))
        self.assertIn(f"{first.mountpoint}: leave {first.mountpoint} mounted", told.stdout)
        for daemon in daemons:
            done = run(BIN / "erofs-nbd", "reattach", daemon.mountpoint, "--state-dir", daemon.state_dir)
            self.assertEqual((0, ""), (done.returncode, done.stderr))
            record = daemon.record()
            assert record is not None
            daemon.pid, daemon._status = record.pid, None
            self.assert_same(contents(scenery().tree), contents(daemon.mountpoint))
            again = run(BIN / "erofs-nbd", "reattach", daemon.mountpoint, "--state-dir", daemon.state_dir)
            self.assertEqual(1, again.returncode)
            self.assertIn(f"is served, by process {record.pid}", again.stderr)
            daemon.signal(signal.SIGTERM)
            self.assert_ends_well(daemon)

    def test_the_registry_is_not_needed_for_what_is_in_the_cache(self) -> None:
        daemon = self.mounted(self.registry.image("offline"), "--fill", "full")
        self.kill(daemon)
        self.registry.go_down()
        self.addCleanup(self.registry.come_back)
        daemon = self.again(daemon)
        self.assert_same(contents(scenery().tree), contents(daemon.mountpoint))
        daemon.signal(signal.SIGTERM)
        self.assert_ends_well(daemon)

    def test_a_device_whose_mount_was_taken_away_is_mounted_again(self) -> None:
        daemon = self.mounted(self.registry.image("unmounted"))
        device = daemon.ready().device
        self.kill(daemon)
        self.assertEqual(0, run("umount", daemon.mountpoint).returncode)
        daemon = self.again(daemon)
        self.assertEqual(device, daemon.ready().device)
        self.assert_same(contents(scenery().tree), contents(daemon.mountpoint))
        daemon.signal(signal.SIGTERM)
        self.assert_ends_well(daemon)

    def test_a_mount_whose_device_was_disconnected_is_made_anew(self) -> None:
        daemon = self.mounted(self.registry.image("bereft"))
        device = daemon.ready().device
        self.kill(daemon)
        self.assertEqual(0, run(tool("nbd-client"), "-d", device).returncode)
        daemon = self.again(daemon)
        self.assertEqual(1, len([each for each in mounts() if each.path == str(daemon.mountpoint)]))
        self.assert_same(contents(scenery().tree), contents(daemon.mountpoint))
        daemon.signal(signal.SIGTERM)
        self.assert_ends_well(daemon)

    def test_another_image_is_refused_and_the_mount_waits_on(self) -> None:
        daemon = self.mounted(self.registry.image("first"))
        self.kill(daemon)
        other = Daemon(daemon.directory, self.registry.image("second", "plain"), daemon.options)
        self._daemons.append(other)
        other.start()
        self.assertEqual(1, other.ended())
        self.assertIn("waits for a daemon", other.log)
        daemon = self.again(daemon)
        self.assert_same(contents(scenery().tree), contents(daemon.mountpoint))
        daemon.signal(signal.SIGTERM)
        self.assert_ends_well(daemon)
