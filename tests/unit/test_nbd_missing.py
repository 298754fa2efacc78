"""Reads of what is on disk and not in memory, in the transmission phase."""

from __future__ import annotations

import errno
import os
import tempfile
from collections.abc import Sequence
from typing import Any

from twisted.internet.error import ConnectionLost
from twisted.internet.testing import StringTransport
from twisted.logger import capturedLogs
from twisted.python.failure import Failure
from twisted.trial.unittest import SynchronousTestCase
from zope.interface import implementer

from erofs_twisted.interfaces import FileSpan
from erofs_twisted.nbd.errors import WireError
from erofs_twisted.nbd.pages import THREADS_PER_DISK
from erofs_twisted.nbd.serving import MAX_REQUESTS, SMALL
from erofs_twisted.nbd.transport import ISpanTransport, Sendable
from erofs_twisted.nbd.wire import SIMPLE_REPLY
from tests.exports import FileExport
from tests.nbd_client import Client, Reply, read

CONTENT = bytes(range(256)) * 256
SIZE = 1 << 20
MISSING = SIZE // 2
"""From here on nothing is in memory."""


class MissingPagesTests(SynchronousTestCase):
    """Of a file whose second half, a hole, has never been read."""

    def setUp(self) -> None:
        descriptor, path = tempfile.mkstemp()
        os.write(descriptor, CONTENT)
        os.truncate(descriptor, SIZE)
        os.close(descriptor)
        self.export = FileExport(path)
        self.addCleanup(self.export.close)
        os.unlink(path)
        self.read_in: list[tuple[int, int]] = []
        self.disk_error: OSError | None = None
        self.real_preadv = os.preadv
        self.patch(os, "preadv", self.preadv)

    def preadv(self, fd: int, buffers: Sequence[Any], offset: int, flags: int = 0) -> int:
        """A hole costs no disk, so a file system may fill it in at once; here it is to be a disk's matter."""
        if flags:
            if offset + sum(map(len, buffers)) > MISSING:
                raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN))
        else:
            self.read_in.append((offset, sum(map(len, buffers))))
            if self.disk_error:
                raise self.disk_error
        return self.real_preadv(fd, buffers, offset, flags)

    def test_a_read_of_what_is_missing_waits_for_a_thread_and_others_overtake_it(self) -> None:
        client = Client.kernel(self.export)
        slow, quick = read(MISSING, 512, cookie=1), read(256, 512, cookie=2)
        self.assertEqual([Reply(2, content=CONTENT[256:768])], client.exchange(slow, quick))
        self.assertEqual([Reply(2, content=CONTENT[256:768])], client.exchange(quick))
        client.pool.run()
        self.assertEqual([Reply(1, content=bytes(512))], client.replies(slow))
        self.assertEqual([(MISSING, 512)], self.read_in)

    def test_a_read_of_which_a_part_is_missing_is_answered_in_full(self) -> None:
        client = Client.structured(self.export)
        client.send(read(0, SIZE))
        self.assertEqual(b"", client.received())
        client.pool.run()
        (reply,) = client.replies()
        self.assertTrue(reply.content == CONTENT + bytes(SIZE - len(CONTENT)))

    def test_reads_that_wait_for_a_disk_are_among_those_that_are_limited(self) -> None:
        client = Client.kernel(self.export)
        client.send(*[read(MISSING, 1, cookie=each) for each in range(MAX_REQUESTS)], read(0, 1, cookie=4711))
        self.assertEqual(b"", client.received())
        client.pool.work.pop(0)()
        self.assertEqual(
            {0, 4711},
            {reply.cookie for reply in client.replies(read(0, 1, cookie=0), read(0, 1, cookie=4711))},
        )

    def test_what_a_disk_refuses_is_an_error_to_the_client_and_a_line_in_the_log(self) -> None:
        self.disk_error = OSError(errno.EIO, os.strerror(errno.EIO))
        client = Client.structured(self.export)
        with capturedLogs() as events:
            client.send(read(MISSING, 512, cookie=1))
            client.pool.run()
        (reply,) = client.replies()
        self.assertEqual((1, WireError.EIO), (reply.cookie, reply.error))
        self.assertIn("Input/output error", reply.message)
        (event,) = [each for each in events if "reason" in each]
        self.assertEqual(
            (MISSING, 512, self.export.name), (event["offset"], event["length"], event["export"])
        )
        self.assertIn("Input/output error", event["reason"])
        self.assertFalse(client.is_closed)
        self.assertEqual(
            [Reply(2, content=CONTENT[:9], offset=0, structured=True)], client.exchange(read(0, 9, cookie=2))
        )

    def test_a_client_that_vanishes_has_nothing_more_read_for_it(self) -> None:
        client = Client.kernel(self.export)
        client.send(*[read(MISSING, 1, cookie=each) for each in range(THREADS_PER_DISK + 5)])
        client.protocol.connectionLost(Failure(ConnectionLost()))
        client.pool.run()
        self.assertEqual(THREADS_PER_DISK, len(self.read_in))
        self.assertEqual(b"", client.received())

    def test_a_server_that_shuts_down_waits_for_a_disk_no_longer_than_it_is_told(self) -> None:
        client = Client.kernel(self.export)
        client.send(read(MISSING, 1))
        client.protocol.shut_down()
        self.assertFalse(client.is_closed)
        client.protocol.withdraw()
        self.assertEqual([WireError.ESHUTDOWN], [reply.error for reply in client.replies()])
        self.assertTrue(client.is_closed)

    def test_long_spans_leave_as_spans_once_they_are_read_in(self) -> None:
        client = Client.kernel(self.export)
        transport = SegmentTransport()
        client.protocol = type(client.protocol)(client.protocol._opening, client.protocol._readers)
        client.protocol.makeConnection(transport)
        client.send(read(MISSING, SMALL + 1, cookie=1), read(0, SMALL + 1, cookie=2))
        there = FileSpan(self.export.fd, 0, SMALL + 1)
        self.assertEqual([there], transport.spans())
        client.pool.run()
        self.assertEqual([there, FileSpan(self.export.fd, MISSING, SMALL + 1)], transport.spans())
        self.assertEqual(2 * SIMPLE_REPLY.size, len(transport.value()))


@implementer(ISpanTransport)
class SegmentTransport(StringTransport):
    """Keeps spans apart from bytes."""

    def __init__(self) -> None:
        super().__init__()
        self.segments: list[Sendable] = []

    def write_segments(self, segments: Sequence[Sendable]) -> None:
        self.segments += segments
        self.write(b"".join(each for each in segments if not isinstance(each, FileSpan)))

    def spans(self) -> list[FileSpan]:
        return [each for each in self.segments if isinstance(each, FileSpan)]
