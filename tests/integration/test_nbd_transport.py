"""The transport on a real socket pair."""

from __future__ import annotations

import os
import socket

from twisted.internet import reactor
from twisted.internet.defer import Deferred
from twisted.internet.error import ConnectionAborted, ConnectionDone, ConnectionLost
from twisted.internet.interfaces import IPullProducer, IPushProducer
from twisted.internet.protocol import Protocol
from twisted.internet.task import deferLater
from twisted.internet.threads import deferToThread
from twisted.logger import capturedLogs
from twisted.python.failure import Failure
from twisted.trial.unittest import TestCase
from zope.interface import implementer

from erofs_twisted.errors import ReadError
from erofs_twisted.interfaces import FileSpan
from erofs_twisted.nbd import transport as module
from erofs_twisted.nbd.transport import SpanTransport

LENGTH = 8 << 20
CONTENT = os.urandom(1 << 16) * (LENGTH >> 16)


class Recorder(Protocol):
    def __init__(self) -> None:
        self.data = b""
        self.reasons: list[type[Exception]] = []
        self.lost: Deferred[None] = Deferred()

    def dataReceived(self, data: bytes) -> None:
        self.data += data

    def connectionLost(self, reason: Failure) -> None:  # type: ignore[override]
        self.reasons.append(reason.type)
        self.lost.callback(None)


@implementer(IPushProducer)
class Pushing:
    def __init__(self) -> None:
        self.calls: list[str] = []
        self.resumed: Deferred[None] = Deferred()

    def pauseProducing(self) -> None:
        self.calls.append("pause")

    def resumeProducing(self) -> None:
        self.calls.append("resume")
        self.resumed.callback(None)

    def stopProducing(self) -> None:
        self.calls.append("stop")


@implementer(IPullProducer)
class Pulled:
    def __init__(self, transport: SpanTransport, pieces: list[bytes]) -> None:
        self._transport = transport
        self._pieces = pieces

    def resumeProducing(self) -> None:
        if self._pieces:
            self._transport.write(self._pieces.pop(0))
        else:
            self._transport.unregisterProducer()
            self._transport.loseConnection()

    def stopProducing(self) -> None:
        self._pieces.clear()


class SpanTransportTests(TestCase):
    timeout = 20

    def setUp(self) -> None:
        ours, self.peer = socket.socketpair()
        self.addCleanup(self.peer.close)
        self.peer.settimeout(10)
        self.protocol = Recorder()
        self.transport = SpanTransport(ours, self.protocol, reactor=reactor)
        self.protocol.makeConnection(self.transport)
        self.addCleanup(self.end)
        self.file = os.memfd_create("blob")
        self.addCleanup(os.close, self.file)
        os.write(self.file, CONTENT)

    async def end(self) -> None:
        self.transport.abortConnection()
        if not self.protocol.reasons:
            await self.protocol.lost

    def span(self, offset: int = 0, length: int = LENGTH) -> FileSpan:
        return FileSpan(self.file, offset, length)

    def take(self, length: int) -> Deferred[bytes]:
        """Read that many bytes as the peer, or until the end."""

        def blocking() -> bytes:
            taken = bytearray()
            while len(taken) < length:
                piece = self.peer.recv(length - len(taken))
                if not piece:
                    break
                taken += piece
            return bytes(taken)

        return deferToThread(blocking)

    async def test_bytes_and_spans_arrive_in_the_order_in_which_they_were_written(self) -> None:
        self.transport.write_segments([b"a" * 10, self.span(5, LENGTH - 5), b"b", b"c", self.span(0, 3)])
        self.transport.write(b"d")
        self.transport.writeSequence([b"e", b"f"])
        self.transport.write_segments([self.span(7, 100)])
        expected = b"a" * 10 + CONTENT[5:] + b"bc" + CONTENT[:3] + b"def" + CONTENT[7:107]
        self.assertTrue(await self.take(len(expected)) == expected)

    async def test_what_the_peer_sends_reaches_the_protocol(self) -> None:
        self.peer.sendall(b"request")
        while self.protocol.data != b"request":
            await deferLater(reactor, 0.001)

    def test_a_short_reply_is_sent_within_the_call(self) -> None:
        self.transport.write_segments([b"header", self.span(0, 1000)])
        self.assertEqual(b"header" + CONTENT[:1000], self.peer.recv(2000, socket.MSG_DONTWAIT))

    async def test_a_producer_pauses_while_the_peer_takes_nothing_and_resumes_when_all_is_sent(self) -> None:
        producer = Pushing()
        self.transport.registerProducer(producer, True)
        self.transport.write_segments([self.span()])
        self.transport.write_segments([self.span()])
        self.assertEqual(["pause"], producer.calls)
        await self.take(2 * LENGTH)
        await producer.resumed
        self.assertEqual(["pause", "resume"], producer.calls)

    async def test_a_pull_producer_is_asked_until_it_has_no_more(self) -> None:
        pieces = [b"one", b"two", bytes(1 << 20)]
        self.transport.registerProducer(Pulled(self.transport, list(pieces)), False)
        self.assertEqual(b"".join(pieces), await self.take(2 << 20))
        await self.protocol.lost
        self.assertEqual([ConnectionDone], self.protocol.reasons)

    async def test_losing_the_connection_sends_what_is_queued_first(self) -> None:
        self.transport.write_segments([b"header", self.span()])
        self.transport.loseConnection()
        self.assertTrue(await self.take(LENGTH + 100) == b"header" + CONTENT)
        await self.protocol.lost
        self.assertEqual([ConnectionDone], self.protocol.reasons)

    async def test_aborting_the_connection_sends_nothing_more(self) -> None:
        self.transport.write_segments([self.span()])
        self.transport.abortConnection()
        self.transport.abortConnection()
        await self.protocol.lost
        self.assertEqual([ConnectionAborted], self.protocol.reasons)
        taken = await self.take(LENGTH)
        self.assertTrue(taken == CONTENT[: len(taken)])
        self.assertLess(len(taken), LENGTH)

    async def test_a_write_after_an_abort_is_not_sent(self) -> None:
        self.transport.abortConnection()
        self.transport.write(b"too late")
        await self.protocol.lost
        self.assertEqual(b"", await self.take(100))

    async def test_a_peer_that_vanishes_is_noticed_but_not_within_a_write(self) -> None:
        producer = Pushing()
        self.transport.registerProducer(producer, True)
        self.peer.close()
        self.transport.write_segments([b"header", self.span()])
        self.assertEqual([], self.protocol.reasons)
        self.transport.write(b"more")
        await self.protocol.lost
        self.assertEqual(1, len(self.protocol.reasons))
        self.assertEqual("stop", producer.calls[-1])

    async def test_a_file_that_is_too_short_ends_the_connection_and_the_log_says_why(self) -> None:
        with capturedLogs() as events:
            self.transport.write_segments([b"header", self.span(LENGTH - 10, 100)])
        self.assertIn("no byte at", events[0]["reason"])
        self.assertEqual(b"header" + CONTENT[-10:], await self.take(1000))
        await self.protocol.lost
        self.assertEqual([ConnectionLost], self.protocol.reasons)

    async def test_a_turn_is_bounded_however_fast_the_peer_is(self) -> None:
        self.patch(module, "TURN", 1000)
        self.transport._allowance = 1000
        self.transport.write_segments([b"h" * 10, self.span(0, 5000)])
        self.assertEqual(1000, len(self.peer.recv(9000, socket.MSG_DONTWAIT)))
        self.assertEqual(4010, len(await self.take(4010)))

    async def test_what_is_sent_without_delay_is_not_looked_for_again(self) -> None:
        self.transport.bring = self.fail
        self.transport.write_segments([b"header", self.span()])
        self.assertTrue(await self.take(LENGTH + 6) == b"header" + CONTENT)

    def make_late(self) -> list[tuple[FileSpan, Deferred[None]]]:
        """All that waits for the peer is late from now on; what is to be brought, and when it is there."""
        brought: list[tuple[FileSpan, Deferred[None]]] = []

        def bring(span: FileSpan) -> Deferred[None]:
            brought.append((span, Deferred()))
            return brought[-1][1]

        self.patch(module, "LATE", -1.0)
        self.transport.bring = bring
        return brought

    async def test_what_the_peer_makes_wait_is_brought_before_it_is_sent(self) -> None:
        brought = self.make_late()
        self.transport.write_segments([b"header", self.span(0, LENGTH - 7), b"trailer"])
        taking = self.take(LENGTH + 6)
        expected = 0
        while not taking.called:
            if expected < len(brought):
                (span, there) = brought[expected]
                self.assertLessEqual(span.length, module.SEND_BUFFER)
                await deferLater(reactor, 0.005)
                self.assertEqual(expected + 1, len(brought))
                expected += 1
                there.callback(None)
            await deferLater(reactor, 0)
        self.assertTrue(await taking == b"header" + CONTENT[:-7] + b"trailer")
        self.assertGreater(expected, 0)

    def test_no_more_than_was_brought_is_sent_in_a_turn(self) -> None:
        brought = self.make_late()
        self.patch(module, "SEND_BUFFER", 1000)
        self.peer.setblocking(False)
        self.transport._allowance = 0
        self.transport.write_segments([self.span()])
        for turn in range(3):
            self.assertIsNone(self.transport.doWrite())
            span, there = brought[turn]
            self.assertEqual((turn * 1000, 1000), (span.offset, span.length))
            self.assertRaises(BlockingIOError, self.peer.recv, 9000)
            there.callback(None)
            self.assertIsNone(self.transport.doWrite())
            taken = self.peer.recv(9000)
            self.assertEqual(CONTENT[turn * 1000 : (turn + 1) * 1000], taken)

    async def test_what_is_still_at_hand_is_sent_though_it_is_late(self) -> None:
        self.make_late()
        asked: list[FileSpan] = []
        self.transport.bring = asked.append
        self.transport.write_segments([b"header", self.span(), b"trailer"])
        self.assertTrue(await self.take(LENGTH + 13) == b"header" + CONTENT + b"trailer")
        self.assertTrue(asked)

    async def test_what_cannot_be_brought_ends_the_connection_and_the_log_says_why(self) -> None:
        brought = self.make_late()
        self.transport.write_segments([b"header", self.span()])
        taking = self.take(LENGTH)
        while not brought:
            await deferLater(reactor, 0)
        with capturedLogs() as events:
            brought[0][1].errback(ReadError("the disk is gone"))
            await self.protocol.lost
        self.assertEqual([ConnectionLost], self.protocol.reasons)
        self.assertIn("the disk is gone", events[0]["reason"])
        self.assertLess(len(await taking), LENGTH)

    async def test_the_end_of_the_connection_cancels_what_is_brought(self) -> None:
        brought = self.make_late()
        self.transport.write_segments([b"header", self.span()])
        taking = self.take(LENGTH)
        while not brought:
            await deferLater(reactor, 0)
        self.transport.loseConnection()
        await deferLater(reactor, 0.005)
        self.assertEqual([], self.protocol.reasons)
        self.transport.abortConnection()
        self.assertTrue(brought[0][1].called)
        await self.protocol.lost
        self.assertLess(len(await taking), LENGTH)

    async def test_half_closing_sends_what_is_queued_and_still_receives(self) -> None:
        self.transport.write_segments([b"header", self.span()])
        self.transport.loseWriteConnection()
        self.assertEqual(LENGTH + 6, len(await self.take(LENGTH + 100)))
        self.peer.sendall(b"still here")
        while self.protocol.data != b"still here":
            await deferLater(reactor, 0.001)
        self.transport.write(b"nothing")
        await deferLater(reactor, 0.02)
        self.assertEqual([], self.protocol.reasons)

    async def test_a_paused_transport_does_not_read(self) -> None:
        self.transport.pauseProducing()
        self.peer.sendall(b"request")
        await deferLater(reactor, 0.02)
        self.assertEqual(b"", self.protocol.data)
        self.transport.resumeProducing()
        while self.protocol.data != b"request":
            await deferLater(reactor, 0.001)
