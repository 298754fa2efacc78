"""How much is taken at once, what a client that stalls or vanishes meets, and who may call in between."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable

from twisted.internet.defer import Deferred, succeed
from twisted.internet.error import ConnectionLost
from twisted.internet.testing import StringTransport
from twisted.python.failure import Failure
from twisted.trial.unittest import SynchronousTestCase

from erofs_twisted.interfaces import FileSpan, Segment
from erofs_twisted.nbd.errors import WireError
from erofs_twisted.nbd.handshake import Agreed, Handshake
from erofs_twisted.nbd.pages import DiskReaders
from erofs_twisted.nbd.protocol import NBDServerProtocol
from erofs_twisted.nbd.serving import BATCH, MAX_BACKLOG, MAX_BYTES, MAX_REQUESTS, SMALL
from erofs_twisted.nbd.wire import REQUEST, Command, Option, OptionReply
from tests.exports import BytesExport, FileExport, SlowExport
from tests.nbd_client import Client, Reply, option, read, request, types
from tests.unit.threadless import ThreadlessReactor

CONTENT = bytes(range(256)) * 256


def reads(count: int, length: int = 256) -> list[bytes]:
    return [read(each * 256 % 65536, length, cookie=each) for each in range(count)]


class BackpressureTests(SynchronousTestCase):
    """In both directions."""

    def test_no_request_is_taken_while_the_client_takes_no_replies(self) -> None:
        client = Client.kernel(BytesExport(CONTENT))
        sent = reads(128)
        client.transport.producer.pauseProducing()
        client.send(*sent)
        self.assertEqual(b"", client.received())
        client.transport.producer.resumeProducing()
        self.assertEqual(list(range(128)), [reply.cookie for reply in client.replies(*sent)])

    def test_a_client_that_floods_while_it_takes_no_replies_is_not_read_from(self) -> None:
        client = Client.kernel(BytesExport(CONTENT))
        client.transport.producer.pauseProducing()
        sent = reads(MAX_BACKLOG // REQUEST.size)
        client.send(*sent)
        self.assertEqual("producing", client.transport.producerState)
        client.send(read(0, 256, cookie=4711))
        self.assertEqual("paused", client.transport.producerState)
        client.transport.producer.resumeProducing()
        self.assertEqual("producing", client.transport.producerState)
        self.assertEqual(len(sent) + 1, len(client.replies(*sent, read(0, 256, cookie=4711))))

    def test_only_so_many_requests_wait_for_the_export(self) -> None:
        export = SlowExport(CONTENT)
        client = Client.kernel(export)
        client.send(*reads(MAX_REQUESTS + 2))
        self.assertEqual(MAX_REQUESTS, len(export.reads))
        export.reads[7].finish()
        self.assertEqual(MAX_REQUESTS + 1, len(export.reads))

    def test_only_so_many_bytes_wait_for_the_export(self) -> None:
        export = SlowExport(b"")
        export.size = 1 << 40
        client = Client.kernel(export)
        client.send(*[read(0, MAX_BYTES // 2, cookie=each) for each in range(3)])
        self.assertEqual(2, len(export.reads))
        export.reads[1].fail(OSError("no"))
        self.assertEqual(3, len(export.reads))

    def test_small_replies_are_sent_together_but_not_all_of_them(self) -> None:
        writes: list[int] = []
        client = _watched(BytesExport(CONTENT), lambda data: writes.append(len(data)))
        client.send(*[read(0, 4096, cookie=each) for each in range(64)])
        self.assertEqual(64 * (4096 + 16), sum(writes))
        self.assertEqual(2, len(writes))
        self.assertLess(max(writes), BATCH + 8192)

    def test_after_disc_nothing_more_is_read_from_the_client(self) -> None:
        export = SlowExport(CONTENT)
        client = Client.kernel(export)
        client.send(read(0, 16), request(Command.DISC))
        self.assertEqual("paused", client.transport.producerState)


class EndTests(SynchronousTestCase):
    """Of a connection, by either side."""

    def test_a_client_that_vanishes_cancels_its_reads(self) -> None:
        export = SlowExport(CONTENT)
        client = Client.kernel(export)
        client.send(*reads(3), request(Command.CACHE, 0, 256))
        client.protocol.connectionLost(Failure(ConnectionLost()))
        self.assertEqual(4, export.cancelled)
        self.assertEqual(b"", client.received())

    def test_a_transport_that_stops_its_producer_cancels_the_reads_too(self) -> None:
        export = SlowExport(CONTENT)
        client = Client.kernel(export)
        client.send(*reads(3))
        client.transport.producer.stopProducing()
        self.assertEqual(3, export.cancelled)

    def test_withdrawing_refuses_what_is_under_way_and_closes(self) -> None:
        export = SlowExport(CONTENT)
        client = Client.kernel(export)
        client.send(*reads(2))
        client.protocol.shut_down()
        client.protocol.withdraw()
        self.assertEqual([WireError.ESHUTDOWN] * 2, [reply.error for reply in client.replies()])
        self.assertTrue(client.is_closed)
        self.assertIsNone(client.transport.producer)

    def test_shutting_down_closes_an_idle_client_at_once(self) -> None:
        client = Client.kernel(BytesExport(CONTENT))
        client.protocol.shut_down()
        self.assertTrue(client.is_closed)
        client.send(read(0, 16))
        self.assertEqual(b"", client.received())

    def test_a_connection_lost_during_a_read_has_no_more_replies(self) -> None:
        class Last(BytesExport):
            def read(self, offset: int, length: int) -> list[Segment]:
                client.protocol.connectionLost(Failure(ConnectionLost()))
                return super().read(offset, length)

        client = Client.kernel(Last(CONTENT))
        client.send(*reads(3), request(Command.DISC))
        self.assertEqual(b"", client.received())

    def test_shutting_down_during_the_handshake_refuses_options_until_withdrawn(self) -> None:
        client = Client.haggling([BytesExport(CONTENT)])
        client.protocol.shut_down()
        client.send(option(Option.LIST))
        self.assertEqual([OptionReply.ERR_SHUTDOWN], types(client.received()))
        self.assertFalse(client.is_closed)
        client.protocol.withdraw()
        self.assertTrue(client.is_closed)

    def test_whoever_waits_for_the_end_is_told_each_by_a_deferred_of_its_own(self) -> None:
        protocol = Client.kernel(BytesExport(CONTENT)).protocol
        early = [protocol.when_lost(), protocol.when_lost()]
        protocol.connectionLost(Failure(ConnectionLost()))
        for lost in [*early, protocol.when_lost()]:
            self.assertIsNone(self.successResultOf(lost))

    def test_an_ended_handshake_closes_and_ignores_what_still_comes(self) -> None:
        client = Client.haggling([BytesExport(CONTENT)])
        client.send(option(Option.ABORT))
        self.assertEqual([OptionReply.ACK], types(client.received()))
        client.send(option(Option.LIST))
        self.assertEqual(b"", client.received())
        self.assertTrue(client.is_closed)


class _Watched(StringTransport):
    """Calls ``written`` with whatever is written, from within the write."""

    def __init__(self, written: Callable[[bytes], object]) -> None:
        super().__init__()
        self._written = written

    def writeSequence(self, data: list[bytes]) -> None:
        super().writeSequence(data)
        self._written(b"".join(data))


def _watched(export: BytesExport, written: Callable[[bytes], object]) -> Client:
    client = Client.kernel(export)
    client.transport = _Watched(written)
    readers = DiskReaders(ThreadlessReactor(), lambda: client.pool)
    client.protocol = NBDServerProtocol(Agreed(export, structured=False, allocation=False), readers)
    client.protocol.makeConnection(client.transport)
    return client


class ReentrancyTests(SynchronousTestCase):
    """Calls that come while another one is still at work."""

    def test_reads_that_end_at_once_by_deferred_are_answered_in_order(self) -> None:
        class Prompt(BytesExport):
            def read(self, offset: int, length: int) -> Deferred[list[Segment]]:  # type: ignore[override]
                return succeed(super().read(offset, length))

        client = Client.kernel(Prompt(CONTENT))
        sent = reads(1000)
        self.assertEqual(list(range(1000)), [reply.cookie for reply in client.exchange(*sent)])

    def test_a_read_that_ends_others_does_not_mix_their_replies(self) -> None:
        class Chained(SlowExport):
            def read(self, offset: int, length: int) -> Deferred[list[Segment]]:  # type: ignore[override]
                for earlier in self.reads:
                    earlier.finish()
                self.reads.clear()
                return super().read(offset, length)

        client = Client.kernel(Chained(CONTENT))
        sent = reads(500)
        self.assertEqual(list(range(499)), [reply.cookie for reply in client.exchange(*sent)])

    def test_requests_that_arrive_during_a_write_are_served(self) -> None:
        late = [read(0, 1, cookie=99)]

        def written(_: bytes) -> None:
            if late:
                client.send(late.pop())

        client = _watched(BytesExport(CONTENT), written)
        client.send(*reads(3))
        self.assertEqual([0, 1, 2, 99], [r.cookie for r in client.replies(*reads(3), read(0, 1, cookie=99))])

    def test_a_pause_during_a_write_stops_the_requests_that_follow(self) -> None:
        client = _watched(
            BytesExport(CONTENT),
            lambda _: client.transport.producer and client.transport.producer.pauseProducing(),
        )
        many = [read(0, 65536, cookie=each) for each in range(8)]
        client.send(*many)
        self.assertEqual([0, 1], [reply.cookie for reply in client.replies(*many)])

    def test_a_connection_lost_during_the_last_write_is_not_closed_once_more(self) -> None:
        client = _watched(
            BytesExport(CONTENT), lambda _: client.protocol.connectionLost(Failure(ConnectionLost()))
        )
        client.send(read(0, 16), request(Command.DISC))
        self.assertFalse(client.is_closed)

    def test_a_connection_lost_during_a_write_ends_the_requests_that_follow(self) -> None:
        client = _watched(
            BytesExport(CONTENT), lambda _: client.protocol.connectionLost(Failure(ConnectionLost()))
        )
        many = [read(0, 65536, cookie=each) for each in range(8)]
        client.send(*many)
        self.assertEqual([0, 1], [reply.cookie for reply in client.replies(*many)])


class FileSpanTests(SynchronousTestCase):
    """Spans of files, on a transport that takes only bytes."""

    def setUp(self) -> None:
        descriptor, self.path = tempfile.mkstemp()
        self.addCleanup(os.unlink, self.path)
        os.write(descriptor, CONTENT)
        os.close(descriptor)
        self.export = FileExport(self.path)
        self.addCleanup(self.export.close)

    def test_spans_are_read_whatever_their_length(self) -> None:
        client = Client.kernel(self.export)
        for length in (1, SMALL, SMALL + 1, len(CONTENT)):
            self.assertEqual([Reply(1, content=CONTENT[:length])], client.exchange(read(0, length)))

    def test_spans_and_bytes_make_one_content(self) -> None:
        export = self.export

        class Mixed(BytesExport):
            def read(self, offset: int, length: int) -> list[Segment]:
                return [b"<", FileSpan(export.fd, 10, length - 2), b">"]

        client = Client.kernel(Mixed(CONTENT))
        self.assertEqual([Reply(1, content=b"<" + CONTENT[10:20] + b">")], client.exchange(read(0, 12)))

    def test_a_file_that_has_become_shorter_is_eio_without_content(self) -> None:
        os.truncate(self.path, 100)
        client = Client.structured(self.export)
        client.send(read(50, 100))
        client.pool.run()
        (reply,) = client.replies()
        self.assertEqual((WireError.EIO, b""), (reply.error, reply.content))


class HandoverTests(SynchronousTestCase):
    def test_requests_that_come_along_with_go_are_served(self) -> None:
        client = Client(Handshake([BytesExport(CONTENT)]))
        client.received()
        export_name = option(Option.EXPORT_NAME)
        client.send(b"\0\0\0\3", export_name, read(0, 16))
        self.assertEqual(CONTENT[:16], client.received()[-16:])


class HandingOverTests(SynchronousTestCase):
    """A client goes on with another server."""

    def hand_over(self, client: Client) -> bytes | None:
        serving = client.protocol._serving
        assert serving is not None
        return serving.hand_over()

    def test_when_all_is_answered_nothing_is_left_to_answer(self) -> None:
        export = SlowExport(CONTENT)
        client = Client.kernel(export)
        client.send(read(0, 256, cookie=1))
        holding = client.protocol.hold()
        self.assertNoResult(holding)
        export.reads[0].finish()
        self.successResultOf(holding)
        self.assertEqual(16 + 256, len(client.received()))
        self.assertEqual(b"", self.hand_over(client))

    def test_what_is_not_answered_is_handed_over_as_it_was_sent(self) -> None:
        export = SlowExport(CONTENT)
        client = Client.kernel(export)
        asked = [read(256, 256, cookie=1), request(Command.CACHE, 512, 256, cookie=2)]
        client.send(*asked)
        _ = client.protocol.hold()
        part = read(1024, 256, cookie=3)
        client.send(part, part[:10])
        handed = self.hand_over(client)
        assert handed is not None
        self.assertEqual(b"".join([*asked, part, part[:10]]), handed)
        self.assertEqual((2, b""), (export.cancelled, client.received()))
        follower = Client.kernel(BytesExport(CONTENT))
        self.assertEqual(handed + part[10:], b"".join([*asked, part, part]))
        answers = follower.exchange(*asked, part, part)
        self.assertEqual([1, 2, 3, 3], [reply.cookie for reply in answers])

    def test_no_request_is_taken_once_it_is_held(self) -> None:
        export = SlowExport(CONTENT)
        client = Client.kernel(export)
        self.successResultOf(client.protocol.hold())
        self.assertEqual("paused", client.transport.producerState)
        client.send(read(0, 256, cookie=1))
        self.assertEqual([], export.reads)

    def test_a_client_in_the_middle_of_a_reply_cannot_be_handed_over(self) -> None:
        client = Client.kernel(BytesExport(CONTENT))
        client.transport.producer.pauseProducing()
        holding = client.protocol.hold()
        self.assertNoResult(holding)
        self.assertIsNone(self.hand_over(client))
        client.transport.producer.resumeProducing()
        self.successResultOf(holding)
        self.assertEqual(b"", self.hand_over(client))

    def test_nor_one_in_the_middle_of_a_request_that_is_refused_or_that_leaves(self) -> None:
        for sent in (request(Command.WRITE, 0, 512, cookie=1) + bytes(100), request(Command.DISC, 0, 0)):
            export = SlowExport(CONTENT)
            client = Client.kernel(export)
            client.send(read(0, 256, cookie=7), sent)
            _ = client.protocol.hold()
            self.assertIsNone(self.hand_over(client))
