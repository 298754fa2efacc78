"""Ranges of a blob: what is accepted, what is delivered, and when a read is tried again or given up."""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable
from typing import Any

from hypothesis import given
from hypothesis import strategies as st
from twisted.internet.defer import CancelledError, Deferred
from twisted.internet.error import ConnectionRefusedError
from twisted.trial.unittest import SynchronousTestCase
from zope.interface.verify import verifyObject

from erofs_twisted.errors import RangesIgnored, ReadError
from erofs_twisted.interfaces import IBlobReader
from erofs_twisted.registry.blob import MAX_MISTAKES, SLICED, BlobReader
from erofs_twisted.registry.digest import Digest
from erofs_twisted.registry.errors import BlobUnreadable
from erofs_twisted.registry.location import FIRST_WHOLE_ANSWERS, WHOLE_ANSWERS
from erofs_twisted.registry.manifest import Descriptor
from erofs_twisted.registry.retry import Backoff
from tests.unit.fakehosts import fake_host
from tests.unit.fakehttp import FakeRequest, FakeResponse, fake_transport

CDN = "https://cdn.example/x?signature=secret"
BLOB = bytes(range(256)) * 4
URL = f"https://r.example/v2/a/blobs/{Digest.of(BLOB)}"


class BlobTests(SynchronousTestCase):
    """A reader of ``BLOB``; the test answers its requests, or ``self.answer`` does."""

    def setUp(self) -> None:
        self.make(BLOB)

    def make(self, blob: bytes, size: int | None = None) -> None:
        self.agent, self.clock, transport = fake_transport()
        descriptor = Descriptor("application/vnd.erofs", Digest.of(blob), len(blob) if size is None else size)
        self.reader = BlobReader([fake_host(transport)], descriptor, 100.0, Backoff(random=lambda: 1.0))
        self.got: list[bytes] = []

    def read(self, offset: int, length: int) -> Deferred[None]:
        return self.reader.read(offset, length, self.got.append)

    def expect(self, done: Deferred[None], offset: int, length: int) -> None:
        self.assertIsNone(self.successResultOf(done))
        self.assertEqual(BLOB[offset : offset + length], b"".join(self.got))
        self.assertEqual([], self.clock.getDelayedCalls())

    def refusal(self, done: Deferred[None]) -> str:
        error = self.failureResultOf(done, BlobUnreadable).value
        self.assertIsInstance(error, ReadError)
        self.assertEqual([], self.clock.getDelayedCalls())
        return str(error)

    def refusal_again(self, done: Deferred[None], answer: Callable[[FakeRequest], Any]) -> str:
        """The request that was made, and those that follow, get the same answer, until the read fails."""
        for attempt in range(MAX_MISTAKES):
            request = self.agent.last if attempt == 0 else self.retry(done)
            answer(request)
        return self.refusal(done)

    def retry(self, done: Deferred[None], seconds: float = 10.0) -> FakeRequest:
        """The next request, which comes after a pause of at most that long."""
        self.assertNoResult(done)
        before = len(self.agent.requests)
        self.clock.advance(seconds)
        self.assertEqual(before + 1, len(self.agent.requests))
        return self.agent.last


class RangeTests(BlobTests):
    def test_it_is_a_blob_reader(self) -> None:
        self.assertTrue(verifyObject(IBlobReader, self.reader))
        self.assertEqual((Digest.of(BLOB), len(BLOB)), (self.reader.digest, self.reader.size))

    def test_the_range_is_asked_for_and_delivered(self) -> None:
        done = self.read(100, 50)
        self.assertEqual("bytes=100-149", self.agent.last.headers["range"])
        self.agent.last.respond_range(BLOB)
        self.expect(done, 100, 50)

    def test_pieces_are_delivered_as_they_come(self) -> None:
        done = self.read(0, 4)
        response = self.agent.last.respond(206, None, Content_Range=f"bytes 0-3/{len(BLOB)}")
        response.send(BLOB[:2])
        self.assertEqual([BLOB[:2]], self.got)
        response.send(BLOB[2:4])
        response.finish()
        self.expect(done, 0, 4)

    def test_an_empty_range_asks_nothing(self) -> None:
        self.expect(self.read(5, 0), 5, 0)
        self.assertEqual([], self.agent.requests)

    def test_a_range_outside_the_blob_is_the_callers_mistake(self) -> None:
        for offset, length in ((-1, 2), (len(BLOB), 1), (0, len(BLOB) + 1), (5, -1)):
            self.assertRaises(ValueError, self.read, offset, length)

    def test_a_wrong_content_range_is_refused_before_anything_is_delivered(self) -> None:
        for wrong in (
            "bytes 0-49/1024",
            "bytes 100-149/1025",
            "bytes 100-148/1024",
            "bytes 100-149/*",
            "x",
            "",
        ):
            done = self.read(100, 50)
            self.refusal_again(
                done, lambda request, wrong=wrong: request.respond(206, BLOB[100:150], Content_Range=wrong)
            )
            self.assertEqual([], self.got)

    def test_after_a_wrong_answer_the_right_one_is_taken(self) -> None:
        done = self.read(100, 50)
        self.agent.last.respond(206, BLOB[100:150], Content_Range="bytes 0-49/1024")
        self.retry(done, 0.25).respond_range(BLOB)
        self.expect(done, 100, 50)

    def test_wrong_answers_are_counted_from_the_last_progress(self) -> None:
        done = self.read(0, 2 * MAX_MISTAKES)
        for position in range(2 * MAX_MISTAKES - 1):
            self.agent.last.respond(206, b"x", Content_Range="bytes 0-0/1024")
            first, stop = self.retry(done).range
            response = self.agent.last.respond(206, None, Content_Range=f"bytes {first}-{stop - 1}/1024")
            response.send(BLOB[position : position + 1])
            response.break_off()
            self.retry(done)
        self.agent.last.respond_range(BLOB)
        self.expect(done, 0, 2 * MAX_MISTAKES)

    def test_a_length_that_contradicts_the_range_is_refused(self) -> None:
        done = self.read(100, 50)
        responses: list[FakeResponse] = []

        def answer(request: FakeRequest) -> None:
            responses.append(request.respond(206, None, length=51, Content_Range="bytes 100-149/1024"))

        self.assertIn("51 bytes", self.refusal_again(done, answer))
        self.assertTrue(all(response.is_aborted for response in responses))

    def test_a_body_that_is_too_long_is_refused_and_cut_off(self) -> None:
        done = self.read(100, 50)
        responses: list[FakeResponse] = []

        def answer(request: FakeRequest) -> None:
            responses.append(request.respond(206, None, Content_Range="bytes 100-149/1024"))
            responses[-1].send(BLOB[100:150] + b"x")

        self.assertIn("longer", self.refusal_again(done, answer))
        self.assertEqual([], self.got)
        self.assertTrue(all(response.is_aborted for response in responses))

    def test_what_follows_all_that_was_asked_for_is_cut_off(self) -> None:
        done = self.read(100, 50)
        response = self.agent.last.respond(206, None, Content_Range="bytes 100-149/1024")
        response.send(BLOB[100:150])
        response.send(b"x")
        self.expect(done, 100, 50)
        self.assertTrue(response.is_aborted)

    def test_a_body_that_breaks_off_behind_its_last_byte_is_complete(self) -> None:
        done = self.read(100, 50)
        response = self.agent.last.respond(206, None, Content_Range="bytes 100-149/1024")
        response.send(BLOB[100:150])
        response.break_off()
        self.expect(done, 100, 50)

    def test_several_ranges_in_one_answer_are_refused(self) -> None:
        done = self.read(100, 50)
        self.refusal_again(
            done,
            lambda request: request.respond(206, b"--x", Content_Type="multipart/byteranges; boundary=x"),
        )

    def test_a_416_compares_the_sizes(self) -> None:
        done = self.read(100, 50)
        self.agent.last.respond(416, b"", Content_Range="bytes */7")
        self.assertIn("bytes */7, but the manifest says 1024", self.refusal(done))

    def test_permanent_errors_end_the_read_at_once(self) -> None:
        for code in (400, 403, 404, 416, 501, 204):
            done = self.read(100, 50)
            self.agent.last.respond(code)
            self.assertIn(str(code), self.refusal(done))

    def test_what_the_receiver_raises_ends_the_read(self) -> None:
        done = self.reader.read(0, 4, lambda data: [][1])
        self.agent.last.respond_range(BLOB)
        self.failureResultOf(done, IndexError)
        self.assertEqual([], self.clock.getDelayedCalls())


class WholeBlobTests(BlobTests):
    """Against a server that ignores Range."""

    def test_the_range_is_cut_out(self) -> None:
        done = self.read(100, 50)
        self.agent.last.respond(200, BLOB)
        self.expect(done, 100, 50)

    def test_at_the_end_of_the_range_the_connection_is_closed(self) -> None:
        done = self.read(100, 50)
        response = self.agent.last.respond(200, None, length=len(BLOB))
        response.send(BLOB[:512])
        self.expect(done, 100, 50)
        self.assertTrue(response.is_aborted)

    def test_a_range_at_the_blobs_end_leaves_the_connection_open(self) -> None:
        done = self.read(1000, 24)
        response = self.agent.last.respond(200, BLOB)
        self.expect(done, 1000, 24)
        self.assertFalse(response.is_aborted)

    def test_another_size_is_refused(self) -> None:
        done = self.read(0, 4)
        said = self.refusal_again(done, lambda request: request.respond(200, BLOB + b"x"))
        self.assertIn("1025 bytes there, the manifest says 1024", said)

    def test_a_blob_of_unknown_length_that_is_too_long_is_refused(self) -> None:
        done = self.read(1000, 24)
        said = self.refusal_again(done, lambda request: request.respond(200, None).send(BLOB + b"x"))
        self.assertIn("longer", said)

    @given(st.integers(0, 1023), st.integers(1, 1024), st.lists(st.integers(1, 300)))
    def test_it_does_not_matter_how_the_body_is_cut(self, offset: int, length: int, cuts: list[int]) -> None:
        self.make(BLOB)
        length = min(length, len(BLOB) - offset)
        done = self.read(offset, length)
        response = self.agent.last.respond(200, None, length=len(BLOB))
        position = 0
        for cut in [*cuts, len(BLOB)]:
            response.send(BLOB[position : position + cut])
            position += cut
        response.finish()
        self.expect(done, offset, length)

    def test_a_resumed_read_skips_what_was_delivered(self) -> None:
        done = self.read(100, 50)
        response = self.agent.last.respond(200, None, length=len(BLOB))
        response.send(BLOB[:120])
        response.break_off()
        self.retry(done).respond(200, BLOB)
        self.expect(done, 100, 50)

    def test_the_blob_is_never_held_in_memory(self) -> None:
        size, piece = 64 << 20, 64 << 10
        self.make(b"", size)
        done = self.reader.read(0, size, lambda data: None)
        response = self.agent.last.respond(200, None, length=size)
        tracemalloc.start()
        self.addCleanup(tracemalloc.stop)
        for _ in range(size // piece):
            response.send(bytes(piece))
        response.finish()
        self.successResultOf(done)
        self.assertLess(tracemalloc.get_traced_memory()[1], 10 * piece)

    def test_for_a_part_of_a_large_blob_it_is_left_at_once_and_soon_given_up(self) -> None:
        size = SLICED + 1
        self.make(b"", size)
        done = self.read(0, size - 1)
        for attempt in range(FIRST_WHOLE_ANSWERS):
            request = self.agent.last if attempt == 0 else self.retry(done)
            self.assertTrue(request.respond(200, None, length=size).is_aborted)
        self.failureResultOf(done, RangesIgnored)
        self.assertEqual([], self.clock.getDelayedCalls())
        done = self.read(0, 10)
        self.agent.last.respond(200, None, length=size)
        self.failureResultOf(done, RangesIgnored)

    def test_one_that_gave_a_range_before_is_asked_for_it_again(self) -> None:
        size = SLICED + 1
        self.make(b"", size)
        first = self.read(0, 4)
        self.agent.last.respond(206, b"0123", Content_Range=f"bytes 0-3/{size}")
        self.successResultOf(first)
        for _ in range(WHOLE_ANSWERS):
            done = self.read(4, 4)
            self.agent.last.respond(200, None, length=size)
            self.retry(done, 0.25).respond(206, b"4567", Content_Range=f"bytes 4-7/{size}")
            self.successResultOf(done)

    def test_a_read_that_gets_no_range_where_others_do_is_given_up(self) -> None:
        size = SLICED + 1
        self.make(b"", size)
        first = self.read(0, 4)
        self.agent.last.respond(206, b"0123", Content_Range=f"bytes 0-3/{size}")
        self.successResultOf(first)
        done = self.read(4, 4)
        for attempt in range(MAX_MISTAKES):
            request = self.agent.last if attempt == 0 else self.retry(done)
            other = self.read(0, 4)
            self.agent.last.respond(206, b"0123", Content_Range=f"bytes 0-3/{size}")
            self.successResultOf(other)
            request.respond(200, None, length=size)
        self.failureResultOf(done, RangesIgnored)

    def test_skipping_does_not_go_on_for_ever(self) -> None:
        size = 1 << 20
        self.make(b"", size)
        done = self.read(size - 10, 10)
        response = self.agent.last.respond(200, None, length=size)
        for _ in range(11):
            self.clock.advance(10)
            response.send(b"x")
        self.assertIn("skipping", self.refusal(done))
        self.assertTrue(response.is_aborted)


class CancelTests(BlobTests):
    def cancel(self, done: Deferred[None]) -> None:
        done.cancel()
        self.failureResultOf(done, CancelledError)
        self.assertEqual([], self.clock.getDelayedCalls())

    def test_before_the_answer(self) -> None:
        self.cancel(self.read(100, 50))
        self.assertTrue(self.agent.last.is_cancelled)

    def test_within_the_body(self) -> None:
        done = self.read(100, 50)
        response = self.agent.last.respond(206, None, Content_Range="bytes 100-149/1024")
        response.send(BLOB[100:110])
        self.cancel(done)
        self.assertTrue(response.is_aborted)

    def test_between_attempts(self) -> None:
        done = self.read(100, 50)
        self.agent.last.respond(503)
        self.cancel(done)
        self.assertEqual(1, len(self.agent.requests))


class LocationTests(BlobTests):
    """Where the registry redirects to is asked again directly, as long as that works."""

    def setUp(self) -> None:
        super().setUp()
        self.cdn: Any = lambda request: request.respond_range(BLOB)
        self.agent.answer = self.answer

    def answer(self, request: FakeRequest) -> None:
        if request.url == URL:
            request.respond(307, b"", Location=CDN)
        else:
            self.cdn(request)

    def test_the_second_read_skips_the_registry(self) -> None:
        self.expect(self.read(0, 10), 0, 10)
        self.expect(self.read(10, 10), 0, 20)
        self.assertEqual([URL, CDN, CDN], self.agent.urls)

    def test_an_expired_location_is_asked_for_anew_at_once(self) -> None:
        for code in (400, 401, 403, 404):
            self.setUp()
            self.expect(self.read(0, 10), 0, 10)
            refuse = [code]
            self.cdn = lambda request, refuse=refuse: (
                request.respond(refuse.pop()) if refuse else request.respond_range(BLOB)
            )
            self.expect(self.read(10, 10), 0, 20)
            self.assertEqual([URL, CDN, CDN, URL, CDN], self.agent.urls)

    def refusal_in_time(self, done: Deferred[None]) -> str:
        for _ in range(MAX_MISTAKES):
            self.clock.advance(5)
        return self.refusal(done)

    def test_a_fresh_location_that_refuses_is_asked_for_anew(self) -> None:
        refuse = [403]
        self.cdn = lambda request: request.respond(refuse.pop()) if refuse else request.respond_range(BLOB)
        done = self.read(0, 10)
        self.assertEqual([URL, CDN], self.agent.urls)
        self.clock.advance(0.25)
        self.expect(done, 0, 10)
        self.assertEqual([URL, CDN, URL, CDN], self.agent.urls)

    def test_fresh_locations_that_all_refuse_end_the_read(self) -> None:
        self.cdn = lambda request: request.respond(403)
        self.assertIn("403", self.refusal_in_time(self.read(0, 10)))
        self.assertEqual([URL, CDN] * MAX_MISTAKES, self.agent.urls)

    def test_a_location_that_goes_on_refusing_ends_the_read(self) -> None:
        self.expect(self.read(0, 10), 0, 10)
        self.cdn = lambda request: request.respond(403)
        self.refusal_in_time(self.read(10, 10))
        self.assertEqual([URL, CDN, CDN] + [URL, CDN] * MAX_MISTAKES, self.agent.urls)

    def test_a_location_that_is_down_is_asked_for_anew_after_a_pause(self) -> None:
        self.expect(self.read(0, 10), 0, 10)
        self.cdn = lambda request: request.fail(ConnectionRefusedError())
        done = self.read(10, 10)
        self.cdn = lambda request: request.respond_range(BLOB)
        self.clock.advance(1)
        self.expect(done, 0, 20)
        self.assertEqual([URL, CDN, CDN, URL, CDN], self.agent.urls)

    def test_the_signature_is_in_no_message(self) -> None:
        for code in (403, 416):
            self.cdn = lambda request, code=code: request.respond(code)
            self.assertNotIn("secret", self.refusal_in_time(self.read(0, 10)))
        self.cdn = lambda request: request.respond(206, b"", Content_Range="x")
        self.assertNotIn("secret", self.refusal_in_time(self.read(0, 10)))

    def test_a_blob_that_is_gone_says_so_at_once_and_names_the_cure(self) -> None:
        self.agent.answer = lambda request: request.respond(404)
        error = self.refusal(self.read(0, 10))
        self.assertIn("404", error)
        self.assertIn("deleted since: push the image again", error)
        self.assertEqual([URL], self.agent.urls)
