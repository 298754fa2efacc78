"""A daemon that cannot start says why, to its log and to ``erofs-nbd wait``, and leaves nothing."""

from __future__ import annotations

import os
import signal
import time

from tests.daemon import Daemon, DaemonTestCase, mount_of
from tests.processes import BIN, run, until
from tests.scenery import GZIPPED_TAR, scenery


class StartUpFailureTests(DaemonTestCase):
    attach = "fuse"

    def assert_fails(self, daemon: Daemon, *reasons: str) -> None:
        """With status 1 and each of ``reasons``, which ``erofs-nbd wait`` tells, and leaving nothing."""
        daemon.foreground = True
        daemon.start()
        waited = daemon.erofs_nbd("wait")
        self.assertEqual(1, daemon.ended(), daemon.log)
        self.assertEqual((1, ""), (waited.returncode, waited.stdout))
        for reason in reasons:
            self.assertIn(reason, waited.stderr)
            self.assertIn(reason, daemon.log)
        for text in (waited.stderr, daemon.log):
            self.assertNotIn("Traceback", text)
            self.assertNotIn("Unhandled", text)
        self.assert_nothing_left(daemon)

    def test_a_registry_that_is_not_there(self) -> None:
        self.assert_fails(
            self.daemon("127.0.0.1:1/some/image", "--io-timeout", "1"), "127.0.0.1:1", "refused"
        )

    def test_a_host_that_nobody_knows(self) -> None:
        daemon = self.daemon("registry.invalid/some/image", "--io-timeout", "5")
        self.assert_fails(daemon, "registry.invalid")

    def test_an_image_that_the_registry_does_not_have(self) -> None:
        self.assert_fails(self.daemon(self.registry.image("some/image", "absent")), "some/image", "absent")

    def test_a_manifest_that_is_not_the_one_pinned(self) -> None:
        self.registry.set("pinned", {"kind": "manifests", "tamper": True})
        digest = scenery().manifests["lz4"]["digest"]
        self.assert_fails(self.daemon(f"{self.registry.image('pinned')}@{digest}"), digest)

    def test_a_registry_that_fails(self) -> None:
        self.registry.set("failing", {"status": 500})
        self.assert_fails(self.daemon(self.registry.image("failing"), "--io-timeout", "1"), "500")

    def test_a_blob_that_is_missing(self) -> None:
        self.registry.set("hollow", {"kind": "blobs", "status": 404})
        self.assert_fails(self.daemon(self.registry.image("hollow")), "404")

    def test_a_registry_that_wants_a_password(self) -> None:
        self.registry.set("private", user="alice:secret")
        self.assert_fails(self.daemon(self.registry.image("private")), "--username")

    def test_a_wrong_password_which_is_not_repeated(self) -> None:
        self.registry.set("private", user="alice:secret")
        file = self.directory / "password"
        file.write_text("a wrong guess\n")
        options = ("--username", "alice", "--password-file", str(file))
        daemon = self.daemon(self.registry.image("private"), *options)
        self.assert_fails(daemon, "wrong user name or password")
        self.assertNotIn("a wrong guess", daemon.log)

    def test_a_state_directory_that_is_full(self) -> None:
        daemon = self.daemon(self.registry.image("recorded"), foreground=True)
        daemon.state_dir.mkdir()
        run("mount", "-t", "tmpfs", "-o", "size=16k", "tmpfs", daemon.state_dir, check=True)
        self.addCleanup(run, "umount", daemon.state_dir, check=True)
        with self.assertRaises(OSError):
            (daemon.state_dir / "ballast").write_bytes(bytes(1 << 16))
        daemon.start()
        self.assertEqual(1, daemon.ended(), daemon.log)
        self.assertIn(f"--state-dir {daemon.state_dir}: No space left on device", daemon.log)
        self.assertNotIn("Traceback", daemon.log)
        self.assertEqual(["ballast"], [path.name for path in daemon.state_dir.iterdir()])

    def test_a_layer_that_is_not_erofs(self) -> None:
        self.assert_fails(self.daemon(self.registry.image("app", "tar")), GZIPPED_TAR)

    def test_an_erofs_layer_that_is_compressed_as_a_whole(self) -> None:
        self.assert_fails(self.daemon(self.registry.image("app", "zstd")), "application/vnd.erofs+zstd")

    def test_several_layers_and_no_choice(self) -> None:
        two = scenery().layers["two"]
        daemon = self.daemon(self.registry.image("app", "two"))
        self.assert_fails(daemon, "--layer N", GZIPPED_TAR, two["mediaType"], two["digest"])

    def test_a_layer_that_is_not_there(self) -> None:
        self.assert_fails(self.daemon(self.registry.image("app"), "--layer", "7"), "--layer 7")

    def test_a_layer_without_a_superblock(self) -> None:
        self.assert_fails(self.daemon(self.registry.image("app", "torn")), "not an EROFS image")

    def test_a_platform_that_the_image_is_not_there_for(self) -> None:
        daemon = self.daemon(self.registry.image("app", "index"), "--platform", "linux/s390x")
        self.assert_fails(daemon, "linux/s390x", "linux/amd64", "linux/arm64")

    def test_a_mount_point_that_is_missing(self) -> None:
        daemon = self.daemon(self.registry.image("app"))
        daemon.mountpoint.rmdir()
        self.assert_fails(daemon, str(daemon.mountpoint), "--mkdir")

    def test_a_mount_point_that_is_a_file(self) -> None:
        daemon = self.daemon(self.registry.image("app"))
        daemon.mountpoint.rmdir()
        daemon.mountpoint.write_text("")
        self.assert_fails(daemon, "not a directory")

    def test_a_mount_option_that_the_kernel_does_not_know(self) -> None:
        self.assert_fails(self.daemon(self.registry.image("app"), "--options", "bogus=1"), "cannot mount")

    def test_a_state_directory_that_cannot_be_made(self) -> None:
        daemon = self.daemon(self.registry.image("app"), foreground=True)
        daemon.state_dir.write_text("in the way")
        daemon.start()
        self.assertEqual(1, daemon.ended())
        self.assertIn("--state-dir", daemon.log)
        self.assertNotIn("Traceback", daemon.log)
        daemon.state_dir.unlink()
        self.assert_nothing_left(daemon)

    def test_a_cache_directory_that_cannot_be_made(self) -> None:
        daemon = self.daemon(self.registry.image("app"))
        daemon.cache_dir.write_text("in the way")
        self.assert_fails(daemon, str(daemon.cache_dir))

    def test_a_mount_point_that_has_a_daemon_already(self) -> None:
        first = self.mounted(self.registry.image("app"))
        second = self.daemon(self.registry.image("app"), name="second", foreground=True)
        second.options = (*second.options, "--mountpoint", str(first.mountpoint))
        second.options = (*second.options, "--state-dir", str(first.state_dir))
        second.start()
        self.assertEqual(1, second.ended())
        self.assertIn(f"process {first.pid}", second.log)
        self.assertIsNotNone(mount_of(first))
        first.ready()
        first.signal(signal.SIGTERM)
        self.assert_ends_well(first)

    def test_a_mount_point_that_is_mounted_on_already(self) -> None:
        first = self.mounted(self.registry.image("app"))
        second = self.daemon(self.registry.image("app"), name="second", foreground=True)
        second.options = (*second.options, "--mountpoint", str(first.mountpoint))
        second.start()
        self.assertEqual(1, second.ended())
        self.assertIn("is a mount point already", second.log)
        waited = run(BIN / "erofs-nbd", "wait", first.mountpoint, "--state-dir", second.state_dir)
        self.assertIn("is a mount point already", waited.stderr)
        first.signal(signal.SIGTERM)
        self.assertEqual(0, first.ended())
        self.assert_nothing_left(first, second)


class WaitTests(DaemonTestCase):
    attach = "fuse"

    def test_it_says_when_no_daemon_comes_up(self) -> None:
        waited = self.daemon("app").erofs_nbd("wait", "--timeout", "0.1")
        self.assertEqual(1, waited.returncode)
        self.assertIn("no daemon", waited.stderr)

    def test_it_gives_up_on_a_daemon_that_still_starts_and_a_stop_ends_that_at_once(self) -> None:
        self.registry.set("stalls", {"stall": True})
        daemon = self.start(self.registry.image("stalls"))
        waited = daemon.erofs_nbd("wait", "--timeout", "0.3")
        self.assertEqual(1, waited.returncode)
        self.assertIn("still starting", waited.stderr)
        until("request", lambda: self.registry.requests("stalls"))
        began = time.monotonic()
        daemon.signal(signal.SIGTERM)
        self.assert_ends_well(daemon)
        self.assertLess(time.monotonic() - began, 5)

    def test_it_waits_for_a_daemon_that_is_yet_to_be_started(self) -> None:
        daemon = self.daemon(self.registry.image("later"))
        waiter = os.fork()
        if not waiter:
            os._exit(daemon.erofs_nbd("wait").returncode)
        self._children_before.add(waiter)
        time.sleep(0.5)
        daemon.start()
        self.assertEqual(0, os.waitstatus_to_exitcode(os.waitpid(waiter, 0)[1]))
        self.assertIsNotNone(mount_of(daemon))
        daemon.signal(signal.SIGTERM)
        self.assertEqual(0, daemon.ended())

    def test_umount_of_what_is_not_mounted_is_an_error(self) -> None:
        unmounted = self.daemon("app").erofs_nbd("umount")
        self.assertEqual(1, unmounted.returncode)
        self.assertIn("no mount of erofs-nbd is on record", unmounted.stderr)
