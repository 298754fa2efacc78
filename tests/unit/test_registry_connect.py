"""What is said to a proxy for a tunnel, and what it may answer."""

from __future__ import annotations

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st
from twisted.trial.unittest import SynchronousTestCase

from erofs_twisted.registry.connect import MAX_HEAD, ConnectReply, ReplyReader, connect_request
from erofs_twisted.registry.credentials import Credentials
from erofs_twisted.registry.errors import InvalidHeader

OPEN = b"HTTP/1.1 200 Connection established\r\n\r\n"


def read(*pieces: bytes) -> ConnectReply | None:
    reader = ReplyReader()
    reply = None
    for piece in pieces:
        assert reply is None, "nothing is fed behind a reply"
        reply = reader.feed(piece)
    return reply


class RequestTests(SynchronousTestCase):
    def test_it_names_the_target_twice_and_the_program(self) -> None:
        expected = (
            b"CONNECT a.example:443 HTTP/1.1\r\nHost: a.example:443\r\nUser-Agent: erofs-twisted/1\r\n\r\n"
        )
        self.assertEqual(expected, connect_request("a.example:443", "erofs-twisted/1", None))

    def test_it_holds_the_proxys_credentials(self) -> None:
        request = connect_request("[::1]:443", "x", Credentials("Aladdin", "open sesame"))
        self.assertIn(b"\r\nProxy-Authorization: Basic QWxhZGRpbjpvcGVuIHNlc2FtZQ==\r\n", request)


class ReplyTests(SynchronousTestCase):
    def test_a_head_is_a_reply(self) -> None:
        reply = read(
            b"HTTP/1.0 407 Who?\r\nProxy-Authenticate: Basic\r\nX:  y z \r\nproxy-authenticate:a\r\n\r\n"
        )
        assert reply is not None
        self.assertEqual((407, "Who?", False), (reply.code, reply.phrase, reply.is_open))
        self.assertEqual(["Basic", "a"], reply.values("Proxy-Authenticate"))
        self.assertEqual(["y z"], reply.values("x"))

    def test_all_of_2xx_open_a_tunnel_and_nothing_else_does(self) -> None:
        for code in (*range(200, 300), 301, 101, 400, 407, 500, 503):
            reply = read(f"HTTP/1.1 {code}\r\n\r\n".encode())
            assert reply is not None
            self.assertEqual((200 <= code < 300, code), (reply.is_open, reply.code))

    def test_a_length_means_nothing_in_it(self) -> None:
        reply = read(b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\nbytes")
        assert reply is not None
        self.assertEqual(b"bytes", reply.rest)

    def test_interim_replies_are_passed_over(self) -> None:
        reply = read(b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 102 Processing\r\nA: b\r\n\r\n" + OPEN + b"rest")
        assert reply is not None
        self.assertEqual((200, b"rest"), (reply.code, reply.rest))

    def test_what_is_not_http_is_refused_at_its_first_byte_that_differs(self) -> None:
        for data in (b"SSH-2.0-x", b"\x15\x03\x01\x00\x02", b"HTTP/2.0", b"HTTX", b"\r\n", b"h"):
            with self.assertRaises(InvalidHeader):
                read(data)

    def test_a_head_that_breaks_the_grammar_is_refused(self) -> None:
        for head in (
            b"HTTP/1.1 20 OK",
            b"HTTP/1.1 2000 OK",
            b"HTTP/1.1 0200 OK",
            b"HTTP/1.1 600 Odd",
            b"HTTP/1.2 200 OK",
            b"HTTP/1.1  200 OK",
            b"HTTP/1.1 200\tOK",
            b"HTTP/1.1 200 O\nK",
            b"HTTP/1.1 200 O\x00K",
            b"HTTP/1.1 200 OK\nA: b",
            b"HTTP/1.1 200 OK\r\nno colon",
            b"HTTP/1.1 200 OK\r\nA : b",
            b"HTTP/1.1 200 OK\r\n: b",
            b"HTTP/1.1 200 OK\r\nA: b\r\n folded",
            b"HTTP/1.1 200 OK\r\nA: b\rc",
        ):
            with self.assertRaises(InvalidHeader, msg=head):
                read(head + b"\r\n\r\n")

    def test_a_head_without_end_is_refused(self) -> None:
        reader = ReplyReader()
        reader.feed(b"HTTP/1.1 200 OK\r\n")
        with self.assertRaises(InvalidHeader) as caught:
            for _ in range(MAX_HEAD):
                reader.feed(b"A: b\r\n")
        self.assertIn(str(MAX_HEAD), str(caught.exception))

    def test_a_large_rest_is_no_large_head(self) -> None:
        reply = read(OPEN + bytes(2 * MAX_HEAD))
        assert reply is not None
        self.assertEqual(2 * MAX_HEAD, len(reply.rest))

    @given(st.data(), st.binary(max_size=40), st.integers(200, 599))
    def test_a_reply_is_the_same_however_it_is_cut(self, data: st.DataObject, rest: bytes, code: int) -> None:
        head = b"HTTP/1.1 100 Go on\r\n\r\nHTTP/1.1 %d Phrase\r\nName: value\r\n\r\n" % code
        cuts = sorted(data.draw(st.sets(st.integers(1, len(head) - 1), max_size=8)))
        edges = [0, *cuts, len(head)]
        pieces = [head[start:end] for start, end in pairwise(edges)]
        self.assertEqual(read(head + rest), read(*pieces[:-1], pieces[-1] + rest))

    @given(st.lists(st.binary(max_size=30), max_size=8), st.sampled_from([b"", b"HTTP/1.1 ", OPEN[:-2]]))
    def test_any_bytes_are_a_reply_or_the_beginning_of_one_or_refused(
        self, pieces: list[bytes], start: bytes
    ) -> None:
        reader = ReplyReader()
        try:
            for piece in (start, *pieces):
                reply = reader.feed(piece)
                if reply is not None:
                    self.assertIn(reply.code, range(100, 600))
                    return
        except InvalidHeader:
            return
