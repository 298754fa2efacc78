"""What holds of a device of any back end.

Import this module, not `DeviceTests` itself, to derive from it: a test runner takes every test case that it
finds in a module's namespace."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import ParamSpec, TypeVar

from twisted.internet import reactor
from twisted.internet.defer import CancelledError, Deferred, ensureDeferred
from twisted.internet.task import deferLater
from twisted.trial.unittest import TestCase

from erofs_twisted.errors import MountError
from erofs_twisted.interfaces import IBlockDevice, IDeviceConnector
from erofs_twisted.mount.mountpoint import Busy, Mountpoint
from erofs_twisted.mount.options import MountOptions
from erofs_twisted.mount.watch import MountWatch
from erofs_twisted.nbd.server import NBDServer
from erofs_twisted.pool import SystemCallPool
from erofs_twisted.syscalls import in_thread
from tests.exports import FileExport
from tests.images import build_erofs

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")


def digests(tree: Path) -> dict[str, str]:
    """The SHA-256 of every file below ``tree``, by its path there."""
    files = (path for path in tree.rglob("*") if path.is_file() and not path.is_symlink())
    return {str(path.relative_to(tree)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


class DeviceTestCase(TestCase):
    """Has an image, a server, and a directory to mount on. A test that leaves something mounted fails."""

    timeout = 120

    def connector(self) -> IDeviceConnector:
        raise NotImplementedError

    async def setUp(self) -> None:
        # A short path: there will be sockets in it.
        self.directory = Path(tempfile.mkdtemp(prefix="device-"))
        self.addCleanup(shutil.rmtree, self.directory)
        self.tree = self.directory / "tree"
        self.tree.mkdir()
        for number in range(40):
            (self.tree / f"file-{number}").write_bytes(os.urandom(number * 3000))
        self.pool = SystemCallPool(reactor)
        self.addCleanup(self.pool.stop)
        self.export = FileExport(str(build_erofs(self.tree, self.directory / "image.erofs")))
        self.addCleanup(self.export.close)
        self.server = NBDServer(reactor)
        self.addCleanup(self.server.stop)
        target = self.directory / "target"
        target.mkdir()
        self.mountpoint = Mountpoint(reactor, self.pool, str(target))
        self.addCleanup(self._nothing_is_left)

    async def attach(self) -> IBlockDevice:
        """A device that the test's end detaches."""
        device = await self.connector().attach(self.export, self.server)
        self.addCleanup(device.detach)
        return device

    async def mount(self, device: IBlockDevice) -> None:
        """Mount it until the test's end."""
        await self.mountpoint.check()
        await self.mountpoint.mount(device.path, "erofs", MountOptions())
        self.addCleanup(lambda: ensureDeferred(self.mountpoint.unmount(lazy=True)))

    async def in_thread(
        self, call: Callable[Arguments, Result], *args: Arguments.args, **kwargs: Arguments.kwargs
    ) -> Result:
        """Whatever reads the mount: this reactor serves it."""
        return await in_thread(reactor, self.pool, call, *args, **kwargs)

    async def run_command(self, *command: str) -> None:
        await self.in_thread(lambda: subprocess.run(command, check=True, capture_output=True))

    async def _nothing_is_left(self) -> None:
        lines = await self.in_thread(lambda: Path("/proc/self/mountinfo").read_text().splitlines())
        self.assertEqual([], [line for line in lines if str(self.directory) in line])


class DeviceTests(DeviceTestCase):
    """To be mixed into a test case whose `connector` is a real one."""

    async def test_a_mounted_device_has_the_files_of_the_image(self) -> None:
        await self.mount(await self.attach())
        target = Path(self.mountpoint.path)
        self.assertEqual(digests(self.tree), await self.in_thread(digests, target))

    async def test_a_mounted_device_cannot_be_written(self) -> None:
        await self.mount(await self.attach())
        target = Path(self.mountpoint.path)
        with self.assertRaises(OSError):
            await self.in_thread((target / "new").write_text, "x")

    async def test_a_second_detach_does_nothing(self) -> None:
        device = await self.attach()
        await device.detach()
        await device.detach()

    async def test_a_device_is_held_while_it_is_mounted(self) -> None:
        device = await self.attach()
        self.assertFalse(await device.is_held())
        await self.mount(device)
        self.assertTrue(await device.is_held())
        self.assertTrue(await device.is_held())
        await self.mountpoint.unmount()
        self.assertFalse(await device.is_held())
        self.assertFalse(await device.is_held())
        await self.mount(device)

    async def test_a_device_is_held_by_a_mount_in_another_namespace(self) -> None:
        device = await self.attach()
        await self.mount(device)
        other = await self.in_thread(_sleeper, "unshare", "--mount", "--propagation", "private")
        self.addCleanup(other.wait)
        self.addCleanup(other.kill)
        await self.mountpoint.unmount()
        self.assertTrue(await device.is_held())
        other.kill()
        await self.in_thread(other.wait)
        self.assertFalse(await device.is_held())

    async def test_a_mounted_device_is_not_detached(self) -> None:
        device = await self.attach()
        await self.mount(device)
        with self.assertRaises(MountError):
            await device.detach()
        target = Path(self.mountpoint.path)
        self.assertEqual(digests(self.tree), await self.in_thread(digests, target))

    async def test_detach_is_no_loss(self) -> None:
        device = await self.attach()
        await device.detach()
        await deferLater(reactor, 0.1)
        self.assertFalse(device.lost.called)

    async def test_an_attachment_that_is_cancelled_leaves_nothing(self) -> None:
        attaching: Deferred[IBlockDevice] = self.connector().attach(self.export, self.server)
        # No turn of the reactor in between: whatever it waits for cannot have come yet.
        attaching.cancel()
        with self.assertRaises(CancelledError):
            await attaching

    async def test_an_attachment_that_is_cancelled_later_is_whole_or_leaves_nothing(self) -> None:
        for delay in (0, 0.002, 0.01, 0.05):
            attaching: Deferred[IBlockDevice] = self.connector().attach(self.export, self.server)
            await deferLater(reactor, delay)
            attaching.cancel()
            try:
                device = await attaching
            except CancelledError:
                continue
            await device.detach()

    async def test_a_busy_mount_names_those_who_use_it(self) -> None:
        await self.mount(await self.attach())
        user = await self.in_thread(_sleeper, cwd=self.mountpoint.path)
        self.addCleanup(user.kill)
        with self.assertRaises(Busy) as caught:
            await self.mountpoint.unmount()
        self.assertEqual([user.pid], [holder.pid for holder in caught.exception.holders])
        self.assertIn(f"(process {user.pid})", str(caught.exception))
        user.kill()
        await self.in_thread(user.wait)
        await self.mountpoint.unmount()

    async def test_an_unmount_by_somebody_else_is_noticed(self) -> None:
        await self.mount(await self.attach())
        watch = MountWatch(reactor)
        self.addCleanup(watch.close)
        gone = watch.gone(self.mountpoint.path)
        await deferLater(reactor, 0.1)
        self.assertFalse(gone.called)
        await self.run_command("umount", self.mountpoint.path)
        await gone


def _sleeper(*prefix: str, cwd: str = "/") -> subprocess.Popen[str]:
    """A process that does nothing, and has begun to."""
    script = "print(flush=True); import time; time.sleep(1000)"
    process = subprocess.Popen(
        [*prefix, sys.executable, "-c", script], cwd=cwd, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    process.stdout.readline()
    process.stdout.close()
    return process
