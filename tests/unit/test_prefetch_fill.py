"""The rest of a blob: fetched in the background, at a limited rate, and checked."""

from __future__ import annotations

from typing import Any

from twisted.internet.defer import CancelledError, Deferred, succeed
from twisted.trial.unittest import SynchronousTestCase

from erofs_twisted.blocks.cached import CorruptBlob
from erofs_twisted.blocks.link import KIB, Link
from erofs_twisted.blocks.queue import BACKGROUND_LIMIT, QUIET, FetchQueue
from erofs_twisted.blocks.source import BlobSource
from erofs_twisted.errors import ReadError
from erofs_twisted.prefetch.fill import AT_ONCE, LOOK, PATIENCE, RETRY_SECONDS, SOON, CacheFull, Fill
from tests.unit.blobs import ScriptedOrigin, ThreadlessReactor, blob, open_cached
from tests.unit.test_blocks_source import Told

REQUEST = 256 * KIB
DATA = blob(5 * REQUEST + 100)


class FillCase(SynchronousTestCase):
    def setUp(self) -> None:
        self.clock = ThreadlessReactor()
        self.origin = ScriptedOrigin(DATA)
        self.queue = FetchQueue(self.clock, Link())
        self.know(1e3)
        self.open()

    def know(self, bandwidth: float) -> None:
        """What comes from now on takes a round trip of 2 s, and has this bandwidth: so little that all takes
        long, where the test says no more."""
        self.queue.link = Link()
        self.queue.link.answered(REQUEST / bandwidth)
        self.queue.link._throughputs.append(bandwidth)
        self.queue.link._bandwidth = bandwidth

    def open(self, digest: str | None = None) -> None:
        self.cached = open_cached(self.mktemp(), DATA, reactor=self.clock, digest=digest)
        self.source = BlobSource(self.origin, self.cached, self.clock, Told(), self.queue)

    def fill(self, room: int = 1 << 40, rate: int | None = None) -> Fill:
        return Fill(self.clock, self.source, self.queue, lambda: succeed(room), rate)

    def begin(self, fill: Fill) -> Deferred[None]:
        return Deferred.fromCoroutine(fill.when_idle())

    def send_all(self) -> None:
        while self.origin.live:
            self.origin.live[0].finish()


class FillTests(FillCase):
    def test_all_that_is_missing_is_fetched_once_and_verified(self) -> None:
        self.source.read(REQUEST, 10)
        self.origin.transfers[0].finish()
        done = self.begin(self.fill())
        self.clock.advance(1)
        self.assertEqual(BACKGROUND_LIMIT, len(self.origin.live))
        self.send_all()
        self.successResultOf(done)
        self.assertEqual(len(DATA), sum(length for _, length in self.origin.asked))
        self.assertTrue(self.cached.chunks.complete)
        self.successResultOf(self.cached.verify())

    def test_a_complete_blob_costs_no_request(self) -> None:
        self.source.prefetch(0, len(DATA))
        self.send_all()
        asked = len(self.origin.asked)
        self.successResultOf(self.begin(self.fill()))
        self.assertEqual(asked, len(self.origin.asked))

    def test_a_rate_spreads_the_requests(self) -> None:
        done = self.begin(self.fill(rate=REQUEST))
        for seconds in range(1, 6):
            self.send_all()
            self.assertLessEqual(sum(length for _, length in self.origin.asked), seconds * REQUEST + 100)
            self.assertNoResult(done)
            self.clock.advance(1)
        self.clock.advance(1)
        self.send_all()
        self.successResultOf(done)

    def test_nothing_is_fetched_where_the_cache_has_no_room_for_the_rest(self) -> None:
        self.successResultOf(self.begin(self.fill(room=len(DATA) - 1)))
        self.assertEqual([], self.origin.asked)
        again = self.begin(self.fill(room=len(DATA)))
        self.assertNoResult(again)

    def test_it_ends_when_what_comes_is_not_kept(self) -> None:
        self.patch(self.cached, "store", lambda chunk, pieces: False)
        done = self.begin(self.fill())
        self.send_all()
        self.successResultOf(done)
        self.assertEqual(BACKGROUND_LIMIT, len(self.origin.asked))

    def test_it_goes_on_after_a_failure(self) -> None:
        done = self.begin(self.fill())
        self.origin.transfers[0].done.errback(ReadError("the registry is down"))
        self.send_all()
        self.assertNoResult(done)
        self.clock.advance(RETRY_SECONDS)
        self.send_all()
        self.clock.advance(1)
        self.send_all()
        self.successResultOf(done)
        self.assertTrue(self.cached.chunks.complete)

    def test_it_can_be_cancelled(self) -> None:
        done = self.begin(self.fill())
        done.cancel()
        self.failureResultOf(done, CancelledError)
        self.send_all()
        self.assertEqual(BACKGROUND_LIMIT, len(self.origin.asked))

    def test_a_wrong_digest_poisons_the_blob(self) -> None:
        self.open(digest="sha256:" + "0" * 64)
        done = self.begin(self.fill())
        self.send_all()
        self.successResultOf(done)
        self.assertTrue(self.source.stats.poisoned)
        answer = self.source.read(0, 10)
        assert isinstance(answer, Deferred)
        self.failureResultOf(answer, CorruptBlob)


class UrgencyTests(FillCase):
    """A reader waits for the first bytes when the fill begins."""

    def begin_beside_a_reader(self, seconds: float, **how: Any) -> Fill:
        self.know(len(DATA) / seconds)
        self.source.read(5 * REQUEST, 10)
        fill = self.fill(**how)
        self.begin(fill)
        return fill

    def test_what_takes_long_waits_until_the_link_is_idle(self) -> None:
        self.begin_beside_a_reader(2 * SOON)
        self.assertEqual(1, len(self.origin.live))
        self.origin.live[0].finish()
        self.clock.advance(QUIET)
        self.assertEqual(BACKGROUND_LIMIT, len(self.origin.live))

    def test_what_is_there_soon_goes_on_beside_readers_that_leave_room(self) -> None:
        self.begin_beside_a_reader(SOON / 2)
        self.assertEqual([REQUEST], [length for _, length in self.origin.asked[1:]])

    def test_what_can_be_there_at_once_does_not_wait(self) -> None:
        self.begin_beside_a_reader(AT_ONCE / 2)
        self.assertEqual((0, 4 * REQUEST), self.origin.asked[1])

    def test_with_a_limit_of_its_rate_it_is_never_urgent(self) -> None:
        self.begin_beside_a_reader(AT_ONCE / 2, rate=1 << 30)
        self.assertEqual(1, len(self.origin.live))

    def test_held_up_it_waits_unless_all_can_be_there_at_once(self) -> None:
        fill = self.fill()
        fill.is_held = lambda: True
        self.begin(fill)
        self.clock.pump([LOOK] * 10)
        self.assertEqual([], self.origin.asked)
        self.know(len(DATA) / AT_ONCE)
        self.clock.pump([LOOK] * 2)
        self.assertEqual((0, 4 * REQUEST), self.origin.asked[0])

    def test_let_go_it_goes_on(self) -> None:
        fill = self.fill()
        fill.is_held = lambda: True
        self.begin(fill)
        fill.is_held = lambda: False
        self.clock.advance(LOOK)
        self.assertEqual(BACKGROUND_LIMIT, len(self.origin.asked))

    def test_an_unknown_link_is_waited_for_but_not_for_long(self) -> None:
        self.queue.link = Link()
        self.begin(self.fill())
        self.clock.pump([LOOK] * int(PATIENCE / LOOK - 1))
        self.assertEqual([], self.origin.asked)
        self.clock.pump([LOOK] * 3)
        self.assertEqual(BACKGROUND_LIMIT, len(self.origin.asked))


class FullFillTests(FillCase):
    def test_everything_is_fetched_in_large_requests(self) -> None:
        done = Deferred.fromCoroutine(self.fill().now())
        self.send_all()
        self.successResultOf(done)
        self.assertEqual([(0, 4 * REQUEST), (4 * REQUEST, REQUEST + 100)], self.origin.asked)

    def test_a_failure_is_raised(self) -> None:
        done = Deferred.fromCoroutine(self.fill().now())
        self.origin.transfers[0].done.errback(ReadError("the registry is down"))
        self.assertIn("down", str(self.failureResultOf(done, ReadError).value))

    def test_a_wrong_digest_is_raised(self) -> None:
        self.open(digest="sha256:" + "0" * 64)
        done = Deferred.fromCoroutine(self.fill().now())
        self.send_all()
        self.failureResultOf(done, CorruptBlob)

    def test_a_full_cache_is_raised(self) -> None:
        self.patch(self.cached, "store", lambda chunk, pieces: False)
        done = Deferred.fromCoroutine(self.fill().now())
        self.send_all()
        self.failureResultOf(done, CacheFull)
