"""What somebody else does to a mount that is read: its readers go on, or they end as they should."""

from __future__ import annotations

import shutil
import signal
import time

from tests.daemon import Daemon, DaemonTestCase, mount_of
from tests.processes import run, until
from tests.reading import Reader
from tests.scenery import BIG, scenery
from tests.servers import tool

READERS = 2
STOPPED = 10.0
REQUEUED = 2.5


class FaultTests(DaemonTestCase):
    attach = "nbd"
    is_warm = True

    def read_all_along(self, repository: str) -> tuple[Daemon, list[Reader]]:
        """A mount, and readers of it."""
        daemon = self.mounted(self.registry.image(repository), "--fill", "off")
        readers = [Reader(daemon.mountpoint / BIG, scenery().tree / BIG, seed) for seed in range(READERS)]
        for reader in readers:
            self.addCleanup(reader.kill)
        time.sleep(0.3)
        return daemon, readers

    def test_a_daemon_that_is_stopped_for_a_while_is_waited_for(self) -> None:
        daemon, readers = self.read_all_along("stopped")
        daemon.signal(signal.SIGSTOP)
        time.sleep(STOPPED)
        daemon.signal(signal.SIGCONT)
        time.sleep(0.3)
        for reader in readers:
            longest = reader.end()["pauses"][0]
            self.assertGreater(longest, STOPPED - 1)
            self.assertLess(longest, STOPPED + 1)
        daemon.signal(signal.SIGTERM)
        self.assert_ends_well(daemon)

    def test_a_device_that_is_disconnected_fails_reads_and_leaves_nothing(self) -> None:
        daemon, readers = self.read_all_along("cut")
        device = daemon.ready().device
        self.assertEqual(0, run(tool("nbd-client"), "-d", device).returncode)
        for reader in readers:
            self.assertGreater(reader.end("EIO")["reads"], 0)
        self.assertEqual(1, daemon.ended(), daemon.log)
        waited = daemon.erofs_nbd("wait")
        self.assertEqual(1, waited.returncode)
        self.assertIn(f"{device} was disconnected by somebody else", waited.stderr)
        self.assert_nothing_left(daemon)

    def test_who_reads_goes_on_after_a_lazy_unmount_by_somebody(self) -> None:
        daemon, readers = self.read_all_along("lazily")
        self.assertEqual(0, run("umount", "-l", daemon.mountpoint).returncode)
        until("unmount", lambda: mount_of(daemon) is None)
        daemon.says("is served for who has files of it open")
        for reader in readers:
            self.assertGreater(reader.end()["reads"], 0)
        self.assert_ends_well(daemon)

    def test_a_daemon_killed_after_a_lazy_unmount_is_taken_over_for_who_reads(self) -> None:
        daemon, readers = self.read_all_along("then-killed")
        device = daemon.ready().device
        self.assertEqual(0, run("umount", "-l", daemon.mountpoint).returncode)
        daemon.says("is served for who has files of it open")
        self.kill(daemon)
        successor = self.again(daemon)
        self.assertEqual(device, successor.ready().device)
        time.sleep(REQUEUED)
        for reader in readers:
            self.assertGreater(reader.end()["reads"], 0)
        successor.signal(signal.SIGTERM)
        self.assert_ends_well(successor)

    def test_without_its_state_directory_a_mount_is_read_and_ended_as_ever(self) -> None:
        daemon, readers = self.read_all_along("stateless")
        shutil.rmtree(daemon.state_dir)
        unknown = daemon.erofs_nbd("umount")
        self.assertEqual(1, unknown.returncode)
        self.assertIn("no mount of erofs-nbd is on record", unknown.stderr)
        for reader in readers:
            self.assertGreater(reader.end()["reads"], 0)
        daemon.signal(signal.SIGTERM)
        self.assert_ends_well(daemon)

    def test_killed_without_its_state_directory_it_is_cleared_away_by_hand(self) -> None:
        daemon, readers = self.read_all_along("stateless-killed")
        device = daemon.ready().device
        shutil.rmtree(daemon.state_dir)
        self.kill(daemon)
        second = self.again(daemon, foreground=True)
        self.assertEqual(1, second.ended())
        self.assertIn(f"is a mount point already, of {device} (type erofs): unmount that first", second.log)
        self.assertEqual(0, run("umount", "-l", daemon.mountpoint).returncode)
        self.assertEqual(0, run(tool("nbd-client"), "-d", device).returncode)
        for reader in readers:
            reader.end("EIO")
        waited = daemon.erofs_nbd("wait")
        self.assertEqual(1, waited.returncode)
        self.assert_nothing_left(daemon, second)
