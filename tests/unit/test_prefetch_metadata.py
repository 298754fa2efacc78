from __future__ import annotations

import stat
from typing import Any

import attrs
from twisted.internet.base import DelayedCall
from twisted.internet.defer import CancelledError, Deferred
from twisted.trial.unittest import SynchronousTestCase

from erofs_twisted.blocks.source import BlobSource
from erofs_twisted.errors import ReadError
from erofs_twisted.prefetch.metadata import MetadataPolicy, first_guess, prefetch_metadata
from tests.unit.blobs import ScriptedOrigin, ThreadlessReactor, open_cached
from tests.unit.erofs_trees import BLOCK, ROOT, HandMade, inode

CHUNK = 64 * 1024
BLOCKS = CHUNK // BLOCK
MIB = 1024 * 1024
DIR, FILE = stat.S_IFDIR, stat.S_IFREG


def at(chunk: int, slot: int = 0) -> int:
    """The number of an inode in a chunk."""
    return chunk * CHUNK // 32 + slot


def spread() -> HandMade:
    """Of 64 chunks: two directories in chunks 20 and 40, with data in 22 and 50, and a file in 60."""
    image = HandMade(64 * BLOCKS, inodes=4)
    image.dir(ROOT, {"one": (at(20), DIR), "two": (at(40), DIR)})
    image.dir(at(20), {"file": (at(20, 3), FILE)}, block=22 * BLOCKS)
    image.dir(at(40), {"far": (at(60), FILE)}, block=50 * BLOCKS)
    image.file(at(20, 3))
    image.file(at(60))
    return image


class PrefetchTests(SynchronousTestCase):
    closed = False

    def begin(self, image: HandMade, **policy: int | float) -> Deferred[int]:
        self.clock = ThreadlessReactor()
        self.origin = ScriptedOrigin(bytes(image.data))
        cached = open_cached(self.mktemp(), self.origin.data, chunk_size=CHUNK, reactor=self.clock)
        self.source = BlobSource(self.origin, cached, self.clock)
        return self.go_on(image, **policy)

    def go_on(self, image: HandMade, **policy: int | float) -> Deferred[int]:
        chosen = MetadataPolicy(**{"gap": 0, "granule": CHUNK, "first_least": BLOCK, **policy})  # type: ignore[arg-type]
        work = prefetch_metadata(self.source, image.superblock, self.clock, chosen)
        return Deferred.fromCoroutine(work)

    def tearDown(self) -> None:
        if not self.closed:
            self.source.close()

    def rounds(self) -> list[list[int]]:
        """Answer all that is asked for, until nothing more is; the chunks of each round."""
        found = []
        while live := self.origin.live:
            chunks = []
            for transfer in live:
                end = transfer.offset + transfer.length
                chunks += range(transfer.offset // CHUNK, -(-end // CHUNK))
                transfer.finish()
            found.append(sorted(chunks))
        return found

    def test_all_that_is_known_and_missing_is_asked_for_at_once(self) -> None:
        done = self.begin(spread())
        self.assertEqual([[0], [20, 40], [22, 50], [60]], self.rounds())
        self.assertEqual(6 * CHUNK, self.successResultOf(done))
        for nid in (ROOT, at(20), at(60)):
            self.assertIsNotNone(self.source.peek(nid * 32, 64))

    def test_what_has_come_is_used_before_the_rest_has(self) -> None:
        done = self.begin(spread())
        self.origin.live[0].finish()
        _, two = self.origin.live
        two.finish()
        self.assertEqual(50 * CHUNK, self.origin.live[-1].offset)
        self.rounds()
        self.successResultOf(done)

    def test_what_is_in_the_cache_is_not_asked_for(self) -> None:
        done = self.begin(spread())
        self.rounds()
        self.successResultOf(done)
        self.successResultOf(self.go_on(spread()))
        self.assertEqual(6, len(self.origin.asked))

    def test_an_image_that_is_all_there_is_not_walked_through(self) -> None:
        self.begin(spread())
        self.source.prefetch(0, self.source.size)
        self.rounds()
        self.assertEqual(0, self.successResultOf(self.go_on(spread())))

    def test_ranges_that_are_near_to_each_other_are_one_request(self) -> None:
        image = HandMade(64 * BLOCKS)
        image.dir(ROOT, {"a": (at(20), FILE), "b": (at(22), FILE), "c": (at(25), FILE)})
        for chunk in (20, 22, 25):
            image.file(at(chunk))
        self.begin(image, gap=CHUNK)
        self.assertEqual([[0], [20, 21, 22, 25]], self.rounds())
        self.assertEqual([(0, CHUNK), (20 * CHUNK, 3 * CHUNK), (25 * CHUNK, CHUNK)], self.origin.asked)

    def test_a_small_images_metadata_comes_by_the_first_guess(self) -> None:
        image = HandMade(64 * BLOCKS, inodes=2000)
        image.dir(ROOT, {"sub": (at(1), DIR)})
        image.dir(at(1), {"file": (at(2), FILE)}, block=3 * BLOCKS)
        image.file(at(2))
        done = self.begin(image, first_least=4 * CHUNK)
        self.assertEqual([[0, 1, 2, 3, 4]], self.rounds())
        self.assertEqual(5 * CHUNK, self.successResultOf(done))

    def test_it_stops_at_so_many_bytes(self) -> None:
        done = self.begin(spread(), most=3 * CHUNK)
        self.assertEqual([[0], [20, 40]], self.rounds())
        self.assertEqual(3 * CHUNK, self.successResultOf(done))

    def test_the_last_chunk_counts_for_what_it_has(self) -> None:
        image = HandMade(20)
        image.dir(ROOT, {"file": (19 * BLOCK // 32, FILE)})
        done = self.begin(image)
        self.assertEqual([[0], [1]], self.rounds())
        self.assertEqual(20 * BLOCK, self.successResultOf(done))

    def test_long_ranges_come_in_pieces_in_order_so_many_at_a_time(self) -> None:
        image = HandMade(64 * BLOCKS, inodes=100_000)
        image.dir(ROOT, {"last": (at(9), FILE)})
        image.file(at(9))
        self.begin(image, first_least=10 * CHUNK - ROOT * 32, request=2 * CHUNK, lanes=3)
        self.assertEqual([(0, 2 * CHUNK), (2 * CHUNK, 2 * CHUNK), (4 * CHUNK, 2 * CHUNK)], self.origin.asked)
        self.origin.live[0].finish()
        self.assertEqual((6 * CHUNK, 2 * CHUNK), self.origin.asked[-1])
        self.assertEqual([[2, 3, 4, 5, 6, 7], [8, 9]], self.rounds())

    def test_any_number_of_pieces_may_be_at_hand(self) -> None:
        image = HandMade(64 * BLOCKS, inodes=100_000)
        image.dir(ROOT, {"near": (ROOT + 40, FILE)})
        image.file(ROOT + 40)
        self.begin(image)
        self.source.prefetch(0, 63 * CHUNK)
        self.rounds()
        asked = len(self.origin.asked)
        done = self.go_on(image, granule=BLOCK, request=BLOCK, first_least=60 * CHUNK)
        self.assertEqual(60 * CHUNK, self.successResultOf(done))
        self.assertEqual(asked, len(self.origin.asked))

    def test_damaged_metadata_ends_it_without_an_error(self) -> None:
        image = HandMade(64 * BLOCKS)
        image.put(ROOT * 32, b"\xff" * 64)
        done = self.begin(image)
        self.assertEqual([[0]], self.rounds())
        self.assertEqual(CHUNK, self.successResultOf(done))

    def test_what_cannot_be_fetched_ends_it_without_an_error(self) -> None:
        done = self.begin(spread())
        self.origin.live[0].finish()
        for transfer in self.origin.live:
            transfer.done.errback(ReadError("no such luck"))
        self.successResultOf(done)
        self.assertEqual([], self.origin.live)

    def test_what_the_cache_does_not_keep_ends_it_without_an_error(self) -> None:
        done = self.begin(spread())
        self.patch(self.source._cached, "store", lambda chunk, pieces: False)
        self.assertEqual([[0]], self.rounds())
        self.assertEqual(CHUNK, self.successResultOf(done))

    def test_cancelled_it_asks_for_nothing_more(self) -> None:
        done = self.begin(spread())
        self.origin.live[0].finish()
        done.cancel()
        self.failureResultOf(done, CancelledError)
        self.rounds()
        self.assertEqual(3, len(self.origin.asked))
        self.assertEqual([], self.clock.getDelayedCalls()[1:])

    def test_closing_the_source_ends_it(self) -> None:
        done = self.begin(spread())
        self.origin.live[0].finish()
        self.closed = True
        self.source.close()
        self.successResultOf(done)

    def test_its_reads_are_no_readers(self) -> None:
        done = self.begin(spread())
        self.rounds()
        self.successResultOf(done)
        self.assertEqual(0, self.source.stats.bytes_from_cache)


class SliceTests(SynchronousTestCase):
    def test_a_long_walk_lets_the_reactor_go_on(self) -> None:
        image = HandMade(4 * BLOCKS, inodes=100)
        image.dir(ROOT, {f"f{number}": (ROOT + 200 + number, FILE) for number in range(100)}, block=20)
        for number in range(100):
            image.put((ROOT + 200 + number) * 32, inode())
        clock = SlowClock()
        origin = ScriptedOrigin(bytes(image.data))
        source = BlobSource(origin, open_cached(self.mktemp(), origin.data, reactor=clock), clock)
        self.addCleanup(source.close)
        done = Deferred.fromCoroutine(
            prefetch_metadata(
                source, image.superblock, clock, MetadataPolicy(granule=CHUNK, slice_seconds=0.01)
            )
        )
        for transfer in origin.live:
            transfer.finish()
        while not done.called:
            clock.advance(0)
        # A millisecond goes by with each of the 102 looks.
        self.assertGreaterEqual(clock.pauses, 8)
        self.assertLessEqual(clock.pauses, 20)
        self.assertEqual(4 * CHUNK, self.successResultOf(done))

    def test_cancelled_between_two_slices_it_leaves_no_call_behind(self) -> None:
        image = HandMade(4 * BLOCKS)
        image.dir(ROOT, {"file": (ROOT + 200, FILE)})
        clock = SlowClock()
        origin = ScriptedOrigin(bytes(image.data))
        source = BlobSource(origin, open_cached(self.mktemp(), origin.data, reactor=clock), clock)
        self.addCleanup(source.close)
        done = Deferred.fromCoroutine(
            prefetch_metadata(source, image.superblock, clock, MetadataPolicy(granule=CHUNK, slice_seconds=0))
        )
        for transfer in origin.live:
            transfer.finish()
        pending = len(clock.getDelayedCalls())
        done.cancel()
        self.failureResultOf(done, CancelledError)
        self.assertEqual(pending - 1, len(clock.getDelayedCalls()))


class SlowClock(ThreadlessReactor):
    """A millisecond goes by whenever somebody looks at it."""

    pauses = 0
    """Calls that were to come at once."""

    def callLater(self, delay: float, call: Any, *arguments: Any, **named: Any) -> DelayedCall:
        self.pauses += delay == 0
        return super().callLater(delay, call, *arguments, **named)

    def seconds(self) -> float:
        self.rightNow += 0.001
        return self.rightNow


class FirstGuessTests(SynchronousTestCase):
    POLICY = MetadataPolicy()

    def guess(self, size: int, **fields: int) -> tuple[int, int]:
        superblock = attrs.evolve(HandMade(16).superblock, **fields)
        return first_guess(superblock, size, self.POLICY)

    def test_it_grows_with_the_number_of_inodes_within_bounds(self) -> None:
        root = ROOT * 32
        self.assertEqual((root, root + 256 * 1024), self.guess(100 * MIB, inodes=10))
        self.assertEqual((root, root + 1280000), self.guess(100 * MIB, inodes=10_000))
        self.assertEqual((root, root + 4 * MIB), self.guess(100 * MIB, inodes=1_000_000))

    def test_it_is_not_more_than_a_tenth_of_the_image(self) -> None:
        start, end = self.guess(10 * MIB, inodes=1_000_000)
        self.assertEqual(MIB, end - start)

    def test_it_starts_where_the_inodes_do(self) -> None:
        start, _ = self.guess(10 * MIB, meta_block=100)
        self.assertEqual(100 * BLOCK, start)

    def test_it_ends_with_the_image(self) -> None:
        self.assertEqual((90 * MIB, 90 * MIB + 4096), self.guess(90 * MIB + 4096, meta_block=90 * 256))
        self.assertEqual((50, 50), self.guess(50, root_nid=1 << 63))
