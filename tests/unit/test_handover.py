"""What a daemon gives to the next one arrives whole, or is closed."""

from __future__ import annotations

import json
import os
import socket
from pathlib import Path

from hypothesis import given, settings
from hypothesis import strategies as st
from twisted.internet.defer import Deferred
from twisted.internet.testing import MemoryReactor
from twisted.trial.unittest import SynchronousTestCase

from erofs_twisted import handover
from erofs_twisted.handover import TAKE, Handover, give, make_line, on_take, take
from erofs_twisted.interfaces import HandedConnection, HandedDevice


def open_files() -> int:
    return len(os.listdir("/proc/self/fd"))


class HandoverTests(SynchronousTestCase):
    def setUp(self) -> None:
        self.ours, self.theirs = make_line()
        self.addCleanup(self.ours.close)
        self.addCleanup(self.theirs.close)
        self.reactor = MemoryReactor()

    def run_readers(self) -> None:
        """As a reactor does, until nobody wants to read any more."""
        for _ in range(1000):
            if not self.reactor.readers:
                return
            for reader in list(self.reactor.readers):
                if (why := reader.doRead()) is not None:
                    self.reactor.removeReader(reader)
                    reader.connectionLost(why)
        raise AssertionError("it does not end")

    def taken(self) -> Handover | None:
        taking = take(self.reactor, self.theirs)
        self.run_readers()
        return self.successResultOf(taking)

    def device(self, path: str, requests: bytes = b"", text: str = "") -> HandedDevice:
        ours, theirs = socket.socketpair()
        self.addCleanup(theirs.close)
        file = Path(self.mktemp())
        file.write_text(text)
        descriptor = os.open(file, os.O_RDONLY)
        connection = HandedConnection(sock=ours, requests=requests, structured=True)
        return HandedDevice(
            path=path,
            size=8192,
            identifier="me",
            connections=[connection],
            facts={"made": True},
            files={"lock": descriptor},
        )

    @settings(deadline=None, max_examples=25)
    @given(st.lists(st.tuples(st.binary(max_size=8000), st.text(max_size=9)), max_size=70))
    def test_all_arrives_with_its_own_files_also_after_the_sender_has_ended(
        self, contents: list[tuple[bytes, str]]
    ) -> None:
        self.setUp()
        given = {
            f"/dev/nbd{number}": self.device(f"/dev/nbd{number}", requests, str(number) + text.strip("\r"))
            for number, (requests, text) in enumerate(contents)
        }
        listening = socket.socket(socket.AF_UNIX)
        sent = Handover(4711, given, listening)
        give(self.ours, sent)
        self.ours.close()
        found = self.taken()
        assert found is not None and found.port is not None
        try:
            self.assertEqual((4711, [*given]), (found.pid, [*found.devices]))
            self.assertFalse(found.port.get_inheritable())
            for path, device in found.devices.items():
                (connection,), (before,) = device.connections, given[path].connections
                self.assertEqual(before.requests, connection.requests)
                self.assertEqual(os.fstat(before.sock.fileno()), os.fstat(connection.sock.fileno()))
                self.assertEqual((8192, "me", {"made": True}), (device.size, device.identifier, device.facts))
                same = os.fstat(given[path].files["lock"]).st_ino
                self.assertEqual(same, os.fstat(device.files["lock"]).st_ino)
        finally:
            found.close()
            sent.close()
            self.theirs.close()

    def test_a_daemon_that_ends_without_a_word_has_given_nothing(self) -> None:
        before = open_files()
        device = self.device("/dev/nbd0")
        handover._send(self.ours, *handover._encode(device))
        Handover(devices={"/dev/nbd0": device}).close()
        self.ours.close()
        self.assertIsNone(self.taken())
        self.theirs.close()
        self.assertEqual(before - 1, open_files(), "but for the other end of its connection")

    def test_what_another_version_gives_is_closed_and_said(self) -> None:
        self.patch(handover, "VERSION", 2)
        device = self.device("/dev/nbd0")
        give(self.ours, Handover(1, {"/dev/nbd0": device}))
        self.ours.close()
        self.patch(handover, "VERSION", 1)
        before = open_files()
        self.assertIsNone(self.taken())
        self.assertEqual(before - 1, open_files())

    def test_rubbish_is_nothing(self) -> None:
        for data in (b"\n", b"[]\n", b'{"version": 1}\n', b'{"descriptors": 3}\n', b"\xff\n"):
            self.setUp()
            self.ours.send(data)
            self.ours.close()
            self.assertIsNone(self.taken(), data)

    def test_to_give_up_waiting_is_to_have_nothing(self) -> None:
        taking = take(self.reactor, self.theirs)
        self.assertEqual(TAKE, self.ours.recv(100))
        self.assertNoResult(taking)
        taking.cancel()
        self.assertIsNone(self.successResultOf(taking))
        self.assertEqual([], [*self.reactor.readers])

    def test_the_one_before_is_told_that_there_is_a_next_one(self) -> None:
        told: list[None] = []
        on_take(self.reactor, self.ours, lambda: told.append(None))
        (reader,) = self.reactor.readers
        self.assertIsNone(reader.doRead())
        self.assertEqual([], told)
        taking: Deferred[Handover | None] = take(self.reactor, self.theirs)
        self.assertIsNone(reader.doRead())
        self.assertEqual([None], told)
        taking.cancel()

    def test_a_message_is_one_line(self) -> None:
        give(self.ours, Handover(3))
        self.assertEqual(
            {"version": 1, "end": 3, "descriptors": 0}, json.loads(self.theirs.recv(1000).decode())
        )
