"""Who goes first: readers, guesses, the background; and what another process is at."""

from __future__ import annotations

import os
from typing import Any

from twisted.internet.defer import Deferred
from twisted.trial.unittest import SynchronousTestCase

from erofs_twisted.blocks import requests
from erofs_twisted.blocks.fetch import Priority
from erofs_twisted.blocks.link import Link
from erofs_twisted.blocks.queue import BACKGROUND_LIMIT, ELSEWHERE_POLL, QUIET, FetchQueue
from erofs_twisted.blocks.requests import OTHERS_PATIENCE
from erofs_twisted.blocks.source import BlobSource
from erofs_twisted.errors import RangesIgnored, ReadError
from tests.unit.blobs import ScriptedOrigin, ThreadlessReactor, blob, open_cached
from tests.unit.test_blocks_link import receive
from tests.unit.test_blocks_source import Told, joined

CHUNK = 1024
CHUNKS = 64
DATA = blob(CHUNKS * CHUNK)


class QueueCase(SynchronousTestCase):
    def setUp(self) -> None:
        self.patch(requests, "ALMOST", CHUNK)
        self.clock = ThreadlessReactor()
        self.origin = ScriptedOrigin(DATA)
        self.queue = FetchQueue(self.clock, Link())
        self.cached = open_cached(self.mktemp(), DATA, chunk_size=CHUNK)
        self.source = BlobSource(self.origin, self.cached, self.clock, Told(), self.queue)

    def fill(self, first: int, end: int) -> Deferred[None]:
        return self.source.prefetch(first * CHUNK, (end - first) * CHUNK, Priority.BACKGROUND)

    def read(self, chunk: int) -> Deferred[Any]:
        answer = self.source.read(chunk * CHUNK, CHUNK)
        assert isinstance(answer, Deferred)
        return answer

    def assert_read(self, chunk: int, answer: Deferred[Any]) -> None:
        self.assertEqual(DATA[chunk * CHUNK : (chunk + 1) * CHUNK], joined(self.successResultOf(answer)))

    @property
    def asked(self) -> list[tuple[int, int]]:
        """(first chunk, chunks) of each request."""
        return [(offset // CHUNK, length // CHUNK) for offset, length in self.origin.asked]


class BackgroundTests(QueueCase):
    def test_an_idle_link_is_used(self) -> None:
        done = self.fill(0, 4)
        self.assertEqual([(0, 4)], self.asked)
        self.origin.transfers[0].finish()
        self.successResultOf(done)

    def test_it_has_few_requests_at_a_time(self) -> None:
        for chunk in range(8):
            self.fill(chunk, chunk + 1)
        self.assertEqual(BACKGROUND_LIMIT, len(self.origin.transfers))
        self.origin.transfers[0].finish()
        self.assertEqual(BACKGROUND_LIMIT + 1, len(self.origin.transfers))

    def test_it_waits_until_readers_have_been_quiet(self) -> None:
        answer = self.read(0)
        self.fill(8, 12)
        self.origin.transfers[0].finish()
        self.assert_read(0, answer)
        self.clock.advance(QUIET / 2)
        self.assertEqual([(0, 1)], self.asked)
        again = self.read(1)
        self.origin.transfers[1].finish()
        self.assert_read(1, again)
        self.clock.advance(QUIET * 0.9)
        self.assertEqual([(0, 1), (1, 1)], self.asked)
        self.clock.advance(QUIET * 0.2)
        self.assertEqual((8, 4), self.asked[2])

    def test_guesses_go_before_it(self) -> None:
        self.source.prefetch(0, CHUNK)
        self.fill(8, 12)
        self.source.prefetch(4 * CHUNK, CHUNK)
        self.assertEqual([(0, 1), (4, 1)], self.asked)

    def test_a_reader_does_not_wait_for_much_of_it(self) -> None:
        done = self.fill(0, 8)
        near, far = self.read(1), self.read(5)
        self.assertEqual([(0, 8), (5, 1)], self.asked)
        self.origin.transfers[1].finish()
        self.assert_read(5, far)
        self.origin.transfers[0].finish()
        self.assert_read(1, near)
        self.successResultOf(done)

    def test_whichever_brings_a_chunk_first_answers_its_readers(self) -> None:
        done = self.fill(0, 8)
        far = self.read(5)
        self.origin.transfers[0].finish()
        self.assert_read(5, far)
        self.successResultOf(done)
        self.origin.transfers[1].finish()
        self.assertEqual([], self.origin.live)

    def test_a_reader_takes_over_what_has_not_begun(self) -> None:
        self.read(0)
        self.fill(8, 12)
        self.read(10)
        self.assertEqual([(0, 1), (8, 4)], self.asked)


class GuessTests(QueueCase):
    def know(self, round_trip: float, bandwidth: float) -> None:
        self.queue.link.answered(round_trip)
        receive(self.queue.link, bandwidth, 100)

    def test_a_reader_far_into_a_guess_under_way_asks_for_itself_where_that_is_faster(self) -> None:
        self.know(0.001, 1e5)  # 60 chunks take 0.6 s
        self.source.prefetch(0, 60 * CHUNK)
        self.read(2)
        self.assertEqual([(0, 60)], self.asked)
        answer = self.read(50)
        self.assertEqual((50, 1), self.asked[1])
        self.origin.transfers[1].finish()
        self.assert_read(50, answer)

    def test_it_waits_where_a_request_takes_longer(self) -> None:
        self.know(0.5, 1e5)
        self.source.prefetch(0, 60 * CHUNK)
        self.read(50)
        self.assertEqual([(0, 60)], self.asked)


class ElsewhereTests(QueueCase):
    """Another process has the blob open too, and is at some of its chunks."""

    def setUp(self) -> None:
        super().setUp()
        self.theirs: set[int] = set()
        self.brought: set[int] = set()
        self.released: list[tuple[int, int]] = []
        self.patch(self.cached, "claim", lambda first, end: not self.theirs & set(range(first, end)))
        self.patch(self.cached, "release", lambda first, end: self.released.append((first, end)))
        self.patch(self.cached, "refresh", self.refresh)

    def refresh(self, first: int, end: int) -> bool:
        new = [chunk for chunk in self.brought if first <= chunk < end]
        for chunk in new:
            self.cached.store(chunk, [DATA[chunk * CHUNK : (chunk + 1) * CHUNK]])
            self.brought.remove(chunk)
            self.theirs.discard(chunk)
        return bool(new)

    def test_what_another_process_has_brought_is_at_hand(self) -> None:
        self.brought = {3}
        segments = self.source.read(3 * CHUNK, CHUNK)
        self.assertEqual(DATA[3 * CHUNK : 4 * CHUNK], joined(segments))  # type: ignore[arg-type]

    def test_what_it_is_at_is_waited_for(self) -> None:
        self.theirs = {3}
        answer = self.read(3)
        self.clock.advance(ELSEWHERE_POLL)
        self.brought = {3}
        self.assertNoResult(answer)
        self.clock.advance(ELSEWHERE_POLL)
        self.assert_read(3, answer)
        self.assertEqual([], self.asked)
        self.assertEqual([], self.clock.getDelayedCalls()[1:], "only the flush is still to come")

    def test_a_background_that_waits_does_not_delay_the_look(self) -> None:
        self.read(0)
        self.origin.transfers[0].finish()
        self.fill(8, 12)
        self.theirs = {3}
        answer = self.read(3)
        self.brought = {3}
        self.clock.advance(ELSEWHERE_POLL)
        self.assert_read(3, answer)

    def test_what_it_leaves_is_fetched(self) -> None:
        self.theirs = {3, 4}
        answer = self.source.read(3 * CHUNK, 2 * CHUNK)
        assert isinstance(answer, Deferred)
        self.brought = {3}
        self.clock.advance(ELSEWHERE_POLL)
        self.theirs.clear()
        self.clock.advance(ELSEWHERE_POLL)
        self.assertEqual([(4, 1)], self.asked)
        self.origin.transfers[0].finish()
        self.assertEqual(DATA[3 * CHUNK : 5 * CHUNK], joined(self.successResultOf(answer)))
        self.assertEqual((4, 5), self.released[-1])

    def test_a_process_that_brings_nothing_is_not_waited_for_for_ever(self) -> None:
        self.theirs = {3}
        answer = self.read(3)
        self.clock.pump([ELSEWHERE_POLL] * int(OTHERS_PATIENCE / ELSEWHERE_POLL - 2))
        self.assertEqual([], self.asked)
        self.clock.pump([ELSEWHERE_POLL] * 4)
        self.assertEqual([(3, 1)], self.asked)
        self.origin.transfers[0].finish()
        self.assert_read(3, answer)
        self.assertEqual([], self.released, "it was not ours")

    def test_each_new_chunk_is_a_sign_of_life(self) -> None:
        self.theirs = {3, 4}
        self.source.read(3 * CHUNK, 2 * CHUNK)
        self.clock.advance(OTHERS_PATIENCE * 0.9)
        self.brought = {3}
        self.clock.advance(ELSEWHERE_POLL)
        self.clock.advance(OTHERS_PATIENCE * 0.9)
        self.assertEqual([], self.asked)

    def test_other_chunks_do_not_wait_with_it(self) -> None:
        self.theirs = {3}
        self.read(3)
        self.read(9)
        self.assertEqual([(9, 1)], self.asked)

    def test_a_reader_that_leaves_ends_the_wait(self) -> None:
        self.theirs = {3}
        answer = self.read(3)
        answer.addErrback(lambda _: None)
        answer.cancel()
        self.theirs.clear()
        self.clock.advance(ELSEWHERE_POLL)
        self.assertEqual([], self.asked)
        self.assertEqual([], self.clock.getDelayedCalls())

    def test_a_guess_that_waits_becomes_a_readers_when_one_comes(self) -> None:
        self.theirs = {3}
        self.source.prefetch(3 * CHUNK, CHUNK)
        answer = self.read(3)
        self.theirs.clear()
        self.clock.pump([ELSEWHERE_POLL] * 2)
        self.assertEqual([(3, 1)], self.asked)
        self.origin.transfers[0].finish()
        self.assert_read(3, answer)


class WholeTests(QueueCase):
    """An origin that answers every range with the whole blob."""

    def refuse(self, number: int) -> None:
        self.origin.transfers[number].done.errback(RangesIgnored("the whole blob, for a part of it"))

    def test_it_is_fetched_once_and_as_a_whole(self) -> None:
        first, second = self.read(60), self.read(5)
        self.refuse(0)
        self.assertEqual((0, CHUNKS), self.asked[2])
        self.refuse(1)
        self.assertEqual(3, len(self.origin.transfers))
        whole = self.origin.transfers[2]
        whole.send(6 * CHUNK)
        self.assert_read(5, second)
        third = self.read(7)
        whole.finish()
        self.assert_read(60, first)
        self.assert_read(7, third)
        self.assertEqual(3, len(self.origin.transfers))
        self.assertTrue(self.cached.chunks.complete)

    def test_it_goes_on_when_its_readers_leave(self) -> None:
        answer = self.read(60)
        self.refuse(0)
        answer.addErrback(lambda _: None)
        answer.cancel()
        self.assertEqual([self.origin.transfers[1]], self.origin.live)

    def test_what_was_there_is_not_stored_again(self) -> None:
        self.read(0)
        self.origin.transfers[0].finish()
        self.read(60)
        self.refuse(1)
        whole = self.origin.transfers[2]
        whole.data = bytes(len(DATA))
        whole.send(3 * CHUNK)
        self.assertEqual(DATA[:CHUNK] + bytes(2 * CHUNK), os.pread(self.cached.fd, 3 * CHUNK, 0))

    def test_its_failure_fails_its_readers_and_the_next_one_tries_again(self) -> None:
        answer = self.read(60)
        self.refuse(0)
        self.origin.transfers[1].done.errback(ReadError("gone"))
        self.failureResultOf(answer, ReadError)
        self.read(61)
        self.assertEqual((0, CHUNKS), self.asked[2])
