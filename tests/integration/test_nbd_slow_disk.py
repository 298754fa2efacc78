"""Files on a disk that is slow: whom it delays, and whom it does not."""

from __future__ import annotations

import os
import socket
import tempfile

from twisted.internet import reactor
from twisted.internet.defer import Deferred, gatherResults
from twisted.internet.task import deferLater
from twisted.internet.threads import deferToThread
from twisted.trial.unittest import TestCase

from erofs_twisted.nbd.errors import WireError
from erofs_twisted.nbd.server import NBDServer
from erofs_twisted.nbd.transport import LATE
from tests.exports import FileExport
from tests.nbd_client import Reply, read, simple_replies
from tests.slow_disk import SlowDisk, drop

CONTENT = os.urandom(3 << 20)
SHORT, LONG = 4096, 128 << 10
DELAY = 0.2


class SlowDiskTests(TestCase):
    timeout = 60

    def setUp(self) -> None:
        self.order: list[str] = []
        self.disk = SlowDisk(CONTENT, DELAY)
        self.disk.__enter__()
        self.addCleanup(self.disk.__exit__, None, None, None)
        self.slow = FileExport(self.disk.path)
        self.addCleanup(self.slow.close)
        memory = tempfile.TemporaryFile()  # noqa: SIM115 - until the end of the test
        self.addCleanup(memory.close)
        memory.write(CONTENT)
        memory.flush()
        self.cached = FileExport(f"/proc/self/fd/{memory.fileno()}")
        self.addCleanup(self.cached.close)
        self.server = NBDServer(reactor)
        self.addCleanup(lambda: Deferred.fromCoroutine(self.server.stop(0)))

    def connect(self, export: FileExport) -> socket.socket:
        ours, theirs = socket.socketpair()
        theirs.settimeout(30)
        self.addCleanup(theirs.close)
        self.server.adopt(ours, export)
        return theirs

    async def content(self, name: str, client: socket.socket, offset: int, length: int) -> bytes:
        """Read a range; when the answer has come, ``name`` is put into `order`."""

        def blocking() -> bytes:
            client.sendall(read(offset, length, cookie=1))
            return _receive(client, 16 + length)

        answer = await deferToThread(blocking)
        self.order.append(name)
        (reply,) = simple_replies(answer, {1: length})
        self.assertEqual((1, 0), (reply.cookie, reply.error))
        return reply.content

    async def test_cached_reads_of_another_export_do_not_wait_for_it(self) -> None:
        slow, quick = [self.connect(self.slow) for _ in range(2)], self.connect(self.cached)
        under_way = [
            Deferred.fromCoroutine(self.content("slow", client, offset, length))
            for client, offset, length in ((slow[0], 0, LONG), (slow[1], 2 << 20, SHORT))
        ]
        for length in (SHORT, LONG, 2 * LONG):
            self.assertTrue(await self.content("quick", quick, 0, length) == CONTENT[:length])
        self.assertEqual(["quick"] * 3, self.order)
        long, short = await gatherResults(under_way)
        self.assertTrue(long == CONTENT[:LONG])
        self.assertTrue(short == CONTENT[2 << 20 : (2 << 20) + SHORT])

    async def test_cached_reads_of_the_same_export_overtake_those_that_wait_for_it(self) -> None:
        first, second = self.connect(self.slow), self.connect(self.slow)
        for length in (SHORT, LONG):
            await self.content("warm up", first, 0, length)
        self.order.clear()
        waiting = Deferred.fromCoroutine(self.content("slow", first, 2 << 20, LONG))
        for length in (SHORT, LONG):
            self.assertTrue(await self.content("quick", second, 0, length) == CONTENT[:length])
        self.assertEqual(["quick"] * 2, self.order)
        self.assertTrue(await waiting == CONTENT[2 << 20 : (2 << 20) + LONG])

    async def test_what_was_read_is_not_read_again(self) -> None:
        client = self.connect(self.slow)
        for _ in range(2):
            began = reactor.seconds()
            self.assertTrue(await self.content("read", client, 0, LONG) == CONTENT[:LONG])
        self.assertLess(reactor.seconds() - began, DELAY)

    async def test_what_leaves_memory_while_a_client_takes_no_replies_delays_no_other(self) -> None:
        stalled, quick = self.connect(self.slow), self.connect(self.cached)
        stalled.sendall(read(0, len(CONTENT), cookie=1))
        while not any(each.transport.producerPaused for each in self.server._connections):
            await deferLater(reactor, 0.01)
        drop(self.disk.path)
        await deferLater(reactor, 2 * LATE)
        late = deferToThread(_receive, stalled, 16 + len(CONTENT))
        while not any(each.transport._bringing for each in self.server._connections):
            self.assertNoResult(late)
            await deferLater(reactor, 0.001)
        for length in (SHORT, LONG):
            self.assertTrue(await self.content("quick", quick, 0, length) == CONTENT[:length])
        self.assertNoResult(late)
        self.assertTrue((await late)[16:] == CONTENT)

    async def test_the_end_does_not_wait_for_it(self) -> None:
        client = self.connect(self.slow)
        client.sendall(b"".join(read(each * LONG, LONG, cookie=each) for each in range(24)))
        while not self.server._readers._pool:
            await deferToThread(os.sched_yield)
        began = reactor.seconds()
        await self.server.stop(0)
        self.assertLess(reactor.seconds() - began, 24 * DELAY / 2)
        answer = await deferToThread(_receive, client, 24 * 16 + 1)
        refused = simple_replies(answer, {})
        self.assertEqual({Reply(each, WireError.ESHUTDOWN) for each in range(24)}, set(refused))


def _receive(client: socket.socket, length: int) -> bytes:
    """That many bytes, or all until the end."""
    taken = bytearray()
    while len(taken) < length and (piece := client.recv(length - len(taken))):
        taken += piece
    return bytes(taken)
