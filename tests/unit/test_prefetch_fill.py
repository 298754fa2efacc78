"""The rest of a blob: fetched in the background, at a limited rate, and checked."""

from __future__ import annotations

from twisted.internet.defer import CancelledError, Deferred, succeed
from twisted.trial.unittest import SynchronousTestCase

from erofs_twisted.blocks.cache import CorruptBlob
from erofs_twisted.blocks.link import KIB, Link
from erofs_twisted.blocks.queue import FetchQueue
from erofs_twisted.blocks.source import BlobSource
from erofs_twisted.errors import ReadError
from erofs_twisted.prefetch.fill import LANES, RETRY_SECONDS, CacheFull, Fill
from tests.unit.blobs import ScriptedOrigin, ThreadlessReactor, blob, open_cached
from tests.unit.test_blocks_source import Told

REQUEST = 256 * KIB
DATA = blob(5 * REQUEST + 100)


class FillCase(SynchronousTestCase):
    def setUp(self) -> None:
        self.clock = ThreadlessReactor()
        self.origin = ScriptedOrigin(DATA)
        self.queue = FetchQueue(self.clock, Link())
        self.open()

    def open(self, digest: str | None = None) -> None:
        self.cached = open_cached(self.mktemp(), DATA, reactor=self.clock, digest=digest)
        self.source = BlobSource(self.origin, self.cached, self.clock, Told(), self.queue)

    def fill(self, room: int | None = None, rate: int | None = None) -> Fill:
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
        self.assertEqual(LANES, len(self.origin.live))
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
        self.assertEqual(LANES, len(self.origin.asked))

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
        self.assertEqual(LANES, len(self.origin.asked))

    def test_a_wrong_digest_poisons_the_blob(self) -> None:
        self.open(digest="sha256:" + "0" * 64)
        done = self.begin(self.fill())
        self.send_all()
        self.successResultOf(done)
        self.assertTrue(self.source.stats.poisoned)
        answer = self.source.read(0, 10)
        assert isinstance(answer, Deferred)
        self.failureResultOf(answer, CorruptBlob)


class FullFillTests(FillCase):
    def test_everything_is_fetched_side_by_side(self) -> None:
        done = Deferred.fromCoroutine(self.fill().now())
        self.assertEqual(6, len(self.origin.live))
        self.send_all()
        self.successResultOf(done)

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
