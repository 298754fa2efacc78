"""Mount points and the watch on them, with mounts that any kernel has."""

from __future__ import annotations

import os
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import ParamSpec, TypeVar

from twisted.internet import reactor
from twisted.internet.defer import Deferred, ensureDeferred
from twisted.internet.task import deferLater
from twisted.trial.unittest import TestCase

from erofs_twisted.errors import MountError
from erofs_twisted.mount.mountpoint import Busy, Mountpoint
from erofs_twisted.mount.options import MountOptions
from erofs_twisted.mount.watch import MountTable, MountWatch
from erofs_twisted.pool import SystemCallPool
from erofs_twisted.syscalls import in_thread

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")

SETTLE = 0.2
"""Seconds after which what has not happened will not."""


class MountTestCase(TestCase):
    timeout = 60

    def setUp(self) -> None:
        self.path = os.path.realpath(tempfile.mkdtemp(prefix="mount-"))
        self.pool = SystemCallPool(reactor)
        self.addCleanup(self.pool.stop)
        self.addCleanup(os.rmdir, self.path)
        self.mountpoint = Mountpoint(reactor, self.pool, self.path)
        self.addCleanup(lambda: ensureDeferred(self.mountpoint.unmount(lazy=True)))

    async def mount(self) -> None:
        await self.mountpoint.mount("none", "tmpfs", MountOptions())

    async def command(self, *command: str) -> None:
        await self.in_thread(subprocess.run, command, check=True, capture_output=True)

    async def in_thread(
        self, call: Callable[Arguments, Result], *args: Arguments.args, **kwargs: Arguments.kwargs
    ) -> Result:
        return await in_thread(reactor, self.pool, call, *args, **kwargs)


class MountpointTests(MountTestCase):
    async def test_a_mount_has_its_flags(self) -> None:
        await self.mountpoint.mount("none", "tmpfs", MountOptions.parse("noexec,size=1m"))
        (line,) = [line for line in _lines("/proc/self/mounts") if f" {self.path} " in line]
        options = line.split(" ")[3].split(",")
        self.assertEqual({"ro", "nosuid", "nodev", "noexec", "size=1024k"}, {*options} - {"relatime"})

    async def test_a_mount_point_is_not_mounted_on_again(self) -> None:
        await self.mount()
        other = Mountpoint(reactor, self.pool, self.path)
        with self.assertRaises(MountError) as caught:
            await other.check()
        self.assertIn("of none (type tmpfs)", str(caught.exception))

    async def test_an_image_that_is_none_is_refused_with_where_to_look(self) -> None:
        file = Path(self.path + ".image")
        await self.in_thread(file.write_bytes, bytes(1 << 20))
        self.addCleanup(os.unlink, file)
        with self.assertRaises(MountError) as caught:
            await self.mountpoint.mount(str(file), "erofs", MountOptions())
        self.assertRegex(str(caught.exception), "dmesg|BACKED_BY_FILE")

    async def test_a_file_system_that_the_kernel_lacks_is_named(self) -> None:
        with self.assertRaises(MountError) as caught:
            await self.mountpoint.mount("none", "nosuchfs", MountOptions())
        self.assertIn("modprobe nosuchfs", str(caught.exception))

    async def test_an_open_file_holds_it_and_a_lazy_unmount_takes_it_away(self) -> None:
        await self.mount()
        descriptor = os.open(self.path, os.O_RDONLY)
        self.addCleanup(os.close, descriptor)
        with self.assertRaises(Busy) as caught:
            await self.mountpoint.unmount()
        self.assertEqual([os.getpid()], [holder.pid for holder in caught.exception.holders])
        await self.mountpoint.unmount(lazy=True)
        self.assertEqual([], await self.mountpoint.holders())
        await self.mountpoint.check()

    async def test_a_mount_on_it_holds_it(self) -> None:
        await self.mountpoint.mount("/proc", "proc", MountOptions())
        below = f"{self.path}/tty"
        await self.command("mount", "-t", "tmpfs", "none", below)
        with self.assertRaises(Busy) as caught:
            await self.mountpoint.unmount()
        self.assertEqual(f"{self.path} is in use by the mount on {below}", str(caught.exception))
        await self.command("umount", below)
        await self.mountpoint.unmount()

    async def test_what_somebody_mounted_over_it_is_not_unmounted(self) -> None:
        await self.mount()
        await self.command("mount", "-t", "proc", "over", self.path)
        with self.assertRaises(MountError) as caught:
            await self.mountpoint.unmount()
        self.assertIn("over (type proc) is mounted over it", str(caught.exception))
        await self.command("umount", self.path)
        await self.mountpoint.unmount()


class MountWatchTests(MountTestCase):
    def setUp(self) -> None:
        super().setUp()
        self.looks = 0
        self.watch = MountWatch(reactor, self.open)
        self.addCleanup(self.watch.close)

    def open(self, changed: Callable[[], None]) -> MountTable:
        def counted() -> None:
            self.looks += 1
            changed()

        return MountTable(counted)

    async def gone(self) -> Deferred[None]:
        await self.mount()
        return self.watch.gone(self.mountpoint.path)

    async def test_it_sleeps_while_nothing_changes(self) -> None:
        gone = await self.gone()
        await deferLater(reactor, SETTLE)
        self.assertEqual((0, False), (self.looks, gone.called))

    async def test_it_looks_once_for_a_change(self) -> None:
        gone = await self.gone()
        await self.command("mount", "-t", "tmpfs", "over", self.path)
        await deferLater(reactor, SETTLE)
        self.assertEqual((1, False), (self.looks, gone.called))
        await self.command("umount", self.path)
        await deferLater(reactor, SETTLE)
        self.assertEqual((2, False), (self.looks, gone.called))

    async def test_it_notices_an_unmount_by_anybody(self) -> None:
        for command in (["umount"], ["umount", "--lazy"]):
            gone = await self.gone()
            await self.command(*command, self.path)
            await gone

    async def test_it_notices_our_own_unmount(self) -> None:
        gone = await self.gone()
        await self.mountpoint.unmount()
        await gone


def _lines(path: str) -> list[str]:
    return Path(path).read_text().splitlines()
