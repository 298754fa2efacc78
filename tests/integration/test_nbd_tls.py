"""The same protocol on a transport of Twisted's that takes nothing but bytes: TLS, over TCP on loopback."""

from __future__ import annotations

import os
import socket
import ssl
import struct
import tempfile
from pathlib import Path

from twisted.internet import reactor
from twisted.internet.defer import Deferred
from twisted.internet.endpoints import serverFromString
from twisted.internet.protocol import Factory
from twisted.internet.threads import deferToThread
from twisted.trial.unittest import TestCase

from erofs_twisted.nbd.handshake import Handshake
from erofs_twisted.nbd.pages import DiskReaders
from erofs_twisted.nbd.protocol import NBDServerProtocol
from erofs_twisted.nbd.serving import SMALL
from erofs_twisted.nbd.transport import ISpanTransport
from erofs_twisted.nbd.wire import GREETING, Option
from tests.certificates import issue, make_authority, pem
from tests.exports import FileExport
from tests.nbd_client import client_flags, option, read, simple_replies

CONTENT = os.urandom(1 << 20) * 8
LENGTHS = {0: 1, 1: 4096, 2: SMALL, 3: SMALL + 1, 4: 128 << 10, 5: len(CONTENT)}


def make_export(path: Path) -> FileExport:
    path.write_bytes(CONTENT)
    return FileExport(str(path))


class TLSTests(TestCase):
    timeout = 60

    async def setUp(self) -> None:
        directory = tempfile.TemporaryDirectory()
        self.addCleanup(directory.cleanup)
        authority = make_authority("an authority for tests")
        chain, key = issue(authority, ["localhost"], Path(directory.name))
        self.export = make_export(Path(directory.name, "blob"))
        self.addCleanup(self.export.close)
        self.readers = DiskReaders(reactor)
        self.addCleanup(lambda: Deferred.fromCoroutine(self.readers.stop()))
        self.protocols: list[NBDServerProtocol] = []
        endpoint = serverFromString(reactor, f"ssl:0:interface=127.0.0.1:privateKey={key}:certKey={chain}")
        port = await endpoint.listen(Factory.forProtocol(self.make_protocol))
        self.addCleanup(port.stopListening)
        self.address = ("127.0.0.1", port.getHost().port)
        self.trust = ssl.create_default_context(cadata=pem(authority[1]).decode())

    def make_protocol(self) -> NBDServerProtocol:
        self.protocols.append(NBDServerProtocol(Handshake([self.export]), self.readers))
        return self.protocols[-1]

    def read_all_lengths(self) -> bytes:
        """Blocks: a handshake, then a read of each of `LENGTHS`; the replies."""
        plain = socket.create_connection(self.address, 30)
        with (
            self.trust.wrap_socket(plain, server_hostname="localhost") as client,
            client.makefile("rb") as incoming,
        ):
            incoming.read(GREETING.size)
            client.sendall(client_flags() + option(Option.EXPORT_NAME))
            size, _ = struct.unpack(">QH", incoming.read(10))
            assert size == len(CONTENT)
            client.sendall(b"".join(read(0, length, cookie=cookie) for cookie, length in LENGTHS.items()))
            return incoming.read(sum(LENGTHS.values()) + 16 * len(LENGTHS))

    async def check(self) -> None:
        replies = simple_replies(await deferToThread(self.read_all_lengths), LENGTHS)
        self.assertFalse(ISpanTransport.providedBy(self.protocols[0].transport))
        self.assertEqual(list(LENGTHS), [reply.cookie for reply in sorted(replies, key=lambda r: r.cookie)])
        self.assertTrue(all(reply.content == CONTENT[: LENGTHS[reply.cookie]] for reply in replies))
        await self.protocols[0].when_lost()

    async def test_reads_of_every_length_arrive_intact(self) -> None:
        await self.check()

    async def test_what_is_not_in_memory_arrives_intact_too(self) -> None:
        os.fsync(self.export.fd)
        os.posix_fadvise(self.export.fd, 0, 0, os.POSIX_FADV_DONTNEED)
        await self.check()
