from __future__ import annotations

import itertools

from hypothesis import given
from hypothesis import strategies as st
from twisted.trial.unittest import SynchronousTestCase

from erofs_twisted.blocks.link import KIB, MIB
from erofs_twisted.blocks.readahead import ByteRange, Readahead, Windows

SIZE = 64 * MIB
BLOCK = 128 * KIB


def covered(ranges: list[ByteRange]) -> set[int]:
    """The 4 KiB pages that ranges touch."""
    return {page for start, end in ranges for page in range(start // 4096, -(-end // 4096))}


class RandomReadTests(SynchronousTestCase):
    def test_a_lone_read_brings_its_aligned_neighbourhood(self) -> None:
        self.assertEqual([(768 * KIB, 896 * KIB)], Readahead(SIZE).advise(800 * KIB, 4 * KIB, True))

    def test_a_neighbourhood_ends_with_the_blob(self) -> None:
        self.assertEqual([(0, 5000)], Readahead(5000).advise(4096, 100, True))

    def test_a_lone_read_of_what_is_there_brings_nothing(self) -> None:
        self.assertEqual([], Readahead(SIZE).advise(800 * KIB, 4 * KIB, False))

    def test_reads_far_apart_never_open_a_window(self) -> None:
        readahead = Readahead(SIZE)
        for place in range(40):
            advice = readahead.advise(place * 29 % 40 * MIB, 4 * KIB, True)
            self.assertEqual(128 * KIB, sum(end - start for start, end in advice))


class SequentialReadTests(SynchronousTestCase):
    def read_on(self, readahead: Readahead, start: int, count: int, missing: bool = False) -> list[ByteRange]:
        """``count`` reads that follow each other, and the advice to all but the first, which misses."""
        readahead.advise(start, BLOCK, True)
        advice = []
        for number in range(1, count):
            advice += readahead.advise(start + number * BLOCK, BLOCK, missing)
        return advice

    def ahead(self, reads: int) -> int:
        """How far the advice is beyond the reader after so many reads."""
        advice = self.read_on(Readahead(SIZE), 0, reads)
        return max(end for _, end in advice) - reads * BLOCK

    def test_the_second_read_opens_a_window(self) -> None:
        readahead = Readahead(SIZE)
        self.assertEqual([(0, BLOCK)], readahead.advise(0, BLOCK, True))
        self.assertEqual([(256 * KIB, 512 * KIB)], readahead.advise(BLOCK, BLOCK, False))

    def test_the_window_grows_with_what_was_read_up_to_its_maximum(self) -> None:
        self.assertLess(self.ahead(3), 1 * MIB)
        self.assertGreater(self.ahead(32), 2 * MIB)
        for reads in range(100, 120):
            self.assertTrue(2 * MIB <= self.ahead(reads) <= 4 * MIB + 256 * KIB)

    @given(st.integers(2, 200))
    def test_no_more_is_advised_than_twice_what_was_read_beyond_the_first_window(self, reads: int) -> None:
        advised = sum(end - start for start, end in self.read_on(Readahead(SIZE), 0, reads))
        self.assertLessEqual(advised, reads * BLOCK + max(reads * BLOCK, 256 * KIB) + 256 * KIB)

    @given(st.integers(2, 200))
    def test_a_stream_is_advised_every_byte_once_and_in_order(self, reads: int) -> None:
        advice = self.read_on(Readahead(SIZE), 0, reads)
        for before, after in itertools.pairwise(advice):
            self.assertEqual(before[1], after[0])

    def test_a_reader_within_its_window_is_advised_only_now_and_then(self) -> None:
        readahead = Readahead(SIZE)
        self.read_on(readahead, 0, 64)
        calls = [readahead.advise(64 * BLOCK + n * 4 * KIB, 4 * KIB, False) for n in range(1024)]
        self.assertLess(sum(map(bool, calls)), 6)

    def test_a_wide_window_goes_out_in_several_requests(self) -> None:
        readahead = Readahead(SIZE)
        self.read_on(readahead, 0, 64)
        advice = readahead.advise(64 * BLOCK, BLOCK, True)
        self.assertGreaterEqual(len(advice), 4)
        self.assertLessEqual(max(end - start for start, end in advice), MIB)

    def test_streams_are_followed_side_by_side(self) -> None:
        readahead = Readahead(SIZE)
        for number in range(10):
            for stream in range(8):
                readahead.advise(stream * 8 * MIB + number * BLOCK, BLOCK, False)
        advice = [readahead.advise(stream * 8 * MIB + 10 * BLOCK, BLOCK, True) for stream in range(8)]
        for stream, ranges in enumerate(advice):
            self.assertGreater(ranges[-1][1], stream * 8 * MIB + 11 * BLOCK + MIB)

    def test_the_stream_longest_unread_is_forgotten_first(self) -> None:
        readahead = Readahead(SIZE, Windows(streams=2))
        readahead.advise(0, BLOCK, True)
        readahead.advise(20 * MIB, BLOCK, True)
        readahead.advise(BLOCK, BLOCK, False)
        readahead.advise(40 * MIB, BLOCK, False)
        self.assertTrue(readahead.advise(2 * BLOCK, 4 * BLOCK, False))
        self.assertEqual([], readahead.advise(20 * MIB + BLOCK, BLOCK, False))

    def test_a_small_gap_or_step_back_does_not_end_a_stream(self) -> None:
        readahead = Readahead(SIZE)
        readahead.advise(0, BLOCK, True)
        self.assertTrue(readahead.advise(BLOCK + 64 * KIB, BLOCK, False))
        self.assertTrue(readahead.advise(2 * BLOCK, 4 * BLOCK, False))

    def test_a_stream_that_finds_its_window_missing_asks_again_from_where_it_is(self) -> None:
        readahead = Readahead(SIZE)
        self.read_on(readahead, 0, 8)
        advice = readahead.advise(8 * BLOCK, BLOCK, True)
        self.assertEqual(8 * BLOCK, advice[0][0])
        self.assertGreaterEqual(advice[-1][1], 9 * BLOCK + MIB)

    def test_a_stream_that_misses_nothing_is_not_helped(self) -> None:
        readahead = Readahead(SIZE)
        for number in range(100):
            self.assertEqual([], readahead.advise(number * BLOCK, BLOCK, False))
        self.assertTrue(readahead.advise(100 * BLOCK, BLOCK, True))
        self.assertTrue(any(readahead.advise((101 + n) * BLOCK, BLOCK, False) for n in range(40)))

    def test_small_reads_that_are_only_near_to_each_other_are_no_stream(self) -> None:
        readahead = Readahead(SIZE)
        for number in range(100):
            advice = readahead.advise(number * 64 * KIB, 4 * KIB, True)
            self.assertEqual(128 * KIB, sum(end - start for start, end in advice))

    def test_a_stream_ends_with_the_blob(self) -> None:
        readahead = Readahead(10 * BLOCK)
        advice = self.read_on(readahead, 0, 10)
        self.assertEqual(10 * BLOCK, advice[-1][1])


class AnyReadTests(SynchronousTestCase):
    @given(
        st.integers(1, 3 * MIB),
        st.lists(st.tuples(st.floats(0, 1), st.floats(0, 1), st.booleans()), max_size=40),
    )
    def test_advice_lies_within_the_blob_and_covers_a_read_that_misses(
        self, size: int, reads: list[tuple[float, float, bool]]
    ) -> None:
        readahead = Readahead(size)
        for where, how_much, missing in reads:
            offset = min(int(where * size), size - 1)
            length = max(int(how_much * (size - offset)), 1)
            advice = readahead.advise(offset, length, missing)
            for start, end in advice:
                self.assertTrue(0 <= start < end <= size)
                self.assertLessEqual(end - start, MIB)
            if missing:
                self.assertLessEqual(covered([(offset, offset + length)]), covered(advice))
