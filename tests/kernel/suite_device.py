"""Devices of the kernel's nbd driver, and loop devices on nbdfuse's files where EROFS mounts no file."""

from __future__ import annotations

import glob
import os
import stat
from pathlib import Path

from twisted.internet import reactor

from erofs_twisted.device.connector import choose_connector
from erofs_twisted.device.driver import NBDDriver
from erofs_twisted.device.fuse import FuseConnector
from erofs_twisted.device.nbd import NBDSettings, NetlinkConnector
from erofs_twisted.device.uapi import Connection
from erofs_twisted.errors import MountError
from erofs_twisted.interfaces import IBlockDevice, IDeviceConnector
from tests import devices


def connected() -> list[str]:
    """The nbd devices that are in use."""
    return sorted(pid.parent.name for pid in Path("/sys/block").glob("nbd*/pid"))


def sysfs(device: IBlockDevice, name: str) -> str:
    return Path("/sys/block", Path(device.path).name, name).read_text().strip()


def device_number(path: str) -> int | None:
    """None where there is no node; of the node of something else, an error."""
    try:
        there = os.stat(path)
    except FileNotFoundError:
        return None
    assert stat.S_ISBLK(there.st_mode)
    return there.st_rdev


class NBDDeviceTests(devices.DeviceTests):
    def connector(self, settings: NBDSettings | None = None) -> IDeviceConnector:
        return NetlinkConnector(reactor, self.pool, settings)

    async def setUp(self) -> None:
        await super().setUp()
        self.others = connected()
        self.addCleanup(lambda: self.assertEqual([], self.connected()))

    def connected(self) -> list[str]:
        """Those that this test has connected."""
        return sorted({*connected()} - {*self.others})

    async def test_this_machine_can_do_it(self) -> None:
        await self.connector().check()

    async def test_a_missing_driver_is_loaded(self) -> None:
        await self.run_command("modprobe", "--remove", "nbd")
        await self.connector().check()
        await self.attach()

    async def test_auto_takes_it_first(self) -> None:
        fuse = FuseConnector(reactor, self.pool, str(self.directory / "run"))
        chosen = await choose_connector("auto", [self.connector(), fuse])
        self.assertEqual("nbd", chosen.name)

    async def test_a_device_has_its_size_and_is_read_only(self) -> None:
        device = await self.attach()
        self.assertEqual(self.export.size, 512 * int(sysfs(device, "size")))
        self.assertEqual("1", sysfs(device, "ro"))
        self.assertEqual("4096", sysfs(device, "queue/logical_block_size"))

    async def test_settings_are_the_devices(self) -> None:
        settings = NBDSettings(
            io_timeout_ms=3000, read_ahead_kb=256, max_sectors_kb=512, backend_identifier="me"
        )
        device = await self.connector(settings).attach(self.export, self.server)
        self.addCleanup(device.detach)
        wanted = {
            "queue/io_timeout": "3000",
            "queue/read_ahead_kb": "256",
            "queue/max_sectors_kb": "512",
            "backend": "me",
        }
        self.assertEqual(wanted, {name: sysfs(device, name) for name in wanted})

    async def test_the_kernel_knows_a_device_by_its_exports_description(self) -> None:
        device = await self.attach()
        self.assertEqual(self.export.description, sysfs(device, "backend"))

    async def test_detach_waits_until_the_device_is_free(self) -> None:
        device = await self.connector().attach(self.export, self.server)
        name = Path(device.path).name
        self.assertEqual([name], self.connected())
        await device.detach()
        self.assertEqual([], self.connected())
        self.assertEqual("0", sysfs(device, "size"))

    async def test_a_setting_that_the_kernel_refuses_leaves_no_device(self) -> None:
        with self.assertRaises(MountError) as caught:
            await self.connector(NBDSettings(io_timeout_ms=0)).attach(self.export, self.server)
        self.assertIn("queue/io_timeout", str(caught.exception))
        self.assertEqual([], self.connected())

    async def test_a_connection_that_the_kernel_refuses_leaves_no_device(self) -> None:
        no_socket = Connection(
            sockets=[self.export.fd],
            size=self.export.size,
            block_size=4096,
            server_flags=0,
            timeout=0,
            dead_conn_timeout=0,
            backend_identifier="",
        )
        with self.assertRaises(MountError):
            await self.in_thread(NBDDriver().attach, no_socket, {})
        self.assertEqual([], self.connected())

    async def test_a_device_that_somebody_disconnects_is_lost(self) -> None:
        device = await self.attach()
        await self.run_command("nbd-client", "-d", device.path)
        await device.lost

    async def test_a_device_that_is_lost_is_not_taken_from_its_next_user(self) -> None:
        first = await self.connector().attach(self.export, self.server)
        await self.run_command("nbd-client", "-d", first.path)
        await first.lost
        second = await self.attach()
        self.assertEqual(first.path, second.path)
        await first.detach()
        self.assertEqual([Path(second.path).name], self.connected())

    async def test_each_export_gets_a_device_of_its_own(self) -> None:
        found = [await self.attach() for _ in range(20)]
        self.assertEqual(20, len({device.path for device in found}))

    async def test_a_missing_node_is_made_and_removed(self) -> None:
        first = await self.attach()
        await first.detach()
        number = device_number(first.path)
        assert number is not None
        os.unlink(first.path)
        self.addCleanup(os.mknod, first.path, stat.S_IFBLK | 0o600, number)
        second = await self.connector().attach(self.export, self.server)
        self.assertEqual((first.path, number), (second.path, device_number(second.path)))
        await second.detach()
        self.assertIsNone(device_number(second.path))


class LoopDeviceTests(devices.DeviceTests):
    """User-Mode Linux's EROFS mounts block devices only."""

    def connector(self) -> IDeviceConnector:
        return FuseConnector(reactor, self.pool, str(self.directory / "run"))

    async def test_detach_leaves_nothing(self) -> None:
        device = await self.connector().attach(self.export, self.server)
        await self.mount(device)
        await self.mountpoint.unmount()
        await device.detach()
        self.assertEqual([], list((self.directory / "run").iterdir()))
        self.assertEqual([], glob.glob("/sys/block/loop*/loop/backing_file"))
