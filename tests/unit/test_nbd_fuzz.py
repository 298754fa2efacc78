"""No client, however it errs and however its bytes are cut up, confuses the server."""

from __future__ import annotations

from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from twisted.internet.error import ConnectionLost
from twisted.python.failure import Failure
from twisted.trial.unittest import SynchronousTestCase

from erofs_twisted.errors import ReadError
from erofs_twisted.nbd.errors import FramingLost, WireError
from erofs_twisted.nbd.handshake import Agreed, Ended, Handshake
from erofs_twisted.nbd.serving import MAX_REQUESTS
from erofs_twisted.nbd.transmission import Transmission
from erofs_twisted.nbd.wire import Command, Option, OptionReply
from tests.exports import BytesExport, SlowExport
from tests.nbd_client import (
    Client,
    ask,
    client_flags,
    meta_context,
    option,
    option_answers,
    read,
    request,
    simple_replies,
    structured_replies,
)

CONTENT = bytes(range(256)) * 64
EXPORTS = [BytesExport(CONTENT, "app"), BytesExport(CONTENT[:4096], "base")]

names = st.sampled_from(["", "app", "base", "nope", "x" * 5000]) | st.text(max_size=20)
queries = st.lists(
    st.sampled_from(["base:allocation", "base:", "qemu:x", ""]) | st.text(max_size=9), max_size=4
)
haggling_options = st.one_of(
    st.builds(option, st.integers(3, 12), st.binary(max_size=40)),
    st.builds(option, st.integers(13, 0xFFFFFFFF), st.binary(max_size=100_000)),
    st.builds(ask, st.just(Option.INFO), names, st.lists(st.integers(0, 5), max_size=4)),
    st.builds(
        meta_context, st.sampled_from([Option.LIST_META_CONTEXT, Option.SET_META_CONTEXT]), names, queries
    ),
    st.just(option(Option.STRUCTURED_REPLY)),
)
numbers = st.integers(0, 5) | st.sampled_from([4096, len(CONTENT), 1 << 31, 0xFFFFFFFF])


@st.composite
def requests(draw: st.DrawFn) -> list[bytes]:
    """Requests of every kind, valid or not, each with a cookie of its own, each with its payload."""
    made = []
    for cookie in range(draw(st.integers(0, 12))):
        command = draw(st.integers(0, 9).filter(lambda number: number != Command.DISC))
        length = draw(st.integers(0, 300) if command == Command.WRITE else numbers | st.integers(0, 5000))
        flags = draw(st.sampled_from([0, 0, 0, 1, 4, 8, 0x8000]))
        offset = draw(numbers | st.integers(0, len(CONTENT)))
        payload = bytes(length) if command == Command.WRITE else b""
        made.append(request(command, offset, length, cookie=cookie, flags=flags) + payload)
    return made


def cut(data: bytes, lengths: list[int]) -> list[bytes]:
    """``data`` in pieces of ``lengths``, over and over; of one byte where there are none."""
    pieces = []
    while data:
        for length in lengths or [1]:
            pieces.append(data[:length])
            data = data[length:]
    return pieces


splits = st.lists(st.integers(1, 50), max_size=8)


class HandshakeFuzzTests(SynchronousTestCase):
    @given(data=st.binary(max_size=300), flags=st.booleans())
    def test_any_bytes_are_survived(self, data: bytes, flags: bool) -> None:
        Handshake(EXPORTS).receive(client_flags() + data if flags else data)

    @given(options=st.lists(haggling_options, max_size=8), last=names, lengths=splits)
    @settings(deadline=None)
    def test_pieces_make_no_difference(self, options: list[bytes], last: str, lengths: list[int]) -> None:
        sent = b"".join([client_flags(), *options, ask(Option.GO, last), b"what follows"])
        whole, pieces = Handshake(EXPORTS), Handshake(EXPORTS)
        expected = whole.receive(sent)
        self.assertEqual(expected, b"".join(pieces.receive(piece) for piece in cut(sent, lengths)))
        self.assertEqual(whole.outcome, pieces.outcome)
        if isinstance(whole.outcome, Agreed):
            self.assertEqual(b"what follows", pieces.rest)

    @given(options=st.lists(haggling_options, max_size=12))
    @settings(deadline=None)
    def test_every_option_has_one_last_reply_in_its_turn(self, options: list[bytes]) -> None:
        handshake = Handshake(EXPORTS)
        answers = option_answers(handshake.receive(b"".join([client_flags(), *options])))
        last = [
            number
            for number, reply, _ in answers
            if reply == OptionReply.ACK or reply >= OptionReply.ERR_UNSUP
        ]
        if handshake.outcome is None:
            self.assertEqual([int.from_bytes(each[8:12], "big") for each in options], last)
        else:
            self.assertNotIsInstance(handshake.outcome, Ended)


class TransmissionFuzzTests(SynchronousTestCase):
    @given(data=st.binary(max_size=300), structured=st.booleans())
    def test_any_bytes_are_requests_or_lost_framing(self, data: bytes, structured: bool) -> None:
        machine = Transmission(len(CONTENT), structured=structured)
        machine.feed(data)
        try:
            while machine.next_request() is not None:
                pass
        except FramingLost:
            return
        self.assertLess(machine.backlog, 28)

    @given(sent=requests(), lengths=splits, structured=st.booleans())
    @settings(deadline=None)
    def test_pieces_make_no_difference(self, sent: list[bytes], lengths: list[int], structured: bool) -> None:
        make = Client.structured if structured else Client.kernel
        whole, pieces = make(EXPORTS[0]), make(EXPORTS[0])
        whole.send(*sent)
        for piece in cut(b"".join(sent), lengths):
            pieces.send(piece)
        self.assertEqual(whole.received(), pieces.received())

    @given(sent=requests())
    @settings(deadline=None)
    def test_every_request_has_one_reply_and_content_is_right(self, sent: list[bytes]) -> None:
        client = Client.structured(EXPORTS[0])
        client.send(*sent)
        replies = structured_replies(client.received())
        self.assertEqual(list(range(len(sent))), [reply.cookie for reply in replies])
        for reply, asked in zip(replies, sent, strict=True):
            offset, length = int.from_bytes(asked[16:24], "big"), int.from_bytes(asked[24:28], "big")
            if reply.content:
                self.assertEqual((offset, CONTENT[offset : offset + length]), (reply.offset, reply.content))
            self.assertIn(reply.error, {0, *WireError})


class Conversation(RuleBasedStateMachine):
    """A client, the export's pace, and a transport that pauses and resumes, in any order."""

    @initialize(structured=st.booleans())
    def connect(self, structured: bool) -> None:
        self.structured = structured
        self.export = SlowExport(CONTENT)
        self.client = (Client.structured if structured else Client.kernel)(self.export)
        self.asked: dict[int, tuple[int, int]] = {}
        self.answered: set[int] = set()
        self.gone = False

    @precondition(lambda self: not self.gone)
    @rule(count=st.sampled_from([1, 1, 2, 40, 150]), offset=st.integers(0, 8000), length=st.integers(1, 8000))
    def ask(self, count: int, offset: int, length: int) -> None:
        sent = []
        for _ in range(count):
            cookie = len(self.asked)
            self.asked[cookie] = (offset, length)
            sent.append(read(offset, length, cookie=cookie))
        self.client.send(*sent)

    @precondition(lambda self: self.export.reads and not self.gone)
    @rule(data=st.data(), fails=st.booleans())
    def end_a_read(self, data: Any, fails: bool) -> None:
        ended = self.export.reads.pop(data.draw(st.integers(0, len(self.export.reads) - 1)))
        if fails:
            ended.fail(ReadError("no"))
        else:
            ended.finish()

    @precondition(lambda self: not self.gone)
    @rule()
    def pause(self) -> None:
        self.client.transport.producer.pauseProducing()

    @precondition(lambda self: not self.gone)
    @rule()
    def resume(self) -> None:
        self.client.transport.producer.resumeProducing()

    @precondition(lambda self: not self.gone)
    @rule()
    def vanish(self) -> None:
        self.gone = True
        under_way = len(self.export.reads)
        self.client.protocol.connectionLost(Failure(ConnectionLost()))
        assert self.export.cancelled == under_way
        assert self.client.received() == b""

    @precondition(lambda self: self.gone)
    @rule(structured=st.booleans())
    def come_back(self, structured: bool) -> None:
        self.connect(structured)

    @invariant()
    def replies_are_right(self) -> None:
        if not hasattr(self, "client"):
            return
        assert len(self.export.reads) <= MAX_REQUESTS
        data = self.client.received()
        lengths = {cookie: length for cookie, (_, length) in self.asked.items()}
        for reply in structured_replies(data) if self.structured else simple_replies(data, lengths):
            assert reply.cookie not in self.answered
            self.answered.add(reply.cookie)
            offset, length = self.asked[reply.cookie]
            if reply.error:
                assert reply.error == WireError.EIO
            else:
                assert reply.content == CONTENT[offset : offset + length]

    def teardown(self) -> None:
        if not hasattr(self, "client") or self.gone:
            return
        self.client.transport.producer.resumeProducing()
        while self.export.reads:
            self.export.reads.pop().finish()
        self.replies_are_right()
        assert self.answered == set(self.asked), "every request is answered in the end"


class ConversationTests(SynchronousTestCase):
    def test_whatever_the_order_of_events_each_request_has_one_right_answer(self) -> None:
        run_state_machine_as_test(
            Conversation, settings=settings(max_examples=60, stateful_step_count=30, deadline=None)
        )
