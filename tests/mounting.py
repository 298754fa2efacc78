"""What holds of a mount, whatever the back end that makes it a device.

Import this module, not `MountTests` itself, to derive from it: a test runner takes every test case that it
finds in a module's namespace.
"""

from __future__ import annotations

import itertools
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from tests.daemon import Daemon, DaemonTestCase, mount_of
from tests.processes import descendants, run, until
from tests.scenery import BIG, BIG_SIZE, contents, scenery, sha256

MEMORY = 80 * 1024 * 1024
"""Bytes that a daemon may take, with those that it has started."""

HOLD = "import sys; held = open(sys.argv[1], 'rb'); print(flush=True); sys.stdin.read()"
"""A program that keeps a file open until its standard input ends."""


def drop_caches() -> None:
    """The kernel shall read devices again."""
    Path("/proc/sys/vm/drop_caches").write_text("3")


class MountTests(DaemonTestCase):
    """To be derived from with an ``attach``."""

    def hold(self, path: Path) -> subprocess.Popen[str]:
        """A process that has ``path`` open; closing its standard input ends it."""
        holder = subprocess.Popen(
            [sys.executable, "-S", "-c", HOLD, str(path)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.addCleanup(self.let_go, holder)
        assert holder.stdout is not None
        holder.stdout.readline()
        return holder

    def let_go(self, holder: subprocess.Popen[str]) -> None:
        holder.communicate()

    def assert_whole(self, root: Path) -> None:
        """Everything is there, as it is in the tree that the image was made of."""
        self.assert_same(contents(scenery().tree), contents(root))

    def test_every_file_is_as_in_the_tree_that_the_image_was_made_of(self) -> None:
        daemon = self.start(self.registry.image("all"), is_warm=False)
        waited = daemon.erofs_nbd("wait", "--timeout", "60")
        self.assertEqual((0, "", ""), (waited.returncode, waited.stdout, waited.stderr))
        self.assert_whole(daemon.mountpoint)
        self.assertEqual(daemon.pid, int(daemon.pidfile.read_text()))
        unmounted = daemon.erofs_nbd("umount")
        self.assertEqual((0, "", ""), (unmounted.returncode, unmounted.stdout, unmounted.stderr))
        self.assertIsNotNone(daemon.status())
        self.assert_ends_well(daemon)

    def test_a_mount_is_read_only_and_neither_devices_nor_setuid_count_on_it(self) -> None:
        daemon = self.mounted(self.registry.image("flags", "plain"))
        with self.assertRaises(OSError):
            (daemon.mountpoint / "new").write_text("x")
        options = run("findmnt", "-n", "-o", "OPTIONS", daemon.mountpoint).stdout.strip().split(",")
        self.assertLessEqual({"ro", "nosuid", "nodev"}, set(options))
        done = run(daemon.mountpoint / "executable")
        self.assertEqual("it runs\n", done.stdout)
        daemon.signal(signal.SIGTERM)
        self.assert_ends_well(daemon)

    def test_little_of_an_image_is_fetched_before_it_is_read_and_nothing_twice(self) -> None:
        daemon = self.mounted(self.registry.image("lazy", "plain"))

        def fetched() -> list[tuple[int, int]]:
            ranges = [r["range"] for r in self.registry.requests("lazy") if r["kind"] == "blobs"]
            return [tuple(map(int, r.removeprefix("bytes=").split("-"))) for r in ranges]  # type: ignore[misc]

        def amount() -> int:
            return sum(last - first + 1 for first, last in fetched())

        self.assertLess(amount(), scenery().layer_file("plain").stat().st_size // 3)
        self.assert_whole(daemon.mountpoint)
        drop_caches()
        self.assert_whole(daemon.mountpoint)
        ordered = sorted(fetched())
        overlaps = [(a, b) for a, b in itertools.pairwise(ordered) if b[0] <= a[1]]
        self.assertEqual([], overlaps)
        self.assertLessEqual(amount(), scenery().layer_file("plain").stat().st_size)
        daemon.signal(signal.SIGTERM)
        self.assert_ends_well(daemon)

    def test_a_plain_umount_ends_the_device_and_the_daemon(self) -> None:
        daemon = self.mounted(self.registry.image("umount"))
        self.assertEqual(0, run("umount", daemon.mountpoint).returncode)
        self.assert_ends_well(daemon)

    def test_an_interrupt_in_the_foreground_unmounts(self) -> None:
        daemon = self.mounted(self.registry.image("interrupt"), foreground=True)
        daemon.signal(signal.SIGINT)
        self.assert_ends_well(daemon)

    def test_a_mount_in_use_is_not_unmounted_and_the_error_names_its_user(self) -> None:
        daemon = self.mounted(self.registry.image("busy", "plain"))
        holder = self.hold(daemon.mountpoint / BIG)
        refused = daemon.erofs_nbd("umount")
        self.assertEqual(1, refused.returncode)
        self.assertIn(f"(process {holder.pid})", refused.stderr)
        self.assertNotIn("Traceback", refused.stderr)
        self.assertEqual(sha256(scenery().tree / BIG), sha256(daemon.mountpoint / BIG))
        self.let_go(holder)
        self.assertEqual(0, daemon.erofs_nbd("umount").returncode)
        self.assert_ends_well(daemon)

    def test_told_to_stop_with_the_mount_in_use_it_serves_until_its_user_lets_go(self) -> None:
        daemon = self.mounted(self.registry.image("stop", "plain"))
        holder = self.hold(daemon.mountpoint / BIG)
        daemon.signal(signal.SIGTERM)
        daemon.says(f"(process {holder.pid})")
        self.assertEqual(sha256(scenery().tree / BIG), sha256(daemon.mountpoint / BIG))
        self.assertIsNone(daemon.status())
        self.let_go(holder)
        self.assert_ends_well(daemon)

    def test_told_to_stop_twice_it_unmounts_what_is_in_use_and_serves_those_who_have_it_open(self) -> None:
        daemon = self.mounted(self.registry.image("twice", "plain"))
        with (daemon.mountpoint / BIG).open("rb") as held:
            daemon.signal(signal.SIGTERM)
            daemon.says(f"(process {os.getpid()})")
            daemon.signal(signal.SIGTERM)
            self.assert_serves_what_is_open(daemon, held.fileno())
        self.assert_ends_well(daemon)

    def test_with_on_stop_lazy_one_request_to_stop_is_enough(self) -> None:
        daemon = self.mounted(self.registry.image("lazily", "plain"), "--on-stop", "lazy")
        with (daemon.mountpoint / BIG).open("rb") as held:
            daemon.signal(signal.SIGTERM)
            self.assert_serves_what_is_open(daemon, held.fileno())
        self.assert_ends_well(daemon)

    def test_after_a_lazy_umount_by_the_user_what_is_open_is_served(self) -> None:
        daemon = self.mounted(self.registry.image("detached", "plain"))
        with (daemon.mountpoint / BIG).open("rb") as held:
            self.assertEqual(0, run("umount", "-l", daemon.mountpoint).returncode)
            self.assert_serves_what_is_open(daemon, held.fileno())
        self.assert_ends_well(daemon)

    def assert_serves_what_is_open(self, daemon: Daemon, descriptor: int) -> None:
        until("unmount", lambda: mount_of(daemon) is None)
        expected = (scenery().tree / BIG).read_bytes()
        self.assertEqual(expected, os.pread(descriptor, BIG_SIZE, 0))
        daemon.says("is served for who has files of it open")
        self.assertIsNone(daemon.status())

    def test_two_daemons_mount_one_image_from_one_cache_at_once(self) -> None:
        image = self.registry.image("shared", "plain")
        shared = self.directory / "shared"
        both = [self.daemon(image, name=name) for name in ("one", "two")]
        for daemon in both:
            daemon.cache_dir = shared
            daemon.start()
        for daemon in both:
            daemon.ready()
        readers = [
            subprocess.Popen(["grep", "-r", "x", d.mountpoint], stdout=subprocess.DEVNULL) for d in both
        ]
        self.assertEqual([0, 0], [reader.wait() for reader in readers])
        for daemon in both:
            self.assert_whole(daemon.mountpoint)
        both[0].signal(signal.SIGTERM)
        self.assertEqual(0, both[0].ended())
        drop_caches()
        self.assert_whole(both[1].mountpoint)
        both[1].signal(signal.SIGTERM)
        self.assertEqual(0, both[1].ended())
        self.assert_nothing_left(*both)

    def test_a_mount_point_that_is_made_is_removed_at_the_end(self) -> None:
        daemon = self.daemon(self.registry.image("mkdir"), "--mkdir")
        daemon.mountpoint.rmdir()
        daemon.start()
        daemon.ready()
        self.assertTrue((daemon.mountpoint / "executable").exists())
        daemon.signal(signal.SIGTERM)
        self.assert_ends_well(daemon)
        self.assertFalse(daemon.mountpoint.exists())

    def test_reads_fail_while_the_registry_is_away_and_work_again_when_it_is_back(self) -> None:
        daemon = self.mounted(self.registry.image("away", "plain"), "--io-timeout", "2")
        with (daemon.mountpoint / BIG).open("rb", buffering=0) as file:
            expected = (scenery().tree / BIG).read_bytes()
            self.assertEqual(expected[:4096], file.read(4096))
            self.registry.go_down()
            came_back = False
            try:
                began = time.monotonic()
                got, error = read_until_it_fails(file.fileno(), BIG_SIZE)
                self.assertIsNotNone(error, "all of the file was fetched before the registry went away")
                self.assertLess(time.monotonic() - began, 30)
                self.assertEqual(expected[: len(got)], got)
                self.assertIsNone(daemon.status())
                daemon.says("refused")
                self.registry.come_back()
                came_back = True
                self.assertEqual(expected, os.pread(file.fileno(), BIG_SIZE, 0))
            finally:
                if not came_back:
                    self.registry.come_back()
        self.assert_whole(daemon.mountpoint)
        daemon.signal(signal.SIGTERM)
        self.assert_ends_well(daemon)

    def test_short_faults_of_the_registry_are_not_seen_by_readers(self) -> None:
        self.registry.set("faulty")
        daemon = self.mounted(self.registry.image("faulty", "plain"))
        self.registry.set(
            "faulty",
            {"kind": "blobs", "status": 503, "times": 2},
            {"kind": "blobs", "cut_after": 10_000, "times": 3},
            {"kind": "blobs", "status": 500, "times": 1},
        )
        self.assert_whole(daemon.mountpoint)
        daemon.signal(signal.SIGTERM)
        self.assert_ends_well(daemon)

    def test_two_images_are_mounted_at_once(self) -> None:
        daemons = [self.start(self.registry.image("both", tag), name=tag) for tag in ("plain", "lz4")]
        for daemon in daemons:
            daemon.ready()
        self.assertEqual(2, len({daemon.ready().device for daemon in daemons}))
        for daemon in daemons:
            self.assert_whole(daemon.mountpoint)
        for daemon in daemons:
            daemon.signal(signal.SIGTERM)
        self.assertEqual([0, 0], [daemon.ended() for daemon in daemons])
        self.assert_nothing_left(*daemons)

    def test_memory_stays_small_however_much_is_read(self) -> None:
        daemon = self.mounted(self.registry.image("memory", "plain"), is_warm=False)
        for _ in range(3):
            self.assert_whole(daemon.mountpoint)
            drop_caches()
        self.assertLess(daemon.memory("VmHWM"), MEMORY)
        daemon.signal(signal.SIGTERM)
        self.assert_ends_well(daemon)

    def test_a_password_is_shown_to_nobody(self) -> None:
        password = "correct-horse-battery"
        self.registry.set("private", user=f"alice:{password}")
        login = ("--oci", f"username=alice,password={password}")
        daemon = self.mounted(self.registry.image("private", "plain"), *login, is_warm=False)
        self.assert_whole(daemon.mountpoint)
        shown = {path: Path(path).read_bytes() for path in self.shown_by(daemon)}
        self.assertIn(f"/proc/{daemon.pid}/cmdline", shown)
        self.assertEqual([], [path for path, content in shown.items() if password.encode() in content])
        daemon.signal(signal.SIGTERM)
        self.assert_ends_well(daemon)
        self.assertNotIn(password, daemon.log)

    def shown_by(self, daemon: Daemon) -> list[str]:
        """Whatever a daemon shows to others: of its process, of its children, and its files."""
        processes = [
            f"/proc/{pid}/{name}" for pid in descendants(daemon.pid) for name in ("cmdline", "environ")
        ]
        kept = [daemon.state_dir, daemon.directory / "tmp", daemon.directory]
        files = [str(path) for root in kept for path in root.glob("*") if path.is_file()]
        records = [str(path) for path in daemon.state_dir.glob("*/*.json")]
        return [*processes, *files, *records]

    def test_what_a_killed_daemon_left_is_cleared_away_by_umount(self) -> None:
        daemon = self.mounted(self.registry.image("killed", "plain"))
        self.kill(daemon)
        waited = daemon.erofs_nbd("wait")
        self.assertEqual(1, waited.returncode)
        self.assertIn("was killed", waited.stderr)
        unmounted = daemon.erofs_nbd("umount")
        self.assertEqual((0, ""), (unmounted.returncode, unmounted.stderr))
        self.assert_nothing_left(daemon)

    def test_a_superblock_that_lies_about_its_root_leaves_nothing(self) -> None:
        daemon = self.start(self.registry.image("rootless", "rootless"))
        self.assertEqual(1, daemon.ended())
        self.assertIn("the kernel cannot mount", daemon.log)
        self.assert_tells_why_and_leaves_nothing(daemon, "the kernel cannot mount")

    def test_a_registry_that_fails_during_the_mount_leaves_nothing(self) -> None:
        self.registry.set("late", {"kind": "blobs", "times": 1}, {"kind": "blobs", "status": 500})
        daemon = self.start(self.registry.image("late", "far"), "--io-timeout", "1")
        self.assertEqual(1, daemon.ended())
        self.assert_tells_why_and_leaves_nothing(daemon, "could not be read")
        self.assertIn("500", daemon.log)

    def test_told_to_stop_during_the_mount_it_ends_at_once_and_leaves_nothing(self) -> None:
        self.registry.set("slow", {"kind": "blobs", "times": 1}, {"kind": "blobs", "stall": True})
        daemon = self.start(self.registry.image("slow", "far"))
        until("second read", lambda: len(self.registry.requests("slow")) > 2)
        began = time.monotonic()
        daemon.signal(signal.SIGTERM)
        self.assert_ends_well(daemon)
        self.assertLess(time.monotonic() - began, 20)

    def assert_tells_why_and_leaves_nothing(self, daemon: Daemon, *reasons: str) -> None:
        """``erofs-nbd wait`` ends with the daemon's own words, and nothing is left of it."""
        waited = daemon.erofs_nbd("wait")
        self.assertEqual(1, waited.returncode)
        for reason in reasons:
            self.assertIn(reason, waited.stderr)
        for text in (waited.stderr, daemon.log):
            self.assertNotIn("Traceback", text)
        self.assert_nothing_left(daemon)


def read_until_it_fails(descriptor: int, size: int) -> tuple[bytes, OSError | None]:
    """Read a file from its start; what was got before an error, and that."""
    got = b""
    while len(got) < size:
        try:
            piece = os.pread(descriptor, 65536, len(got))
        except OSError as error:
            return got, error
        got += piece
    return got, None
