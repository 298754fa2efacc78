"""The whole daemon, on nbd devices, and on a loop device where the kernel mounts no file."""

from __future__ import annotations

import signal

from tests import mounting
from tests.daemon import DaemonTestCase
from tests.processes import run
from tests.scenery import contents, scenery
from tests.servers import tool


class NBDMountTests(mounting.MountTests):
    attach = "nbd"
    is_warm = True

    def test_a_device_that_somebody_disconnects_ends_the_daemon_which_leaves_nothing(self) -> None:
        daemon = self.mounted(self.registry.image("disconnected", "plain"))
        device = daemon.ready().device
        self.assertEqual(0, run(tool("nbd-client"), "-d", device).returncode)
        self.assertEqual(1, daemon.ended())
        self.assert_tells_why_and_leaves_nothing(daemon, device, "disconnected by somebody else")


class BackEndTests(DaemonTestCase):
    is_warm = True

    def assert_mounts_by(self, attach: str, backend: str, device: str) -> None:
        daemon = self.mounted(self.registry.image(f"by-{attach}"), "--attach", attach)
        record = daemon.ready()
        self.assertEqual(backend, record.backend)
        self.assertIn(device, record.device)
        self.assert_same(contents(scenery().tree), contents(daemon.mountpoint))
        daemon.signal(signal.SIGTERM)
        self.assert_ends_well(daemon)

    def test_auto_takes_nbd_where_the_kernel_has_it(self) -> None:
        self.assert_mounts_by("auto", "nbd", "/dev/nbd")

    def test_fuse_works_without_nbd(self) -> None:
        self.assert_mounts_by("fuse", "fuse", "")
