"""The server on real sockets: who may connect, what is left behind, how it ends."""

from __future__ import annotations

import os
import socket
import stat
import tempfile
from collections.abc import Callable
from pathlib import Path

from twisted.internet import reactor
from twisted.internet.defer import Deferred, gatherResults
from twisted.internet.task import deferLater
from twisted.internet.threads import deferToThread
from twisted.trial.unittest import TestCase

from erofs_twisted.nbd import server as module
from erofs_twisted.nbd.errors import WireError
from erofs_twisted.nbd.server import NBDServer
from erofs_twisted.ownerport import SocketInUse
from tests.exports import BytesExport, FileExport, SlowExport
from tests.nbd_client import Reply, read, simple_replies

CONTENT = os.urandom(1 << 20)


def connect(path: str) -> socket.socket:
    client = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    client.settimeout(10)
    client.connect(path)
    return client


def receive(sock: socket.socket, length: int | None = None) -> Deferred[bytes]:
    """Off the reactor's thread: that many bytes, or all until the end."""

    def blocking() -> bytes:
        taken = bytearray()
        while length is None or len(taken) < length:
            piece = sock.recv(65536 if length is None else length - len(taken))
            if not piece:
                break
            taken += piece
        return bytes(taken)

    return deferToThread(blocking)


async def until(happened: Callable[[], object]) -> None:
    while not happened():
        await deferLater(reactor, 0.001)


class ServerTests(TestCase):
    timeout = 30

    def setUp(self) -> None:
        self.server = NBDServer(reactor)
        self.addCleanup(lambda: Deferred.fromCoroutine(self.server.stop(0)))
        self.directory = tempfile.TemporaryDirectory()
        self.addCleanup(self.directory.cleanup)
        self.path = os.path.join(self.directory.name, "nbd.sock")

    def occupy(self, content: str) -> None:
        Path(self.path).write_text(content)

    def occupant(self) -> str:
        return Path(self.path).read_text()

    def exists(self) -> bool:
        return os.path.lexists(self.path)

    def adopted(self, export: BytesExport | FileExport) -> tuple[socket.socket, Deferred[None]]:
        ours, theirs = socket.socketpair()
        theirs.settimeout(10)
        self.addCleanup(theirs.close)
        return theirs, self.server.adopt(ours, export)


class AdoptTests(ServerTests):
    async def test_an_adopted_socket_starts_in_the_transmission_phase(self) -> None:
        kernel, _ = self.adopted(BytesExport(CONTENT))
        kernel.sendall(read(4096, 512, cookie=7))
        answer = await receive(kernel, 16 + 512)
        self.assertEqual([Reply(7, content=CONTENT[4096:4608])], simple_replies(answer, {7: 512}))

    async def test_long_and_short_reads_of_a_file_arrive_intact(self) -> None:
        blob = os.memfd_create("blob")
        self.addCleanup(os.close, blob)
        os.write(blob, CONTENT)
        export = FileExport(f"/proc/self/fd/{blob}")
        self.addCleanup(export.close)
        kernel, _ = self.adopted(export)
        lengths = {0: 1, 1: len(CONTENT), 2: 4096, 3: 16 << 10, 4: (16 << 10) + 1, 5: 131072}
        kernel.sendall(b"".join(read(0, length, cookie=cookie) for cookie, length in lengths.items()))
        replies = simple_replies(await receive(kernel, sum(lengths.values()) + 6 * 16), lengths)
        self.assertEqual(list(lengths), [reply.cookie for reply in replies])
        self.assertTrue(all(reply.content == CONTENT[: lengths[reply.cookie]] for reply in replies))

    async def test_whoever_had_it_adopted_learns_that_the_peer_ended_the_connection(self) -> None:
        kernel, lost = self.adopted(BytesExport(CONTENT))
        self.assertNoResult(lost)
        kernel.close()
        self.assertIsNone(await lost)

    async def test_a_client_that_vanishes_cancels_its_reads_though_as_many_wait_as_may(self) -> None:
        export = SlowExport(CONTENT)
        kernel, lost = self.adopted(export)
        kernel.sendall(b"".join(read(0, 512, cookie=cookie) for cookie in range(300)))
        await until(lambda: len(export.reads) == 256)
        kernel.close()
        await lost
        self.assertEqual(256, export.cancelled)


class ListenTests(ServerTests):
    async def test_the_socket_is_its_owners_alone_from_the_first_moment(self) -> None:
        self.addCleanup(os.umask, os.umask(0))
        self.patch(os, "chmod", lambda *_: None)
        await self.server.listen(self.path, [BytesExport(CONTENT)])
        self.assertEqual(0o600, stat.S_IMODE(os.stat(self.path).st_mode))

    async def test_a_client_is_greeted_and_may_choose_among_the_exports(self) -> None:
        await self.server.listen(self.path, [BytesExport(CONTENT, "app"), BytesExport(bytes(4096), "base")])
        client = connect(self.path)
        self.addCleanup(client.close)
        self.assertEqual(b"NBDMAGICIHAVEOPT\0\3", await receive(client, 18))
        client.sendall(b"\0\0\0\3IHAVEOPT\0\0\0\1\0\0\0\4base")
        self.assertEqual((4096).to_bytes(8, "big"), (await receive(client, 10))[:8])

    async def test_a_socket_file_that_nobody_listens_on_is_replaced(self) -> None:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as dead:
            dead.bind(self.path)
        await self.server.listen(self.path, [BytesExport(CONTENT)])
        connect(self.path).close()

    async def test_a_socket_that_another_server_listens_on_is_left_alone(self) -> None:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as alive:
            alive.bind(self.path)
            alive.listen(0)
            for _ in range(3):  # the second finds its queue full
                error = await self.assertFailure(self.server.listen(self.path, []), SocketInUse)
            self.assertIn("another server listens on " + self.path, str(error))
            self.assertTrue(self.exists())

    async def test_a_file_that_is_no_socket_is_left_alone(self) -> None:
        self.occupy("precious")
        await self.assertFailure(self.server.listen(self.path, []), SocketInUse)
        self.assertEqual("precious", self.occupant())

    async def test_the_socket_file_is_removed_at_the_end(self) -> None:
        await self.server.listen(self.path, [BytesExport(CONTENT)])
        await self.server.stop()
        self.assertFalse(self.exists())

    async def test_a_file_that_has_taken_its_place_is_not_removed_at_the_end(self) -> None:
        await self.server.listen(self.path, [BytesExport(CONTENT)])
        os.unlink(self.path)
        self.occupy("another's")
        await self.server.stop()
        self.assertEqual("another's", self.occupant())

    async def test_a_socket_file_that_was_removed_already_is_no_trouble_at_the_end(self) -> None:
        await self.server.listen(self.path, [BytesExport(CONTENT)])
        os.unlink(self.path)
        await self.server.stop()


class StopTests(ServerTests):
    async def test_stopping_closes_idle_clients_at_once(self) -> None:
        kernel, lost = self.adopted(BytesExport(CONTENT))
        started = reactor.seconds()
        await self.server.stop(10)
        self.assertLess(reactor.seconds() - started, 5)
        self.assertIsNone(self.successResultOf(lost))
        self.assertEqual(b"", await receive(kernel))

    async def test_stopping_answers_what_is_under_way(self) -> None:
        export = SlowExport(CONTENT)
        kernel, _ = self.adopted(export)
        kernel.sendall(read(0, 512))
        await until(lambda: export.reads)
        stopped = Deferred.fromCoroutine(self.server.stop(10))
        kernel.sendall(read(0, 512, cookie=2))
        refusal = simple_replies(await receive(kernel, 16), {})
        self.assertEqual([Reply(2, WireError.ESHUTDOWN)], refusal)
        self.assertNoResult(stopped)
        export.reads[0].finish()
        await stopped
        self.assertEqual(CONTENT[:512], (await receive(kernel))[16:])

    async def test_stopping_waits_no_longer_for_the_export_than_it_was_told(self) -> None:
        export = SlowExport(CONTENT)
        kernel, _ = self.adopted(export)
        kernel.sendall(read(0, 512))
        await until(lambda: export.reads)
        await self.server.stop(0.05)
        self.assertEqual([Reply(1, WireError.ESHUTDOWN)], simple_replies(await receive(kernel), {}))

    async def test_stopping_lets_a_client_take_the_replies_that_it_is_owed(self) -> None:
        self.patch(module, "CLOSE", 20)
        kernel, _ = self.adopted(BytesExport(bytes(16 << 20)))
        kernel.sendall(read(0, 16 << 20))
        await receive(kernel, 16)
        stopped = Deferred.fromCoroutine(self.server.stop(0))
        self.assertEqual(16 << 20, len(await receive(kernel)))
        await stopped

    async def test_stopping_does_not_wait_for_a_client_that_takes_no_replies(self) -> None:
        self.patch(module, "CLOSE", 0.05)
        big = BytesExport(bytes(32 << 20))
        kernel, lost = self.adopted(big)
        kernel.sendall(b"".join(read(0, 32 << 20, cookie=cookie) for cookie in range(4)))
        await receive(kernel, 16)
        await self.server.stop(0.05)
        self.assertIsNone(self.successResultOf(lost))

    async def test_stopping_sends_clients_away_that_are_still_in_the_handshake(self) -> None:
        await self.server.listen(self.path, [BytesExport(CONTENT)])
        client = connect(self.path)
        self.addCleanup(client.close)
        await receive(client, 18)
        await self.server.stop(10)
        self.assertEqual(b"", await receive(client))

    async def test_stopping_twice_is_stopping(self) -> None:
        self.adopted(BytesExport(CONTENT))
        await gatherResults([Deferred.fromCoroutine(self.server.stop(1)) for _ in range(2)])
        await self.server.stop()
