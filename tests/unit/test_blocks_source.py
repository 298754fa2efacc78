"""What a reader of a blob sees, one behaviour at a time; the model test tries all of them at once."""

from __future__ import annotations

import errno
import os
from typing import Any

from twisted.internet.defer import CancelledError, Deferred
from twisted.trial.unittest import SynchronousTestCase

from erofs_twisted.blocks import blobfile, requests
from erofs_twisted.blocks.queue import LIMIT, RESERVED
from erofs_twisted.blocks.readahead import ByteRange
from erofs_twisted.blocks.source import BlobSource
from erofs_twisted.errors import ReadError
from erofs_twisted.interfaces import FileSpan, Segment
from tests.unit.blobs import ScriptedOrigin, ThreadlessReactor, blob, open_cached

CHUNK = 1024
CHUNKS = 80
DATA = blob(CHUNKS * CHUNK + 100)


class Told:
    """A readahead policy that gives the advice it was told to, once."""

    def __init__(self) -> None:
        self.advice: list[ByteRange] = []

    def advise(self, offset: int, length: int, missing: bool) -> list[ByteRange]:
        advice, self.advice = self.advice, []
        return advice


def joined(segments: list[Segment]) -> bytes:
    return b"".join(
        os.pread(segment.fd, segment.length, segment.offset) if isinstance(segment, FileSpan) else segment
        for segment in segments
    )


class SourceCase(SynchronousTestCase):
    def setUp(self) -> None:
        self.patch(requests, "ALMOST", CHUNK)
        self.origin = ScriptedOrigin(DATA)
        self.readahead = Told()
        self.cached = open_cached(self.mktemp(), DATA, chunk_size=CHUNK)
        self.source = BlobSource(self.origin, self.cached, ThreadlessReactor(), self.readahead)

    def waits(self, offset: int, length: int) -> Deferred[list[Segment]]:
        answer = self.source.read(offset, length)
        assert isinstance(answer, Deferred)
        self.assertNoResult(answer)
        return answer

    def assert_answered(self, offset: int, length: int, answer: Any) -> None:
        segments = self.successResultOf(answer) if isinstance(answer, Deferred) else answer
        self.assertEqual(DATA[offset : offset + length], joined(segments))


class ReadTests(SourceCase):
    def test_a_read_of_what_is_there_is_answered_at_once_by_one_span_of_the_file(self) -> None:
        waiting = self.waits(0, 2 * CHUNK)
        self.origin.transfers[0].finish()
        self.assert_answered(0, 2 * CHUNK, waiting)
        self.assertEqual([FileSpan(self.cached.fd, 100, CHUNK)], self.source.read(100, CHUNK))
        self.assertEqual(1, len(self.origin.transfers))

    def test_a_read_fetches_whole_chunks(self) -> None:
        self.waits(CHUNK + 1, CHUNK)
        self.assertEqual([(CHUNK, 2 * CHUNK)], self.origin.asked)

    def test_the_last_chunk_ends_with_the_blob(self) -> None:
        waiting = self.waits(CHUNKS * CHUNK + 50, 50)
        self.assertEqual([(CHUNKS * CHUNK, 100)], self.origin.asked)
        self.origin.transfers[0].finish()
        self.assert_answered(CHUNKS * CHUNK + 50, 50, waiting)

    def test_a_reader_wakes_up_with_its_last_chunk_not_at_the_end_of_the_transfer(self) -> None:
        early = self.waits(0, 10)
        late = self.waits(0, 4 * CHUNK)
        self.readahead.advice = [(0, 4 * CHUNK)]
        first, second = self.origin.transfers
        first.send(CHUNK - 1)
        self.assertNoResult(early)
        first.send(1)
        self.assert_answered(0, 10, early)
        self.assertNoResult(late)
        second.send()
        self.assert_answered(0, 4 * CHUNK, late)

    def test_one_piece_may_hold_many_chunks(self) -> None:
        waiting = self.waits(0, len(DATA))
        self.origin.transfers[0].send()
        self.assert_answered(0, len(DATA), waiting)

    def test_readers_of_one_chunk_share_one_request(self) -> None:
        readers = [self.waits(0, CHUNK), self.waits(10, 20), self.waits(500, 500)]
        self.assertEqual(1, len(self.origin.transfers))
        self.origin.transfers[0].finish()
        for (offset, length), reader in zip(((0, CHUNK), (10, 20), (500, 500)), readers, strict=True):
            self.assert_answered(offset, length, reader)

    def test_only_what_is_missing_is_fetched(self) -> None:
        self.waits(2 * CHUNK, CHUNK)
        self.origin.transfers[0].finish()
        self.waits(5 * CHUNK, CHUNK)
        waiting = self.waits(0, 8 * CHUNK)
        self.assertEqual(
            [(0, 2), (3, 2), (6, 2)], [(o // CHUNK, n // CHUNK) for o, n in self.origin.asked[2:]]
        )
        for transfer in self.origin.live:
            transfer.finish()
        self.assert_answered(0, 8 * CHUNK, waiting)

    def test_a_long_read_is_split_in_requests_that_run_side_by_side(self) -> None:
        big = blob(3 * 1024 * 1024)
        origin = ScriptedOrigin(big)
        source = BlobSource(origin, open_cached(self.mktemp(), big), ThreadlessReactor(), Told())
        source.read(0, len(big))
        self.assertEqual([1024 * 1024] * 3, [length for _, length in origin.asked])

    def test_a_complete_blob_asks_the_policy_no_more(self) -> None:
        self.waits(0, len(DATA))
        self.origin.transfers[0].finish()
        self.readahead.advice = [(0, CHUNK)]
        self.source.read(0, 10)
        self.assertTrue(self.readahead.advice)

    def test_stats_count_what_was_fetched_and_what_the_cache_gave(self) -> None:
        self.waits(CHUNKS * CHUNK, 100)
        self.assertEqual(1, self.source.stats.fetches_running)
        self.origin.transfers[0].finish()
        self.source.read(CHUNKS * CHUNK, 30)
        stats = self.source.stats
        self.assertEqual(
            (100, 30, 0, 0),
            (stats.bytes_fetched, stats.bytes_from_cache, stats.fetches_running, stats.reads_failed),
        )


class FailureTests(SourceCase):
    def test_only_readers_of_what_did_not_come_fail(self) -> None:
        lucky, unlucky = self.waits(0, 10), self.waits(0, 4 * CHUNK)
        lucky2 = self.waits(CHUNK, 10)
        self.origin.transfers[1].send(CHUNK)
        self.origin.transfers[0].finish()
        self.origin.transfers[1].done.errback(ReadError("the origin is down"))
        self.assert_answered(0, 10, lucky)
        self.assert_answered(CHUNK, 10, lucky2)
        self.assertIn("the origin is down", str(self.failureResultOf(unlucky, ReadError).value))
        self.assertEqual(1, self.source.stats.reads_failed)

    def test_the_next_read_after_a_failure_tries_again(self) -> None:
        waiting = self.waits(0, 10)
        self.origin.transfers[0].done.errback(ReadError("gone"))
        self.failureResultOf(waiting, ReadError)
        again = self.waits(0, 10)
        self.origin.transfers[1].finish()
        self.assert_answered(0, 10, again)

    def test_a_chunk_that_came_half_is_fetched_whole_again(self) -> None:
        waiting = self.waits(0, CHUNK)
        self.origin.transfers[0].send(CHUNK // 2)
        self.origin.transfers[0].done.errback(ReadError("gone"))
        self.failureResultOf(waiting, ReadError)
        self.waits(0, CHUNK)
        self.assertEqual((0, CHUNK), self.origin.asked[1])

    def test_an_origin_that_ends_early_is_a_failure(self) -> None:
        waiting = self.waits(0, CHUNK)
        self.origin.transfers[0].send(CHUNK - 1)
        self.origin.transfers[0].done.callback(None)
        self.assertIn("1 bytes too early", str(self.failureResultOf(waiting, ReadError).value))

    def test_an_origin_that_sends_too_much_is_a_failure_and_its_transfer_is_ended(self) -> None:
        waiting = self.waits(0, CHUNK)
        self.origin.transfers[0].deliver(DATA[: CHUNK + 1])
        self.failureResultOf(waiting, ReadError)
        self.assertTrue(self.origin.transfers[0].cancelled)
        self.waits(0, CHUNK)

    def test_too_much_after_all_was_there_is_logged_and_does_not_last(self) -> None:
        waiting = self.waits(0, CHUNK)
        transfer = self.origin.transfers[0]
        transfer.send()
        transfer.deliver(b"more")
        self.assert_answered(0, CHUNK, waiting)
        self.assertTrue(transfer.cancelled)

    def test_a_bug_in_a_reader_fails_the_read_and_reaches_the_log(self) -> None:
        waiting = self.waits(0, CHUNK)
        self.origin.transfers[0].done.errback(ZeroDivisionError())
        self.failureResultOf(waiting, ReadError)
        self.assertEqual(1, len(self.flushLoggedErrors(ZeroDivisionError)))

    def test_a_transfer_that_its_origin_cancels_is_a_failure(self) -> None:
        waiting = self.waits(0, CHUNK)
        self.origin.transfers[0].done.errback(CancelledError())
        self.failureResultOf(waiting, ReadError)

    def test_what_comes_after_a_failure_is_ignored(self) -> None:
        waiting = self.waits(0, CHUNK)
        transfer = self.origin.transfers[0]
        transfer.done.errback(ReadError("gone"))
        self.failureResultOf(waiting, ReadError)
        transfer.send()
        self.waits(0, CHUNK)

    def test_a_full_disk_does_not_keep_reads_from_their_bytes(self) -> None:
        class FullDisk:
            def __getattr__(self, name: str) -> Any:
                return getattr(os, name)

            def pwritev(self, *_: Any) -> int:
                raise OSError(errno.ENOSPC, "No space left on device")

        kept = self.waits(0, CHUNK)
        self.origin.transfers[0].finish()
        self.assert_answered(0, CHUNK, kept)
        self.patch(blobfile, "os", FullDisk())
        waiting = self.waits(CHUNK - 10, CHUNK + 20)
        self.origin.transfers[1].finish()
        segments = self.successResultOf(waiting)
        self.assertEqual(DATA[CHUNK - 10 : 2 * CHUNK + 10], joined(segments))
        self.assertEqual([FileSpan, bytes], [type(segment) for segment in segments])
        self.waits(CHUNK, CHUNK)


class CancelTests(SourceCase):
    def test_the_fetch_ends_when_its_last_reader_leaves(self) -> None:
        first, second = self.waits(0, CHUNK * 4), self.waits(CHUNK, CHUNK * 2)
        first.cancel()
        self.failureResultOf(first, CancelledError)
        self.assertFalse(self.origin.transfers[0].cancelled)
        second.cancel()
        self.failureResultOf(second, CancelledError)
        self.assertTrue(self.origin.transfers[0].cancelled)

    def test_a_fetch_that_is_almost_there_goes_on(self) -> None:
        waiting = self.waits(0, CHUNK * 2)
        self.origin.transfers[0].send(CHUNK)
        waiting.cancel()
        self.failureResultOf(waiting, CancelledError)
        self.origin.transfers[0].finish()
        self.assert_answered(CHUNK, CHUNK, self.source.read(CHUNK, CHUNK))

    def test_the_place_of_a_cancelled_fetch_is_free_again(self) -> None:
        readers = [self.waits(chunk * CHUNK, 1) for chunk in range(0, 2 * LIMIT, 2)]
        last = self.waits(75 * CHUNK, 1)
        self.assertEqual(LIMIT, len(self.origin.transfers))
        readers[0].cancel()
        self.failureResultOf(readers[0], CancelledError)
        self.assertEqual(LIMIT, len(self.origin.transfers), "one chunk: it is almost there")
        self.origin.live[0].finish()
        self.assertEqual(LIMIT + 1, len(self.origin.transfers))
        self.origin.live[-1].finish()
        self.assert_answered(75 * CHUNK, 1, last)

    def test_a_reader_that_cancels_another_when_it_is_answered_does_no_harm(self) -> None:
        first = self.waits(0, 10)
        second = self.waits(0, 20)
        first.addCallback(lambda _: second.cancel())
        self.origin.transfers[0].finish()
        self.successResultOf(first)
        self.failureResultOf(second, CancelledError)


class ReadaheadTests(SourceCase):
    def test_advice_that_touches_the_read_goes_in_one_request_with_it(self) -> None:
        self.readahead.advice = [(0, 4 * CHUNK)]
        self.waits(CHUNK, 10)
        self.assertEqual([(0, 4 * CHUNK)], self.origin.asked)

    def test_advice_beyond_the_read_goes_in_requests_of_its_own(self) -> None:
        self.readahead.advice = [(0, 2 * CHUNK), (2 * CHUNK, 4 * CHUNK)]
        self.waits(0, 10)
        self.assertEqual([(0, 2 * CHUNK), (2 * CHUNK, 2 * CHUNK)], self.origin.asked)

    def test_a_read_of_what_is_there_may_start_readahead(self) -> None:
        self.waits(0, CHUNK)
        self.origin.transfers[0].finish()
        self.readahead.advice = [(CHUNK, 3 * CHUNK)]
        self.assertIsInstance(self.source.read(0, 10), list)
        self.assertEqual((CHUNK, 2 * CHUNK), self.origin.asked[1])

    def test_readahead_that_fails_hurts_nobody_and_its_reader_gets_a_fetch_of_its_own(self) -> None:
        self.readahead.advice = [(0, CHUNK), (CHUNK, 8 * CHUNK)]
        self.waits(0, 10)
        joiner = self.waits(4 * CHUNK, 10)
        self.origin.transfers[1].done.errback(ReadError("a guess too many"))
        self.assertNoResult(joiner)
        self.assertEqual((4 * CHUNK, CHUNK), self.origin.asked[2])
        self.origin.transfers[2].finish()
        self.assert_answered(4 * CHUNK, 10, joiner)

    def test_readahead_goes_on_when_a_reader_that_joined_it_leaves(self) -> None:
        self.readahead.advice = [(0, CHUNK), (CHUNK, 8 * CHUNK)]
        self.waits(0, 10)
        joiner = self.waits(4 * CHUNK, 10)
        joiner.cancel()
        self.failureResultOf(joiner, CancelledError)
        self.assertFalse(self.origin.transfers[1].cancelled)

    def test_readahead_leaves_places_for_readers(self) -> None:
        self.readahead.advice = [(chunk * CHUNK, (chunk + 1) * CHUNK) for chunk in range(2, 80, 2)]
        self.waits(0, 10)
        self.assertEqual(LIMIT - RESERVED, len(self.origin.transfers))
        self.waits(80 * CHUNK, 10)
        self.assertEqual((80 * CHUNK, 100), self.origin.asked[LIMIT - RESERVED])

    def test_a_reader_pulls_readahead_that_has_not_begun_to_the_front(self) -> None:
        self.readahead.advice = [(chunk * CHUNK, (chunk + 1) * CHUNK) for chunk in range(2, 80, 2)]
        self.waits(0, 10)
        waiting = self.waits(78 * CHUNK, 10)
        self.assertEqual((78 * CHUNK, CHUNK), self.origin.asked[LIMIT - RESERVED])
        self.origin.transfers[-1].finish()
        self.assert_answered(78 * CHUNK, 10, waiting)


class PrefetchTests(SourceCase):
    def test_a_prefetch_is_done_when_all_of_it_is_there(self) -> None:
        done = self.source.prefetch(0, len(DATA))
        self.assertNoResult(done)
        self.origin.transfers[0].finish()
        self.assertIsNone(self.successResultOf(done))
        self.assert_answered(0, len(DATA), self.source.read(0, len(DATA)))

    def test_a_prefetch_of_nothing_or_of_what_is_there_is_done_at_once(self) -> None:
        self.successResultOf(self.source.prefetch(0, 0))
        self.waits(0, CHUNK)
        self.origin.transfers[0].finish()
        self.successResultOf(self.source.prefetch(0, CHUNK))
        self.assertEqual(1, len(self.origin.transfers))

    def test_a_prefetch_fails_with_its_fetch(self) -> None:
        done = self.source.prefetch(0, CHUNK)
        self.origin.transfers[0].done.errback(ReadError("gone"))
        self.failureResultOf(done, ReadError)

    def test_a_large_prefetch_has_a_few_requests_in_flight(self) -> None:
        big = blob(9 * 1024 * 1024)
        origin = ScriptedOrigin(big)
        source = BlobSource(origin, open_cached(self.mktemp(), big), ThreadlessReactor())
        done = source.prefetch(0, len(big))
        self.assertEqual(4, len(origin.transfers))
        while origin.live:
            origin.live[0].finish()
        self.successResultOf(done)
        lengths = [length for _, length in origin.asked]
        self.assertEqual([1024 * 1024] * 4, lengths[:4])
        self.assertEqual(len(big), sum(lengths))

    def test_a_cancelled_prefetch_starts_nothing_more(self) -> None:
        big = blob(9 * 1024 * 1024)
        origin = ScriptedOrigin(big)
        source = BlobSource(origin, open_cached(self.mktemp(), big), ThreadlessReactor())
        done = source.prefetch(0, len(big))
        done.cancel()
        self.failureResultOf(done, CancelledError)
        while origin.live:
            origin.live[0].finish()
        self.assertEqual(4, len(origin.transfers))


class ForeseenTests(SourceCase):
    """Ranges that a trace names."""

    def test_all_are_asked_for_in_their_order(self) -> None:
        done = self.source.prefetch_ranges([(8 * CHUNK, 9 * CHUNK), (0, 2 * CHUNK), (0, 0), (5, 10)])
        self.assertEqual([(8 * CHUNK, CHUNK), (0, 2 * CHUNK)], self.origin.asked)
        for transfer in self.origin.live:
            transfer.finish()
        self.successResultOf(done)

    def test_nothing_is_done_at_once(self) -> None:
        self.successResultOf(self.source.prefetch_ranges([]))

    def test_a_read_of_them_is_no_reason_to_guess(self) -> None:
        self.source.prefetch_ranges([(8 * CHUNK, 10 * CHUNK)])
        self.readahead.advice = [(8 * CHUNK, 40 * CHUNK)]
        self.waits(8 * CHUNK, CHUNK)
        self.assertEqual([(8 * CHUNK, 2 * CHUNK)], self.origin.asked)
        self.waits(9 * CHUNK, 2 * CHUNK)
        self.assertEqual((10 * CHUNK, 30 * CHUNK), self.origin.asked[1])


class CloseTests(SourceCase):
    def test_close_fails_the_readers_and_ends_the_transfers(self) -> None:
        waiting = self.waits(0, len(DATA))
        self.successResultOf(self.source.close())
        self.failureResultOf(waiting, ReadError)
        self.assertTrue(self.origin.transfers[0].cancelled)

    def test_close_starts_nothing_that_was_queued(self) -> None:
        readers = [self.waits(chunk * CHUNK, 1) for chunk in range(LIMIT + 4)]
        self.successResultOf(self.source.close())
        for reader in readers:
            self.failureResultOf(reader, ReadError)
        self.assertEqual(LIMIT, len(self.origin.transfers))

    def test_a_closed_source_answers_no_read_not_even_from_the_cache(self) -> None:
        self.waits(0, CHUNK)
        self.origin.transfers[0].finish()
        self.successResultOf(self.source.close())
        answer = self.source.read(0, 10)
        assert isinstance(answer, Deferred)
        self.failureResultOf(answer, ReadError)
        self.failureResultOf(self.source.prefetch(0, 10), ReadError)

    def test_a_reader_that_closes_the_source_when_it_is_answered_does_no_harm(self) -> None:
        first, second = self.waits(0, 10), self.waits(0, 20)
        first.addCallback(lambda _: self.source.close())
        self.origin.transfers[0].finish()
        self.successResultOf(first)
        self.failureResultOf(second, ReadError)
