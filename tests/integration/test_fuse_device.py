"""The fuse back end with real nbdfuse, on a kernel whose EROFS mounts files."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from twisted.internet import reactor
from twisted.internet.defer import Deferred, succeed
from twisted.internet.interfaces import IListeningPort
from twisted.internet.protocol import Factory, Protocol
from zope.interface import implementer

from erofs_twisted.device.fuse import FuseConnector
from erofs_twisted.errors import MountError
from erofs_twisted.interfaces import IDeviceConnector, IExport, INBDServer
from tests import devices
from tests.exports import BytesExport

ROOT = Path(__file__).parents[2]
ATTACH = """
from twisted.internet import reactor
from erofs_twisted.device.fuse import FuseConnector
from erofs_twisted.pool import SystemCallPool
from erofs_twisted.nbd.server import NBDServer
from tests.exports import FileExport

attaching = FuseConnector(reactor, SystemCallPool(reactor), {run!r}).attach(
    FileExport({image!r}), NBDServer(reactor)
)
attaching.addCallback(lambda device: print("attached", flush=True))
reactor.run()
"""


class FuseDeviceTests(devices.DeviceTests):
    def connector(self) -> IDeviceConnector:
        return FuseConnector(reactor, self.pool, str(self.directory / "run"))

    def _nbdfuse(self) -> list[int]:
        """The nbdfuse processes of this test."""
        wanted = os.fsencode(self.directory)
        found = []
        for process in Path("/proc").iterdir():
            if process.name.isdigit():
                try:
                    command = (process / "cmdline").read_bytes()
                except OSError:
                    continue
                if b"nbdfuse" in command and wanted in command:
                    found.append(int(process.name))
        return found

    async def test_this_machine_can_do_it(self) -> None:
        await self.connector().check()

    async def test_detach_leaves_no_process_and_no_file(self) -> None:
        device = await self.connector().attach(self.export, self.server)
        self.assertEqual(1, len(self._nbdfuse()))
        await device.detach()
        self.assertEqual([], self._nbdfuse())
        self.assertEqual([], list((self.directory / "run").iterdir()))

    async def test_nbdfuse_is_not_in_the_terminals_session(self) -> None:
        await self.attach()
        (process,) = self._nbdfuse()
        self.assertEqual(process, os.getsid(process))

    async def test_a_device_whose_nbdfuse_is_killed_is_lost(self) -> None:
        device = await self.attach()
        (process,) = self._nbdfuse()
        os.kill(process, signal.SIGKILL)
        await device.lost

    async def test_a_device_whose_file_is_unmounted_is_lost(self) -> None:
        device = await self.attach()
        (shown,) = (self.directory / "run").glob("*/image")
        await self.run_command("umount", str(shown))
        await device.lost

    async def test_a_path_too_long_for_a_socket_is_said_to_be(self) -> None:
        connector = FuseConnector(reactor, self.pool, str(self.directory / ("long" * 30)))
        with self.assertRaises(MountError) as caught:
            await connector.attach(self.export, self.server)
        self.assertIn("--state-dir", str(caught.exception))

    async def test_what_a_killed_daemon_left_is_cleared_away(self) -> None:
        left = await self.in_thread(self._attach_and_be_killed)
        await self.attach()
        (kept,) = (self.directory / "run").iterdir()
        self.assertNotEqual(left, kept.name)
        self.assertEqual(1, len(self._nbdfuse()))

    async def test_a_device_in_use_is_not_cleared_away(self) -> None:
        first, second = await self.attach(), await self.attach()
        await self.mount(first)
        self.assertFalse(first.lost.called)
        self.assertFalse(second.lost.called)

    def _attach_and_be_killed(self) -> str:
        """A process attaches the image and is killed. Returns the name of the directory that it leaves."""
        run = self.directory / "run"
        script = ATTACH.format(run=str(run), image=str(self.directory / "image.erofs"))
        with subprocess.Popen([sys.executable, "-c", script], cwd=ROOT, stdout=subprocess.PIPE) as process:
            assert process.stdout is not None
            self.assertEqual(b"attached\n", process.stdout.readline())
            process.kill()
        (left,) = run.iterdir()
        return left.name

    async def test_an_nbdfuse_that_fails_leaves_nothing(self) -> None:
        with self.assertRaises(MountError) as caught:
            await self.connector().attach(self.export, HangUp())
        self.assertIn("nbdfuse does not show the image as a file: ", str(caught.exception))
        self.assertEqual([], self._nbdfuse())
        self.assertEqual([], list((self.directory / "run").iterdir()))

    async def test_a_file_of_another_size_leaves_nothing(self) -> None:
        with self.assertRaises(MountError):
            await self.connector().attach(self.export, Impostor(self.server))
        self.assertEqual([], self._nbdfuse())
        self.assertEqual([], list((self.directory / "run").iterdir()))


@implementer(INBDServer)
class HangUp:
    """Ends every connection at once."""

    def adopt(self, sock: socket.socket, export: IExport) -> Deferred[None]:
        raise NotImplementedError

    def listen(self, path: str, exports: Sequence[IExport]) -> Deferred[IListeningPort]:
        return succeed(reactor.listenUNIX(path, Factory.forProtocol(HungUp)))


class HungUp(Protocol):
    def connectionMade(self) -> None:
        self.transport.loseConnection()


@implementer(INBDServer)
class Impostor:
    """Serves something else than it is told to."""

    def __init__(self, server: INBDServer) -> None:
        self._server = server

    def adopt(self, sock: socket.socket, export: IExport) -> Deferred[None]:
        raise NotImplementedError

    def listen(self, path: str, exports: Sequence[IExport]) -> Deferred[IListeningPort]:
        return self._server.listen(path, [BytesExport(bytes(8192))])
