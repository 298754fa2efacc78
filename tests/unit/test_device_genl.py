"""Netlink messages, as bytes that the kernel takes and sent."""

from __future__ import annotations

import contextlib
import errno
import sys

from hypothesis import given
from hypothesis import strategies as st
from twisted.trial.unittest import SynchronousTestCase

from erofs_twisted.device.genl import (
    Ack,
    MalformedMessage,
    Reply,
    attribute,
    encode_get_family,
    encode_request,
    nested,
    parse_attributes,
    parse_family_id,
    parse_messages,
)
from erofs_twisted.device.uapi import (
    Command,
    Connection,
    encode_index,
    encode_reconfigure,
    parse_index,
    parse_status,
)

# Answers of Linux 6.1, x86_64.
FAMILY_REPLY = bytes.fromhex(
    "b40000001000000001000000030300000102000008000200 6e626400060001001a000000 0800030001000000"
    "0800040000000000 080005000a000000 54000600 140001000800010001000000080002000a000000"
    "140002000800010002000000080002000a000000 140003000800010003000000080002000a000000"
    "140004000800010005000000080002000a000000"
    "24000700 20000100 0800020003000000 11000100 6e62645f6d635f67726f757000000000"
)
FAMILY_ACK = bytes.fromhex("240000000200000101000000030300000000 00001c000000100005000100000000000000")
STATUS_REPLY = bytes.fromhex(
    "400000001a000000030000000303000005010000 2c000900 14000100 0800010003000000 0500020000000000"
    "14000100 0800010010000000 0500020001000000"
)
NO_SUCH_FAMILY = bytes.fromhex("240000000200000101000000 03030000 feffffff 20000000100005000100000000000000")
WITH_REASON = bytes.fromhex(
    "80000000020000030600000003030000 deffffff 240000001a0005000600000000000000"
    "27000100 417474726962757465206661696c656420706f6c6963792076616c69646174696f6e0000"
    "08000200 1c000000 2c000480 04000b00 0c000400 0000000000000000 04000b00 0c000500 ffffffff00000000"
    "08000100 04000000"
)
CONNECT = bytes.fromhex(
    "700000001f00050002000000 00000000 01010000 0c00020000001000 00000000 0c00030000100000 00000000"
    "0c00040000000000 00000000 0c00050003000000 00000000 0c0008002c010000 00000000"
    "0e000a00 7368613235363a6162 000000 10000780 0c000180 0800010007000000"
)
CONNECTION = Connection(
    sockets=[7],
    size=1 << 20,
    block_size=4096,
    server_flags=3,
    timeout=0,
    dead_conn_timeout=300,
    backend_identifier="sha256:ab",
)

payloads = st.binary(max_size=40)
kinds = st.integers(0, 0x3FFF)


class LittleEndianTestCase(SynchronousTestCase):
    if sys.byteorder != "little":
        skip = "the recorded bytes are a little-endian machine's"


class RequestTests(LittleEndianTestCase):
    def test_connect_has_all_that_makes_a_device(self) -> None:
        self.assertEqual(CONNECT, encode_request(31, Command.CONNECT, 1, 2, CONNECTION.encode()))

    def test_a_family_is_asked_for_by_its_name(self) -> None:
        asked = "1c000000 1000 0500 01000000 00000000 03010000 08000200 6e626400"
        self.assertEqual(bytes.fromhex(asked), encode_get_family("nbd", 1))

    def test_disconnect_names_the_device(self) -> None:
        asked = "1c000000 1a00 0500 05000000 00000000 02010000 0800010003000000"
        self.assertEqual(bytes.fromhex(asked), encode_request(26, Command.DISCONNECT, 1, 5, encode_index(3)))

    def test_reconfigure_repeats_the_backend_identifier(self) -> None:
        fields = dict(parse_attributes(encode_reconfigure(3, [8, 9], "me")))
        self.assertEqual({1: b"\3\0\0\0", 10: b"me\0"}, {kind: fields[kind] for kind in (1, 10)})
        sockets = [parse_attributes(item) for _, item in parse_attributes(fields[7])]
        self.assertEqual([[(1, b"\x08\0\0\0")], [(1, b"\x09\0\0\0")]], sockets)


class AnswerTests(LittleEndianTestCase):
    def test_the_controller_tells_a_familys_number(self) -> None:
        reply, ack = parse_messages(FAMILY_REPLY + FAMILY_ACK)
        assert isinstance(reply, Reply)
        self.assertEqual(26, parse_family_id(reply.attributes))
        self.assertEqual(Ack(1, 0), ack)

    def test_status_tells_which_devices_are_in_use(self) -> None:
        (reply,) = parse_messages(STATUS_REPLY)
        assert isinstance(reply, Reply)
        self.assertEqual(Command.STATUS, reply.command)
        self.assertEqual({3: False, 16: True}, parse_status(reply.attributes))

    def test_a_refusal_has_its_errno(self) -> None:
        self.assertEqual([Ack(1, errno.ENOENT)], parse_messages(NO_SUCH_FAMILY))

    def test_a_refusal_has_the_kernels_reason(self) -> None:
        self.assertEqual(
            [Ack(6, errno.ERANGE, "Attribute failed policy validation")], parse_messages(WITH_REASON)
        )

    def test_a_reason_comes_after_the_request_where_that_is_repeated(self) -> None:
        whole_request = encode_request(26, 1, 1, 6, attribute(3, b"abcde"))
        reason = attribute(1, b"because\0")
        body = (-errno.EINVAL).to_bytes(4, "little", signed=True) + whole_request + reason
        header = bytes.fromhex("02000002 06000000 00000000")
        message = (16 + len(body)).to_bytes(4, "little") + header + body
        self.assertEqual([Ack(6, errno.EINVAL, "because")], parse_messages(message))

    def test_connects_reply_has_the_index(self) -> None:
        self.assertEqual(12, parse_index(encode_index(12)))

    def test_a_reply_without_an_index_is_malformed(self) -> None:
        self.assertRaises(MalformedMessage, parse_index, b"")
        self.assertRaises(MalformedMessage, parse_index, attribute(1, b"\0" * 8))


class HostileBytesTests(SynchronousTestCase):
    @given(st.binary(max_size=200))
    def test_any_bytes_are_messages_or_malformed(self, content: bytes) -> None:
        for parse in (parse_messages, parse_attributes, parse_family_id, parse_index, parse_status):
            with contextlib.suppress(MalformedMessage):
                parse(content)

    @given(st.sampled_from([FAMILY_REPLY, STATUS_REPLY, WITH_REASON]), st.data())
    def test_damaged_messages_are_messages_or_malformed(self, message: bytes, data: st.DataObject) -> None:
        damaged = bytearray(message)
        for position in data.draw(st.lists(st.integers(0, len(message) - 1), max_size=4)):
            damaged[position] = data.draw(st.integers(0, 255))
        with contextlib.suppress(MalformedMessage):
            for found in parse_messages(bytes(damaged)):
                if isinstance(found, Reply):
                    parse_status(found.attributes)

    @given(st.lists(st.tuples(kinds, payloads), max_size=8))
    def test_attributes_are_what_they_were_made_of(self, fields: list[tuple[int, bytes]]) -> None:
        encoded = b"".join(attribute(kind, payload) for kind, payload in fields)
        self.assertEqual(fields, parse_attributes(encoded))
        self.assertEqual([(5, encoded)], parse_attributes(nested(5, encoded)))

    @given(st.integers(0, 255), st.integers(0, 2**32 - 1), payloads)
    def test_a_message_is_what_it_was_made_of(self, command: int, sequence: int, payload: bytes) -> None:
        attributes = attribute(1, payload)
        message = encode_request(26, command, 1, sequence, attributes)
        self.assertEqual([Reply(sequence, command, attributes)] * 2, parse_messages(message * 2))
