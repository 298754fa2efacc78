"""The whole daemon, by the fuse back end: on any kernel that mounts EROFS from a file or a loop device."""

from __future__ import annotations

import signal

from tests import mounting
from tests.processes import run
from tests.scenery import scenery


class FuseMountTests(mounting.MountTests):
    attach = "fuse"

    def test_one_of_several_layers_is_mounted(self) -> None:
        self.assert_mounts(self.registry.image("choice", "two"), "--layer", "1")

    def test_the_image_for_another_platform_is_mounted(self) -> None:
        self.assert_mounts(self.registry.image("choice", "index"), "--platform", "linux/arm64")
        asked = {request["reference"] for request in self.registry.requests("choice")}
        self.assertIn(scenery().layers["plain"]["digest"], asked)

    def test_an_image_in_a_layout_on_disk_is_mounted(self) -> None:
        self.assert_mounts(f"oci:{scenery().layout}:lz4")

    def test_the_shorthand_of_erofs_utils_is_the_options_spelt_out(self) -> None:
        self.registry.set("shorthand", user="alice:secret")
        shorthand = "platform=linux/arm64,layer=0,username=alice,password=secret"
        self.assert_mounts(self.registry.image("shorthand", "index"), "--oci", shorthand)

    def test_a_password_is_read_from_standard_input_before_the_daemon_leaves(self) -> None:
        self.registry.set("stdin", user="alice:secret")
        daemon = self.daemon(self.registry.image("stdin"), "--username", "alice", "--password-file", "-")
        started = run(*daemon.command(), stdin=None, input="secret\n", cwd=daemon.directory)
        self.assertEqual((0, "", ""), (started.returncode, started.stdout, started.stderr))
        daemon.pid = int(daemon.pidfile.read_text())
        daemon.ready()
        self.assert_whole(daemon.mountpoint)
        daemon.signal(signal.SIGTERM)
        self.assert_ends_well(daemon)

    def assert_mounts(self, image: str, *options: str) -> None:
        daemon = self.mounted(image, *options)
        self.assert_whole(daemon.mountpoint)
        daemon.signal(signal.SIGTERM)
        self.assert_ends_well(daemon)
