from __future__ import annotations

import itertools

from hypothesis import given
from hypothesis import strategies as st
from twisted.trial.unittest import SynchronousTestCase

from erofs_twisted.blocks.chunks import ABSENT, FRESH, PRESENT, Chunking, ChunkMap, chunk_size_for, runs_of

COUNT = 24
CHUNKS = st.integers(0, COUNT)
SPANS = st.tuples(CHUNKS, CHUNKS).map(lambda pair: (min(pair), max(pair)))
SETS = st.sets(st.integers(0, COUNT - 1))


def map_of(chunks: set[int]) -> ChunkMap:
    result = ChunkMap(COUNT)
    for chunk in chunks:
        result.set(chunk, chunk + 1)
    return result


def chunks_of(runs: list[tuple[int, int]]) -> list[int]:
    return [chunk for first, end in runs for chunk in range(first, end)]


class ChunkingTests(SynchronousTestCase):
    def test_large_blobs_are_cut_in_larger_chunks(self) -> None:
        gib = 1 << 30
        sizes = {0: 4, gib: 4, 2 * gib: 4, 2 * gib + 1: 8, 8 * gib: 16, 32 * gib: 64, 1024 * gib: 64}
        self.assertEqual(sizes, {size: chunk_size_for(size) >> 10 for size in sizes})

    def test_the_last_chunk_is_what_is_left(self) -> None:
        chunking = Chunking(10, 4)
        self.assertEqual([4, 4, 2], [chunking.length(chunk) for chunk in range(chunking.count)])

    def test_an_empty_blob_has_no_chunks(self) -> None:
        self.assertEqual(0, Chunking(0, 4).count)

    def test_a_chunk_size_that_is_no_power_of_two_is_refused(self) -> None:
        for size in (0, -4, 3, 48):
            self.assertRaises(ValueError, Chunking, 10, size)

    @given(st.integers(1, 200), st.integers(0, 6), st.data())
    def test_a_span_is_the_chunks_that_hold_a_byte_of_the_range(
        self, size: int, bits: int, data: st.DataObject
    ) -> None:
        chunking = Chunking(size, 1 << bits)
        offset = data.draw(st.integers(0, size - 1))
        length = data.draw(st.integers(1, size - offset))
        first, end = chunking.span(offset, length)
        touched = {byte >> bits for byte in range(offset, offset + length)}
        self.assertEqual(touched, set(range(first, end)))
        self.assertLessEqual(end, chunking.count)


class ChunkMapTests(SynchronousTestCase):
    @given(SETS, SPANS)
    def test_present_means_that_no_chunk_of_the_range_is_missing(
        self, chunks: set[int], span: tuple[int, int]
    ) -> None:
        self.assertEqual(set(range(*span)) <= chunks, map_of(chunks).present(*span))

    @given(SETS, SPANS)
    def test_runs_are_the_chunks_in_order_as_few_as_can_be(
        self, chunks: set[int], span: tuple[int, int]
    ) -> None:
        subject = map_of(chunks)
        for runs, expected in (
            (list(subject.runs_missing(*span)), set(range(*span)) - chunks),
            (list(subject.runs_present(*span)), set(range(*span)) & chunks),
        ):
            self.assertEqual(sorted(expected), chunks_of(runs))
            self.assertTrue(all(a[1] < b[0] for a, b in itertools.pairwise(runs)))

    @given(st.lists(st.tuples(st.booleans(), SPANS)))
    def test_the_count_of_missing_chunks_and_complete_follow_every_change(
        self, changes: list[tuple[bool, tuple[int, int]]]
    ) -> None:
        subject, model = ChunkMap(COUNT), set[int]()
        for there, span in changes:
            if there:
                subject.set(*span)
                model |= set(range(*span))
            else:
                subject.unset(*span)
                model -= set(range(*span))
            self.assertEqual(COUNT - len(model), subject.missing)
            self.assertEqual(len(model) == COUNT, subject.complete)

    @given(SETS, SETS)
    def test_merge_is_the_union(self, ours: set[int], theirs: set[int]) -> None:
        subject = map_of(ours)
        subject.merge(map_of(theirs))
        self.assertEqual(map_of(ours | theirs).to_bytes(), subject.to_bytes())
        self.assertEqual(COUNT - len(ours | theirs), subject.missing)

    @given(SETS)
    def test_bytes_bring_the_map_back(self, chunks: set[int]) -> None:
        subject = ChunkMap.from_bytes(map_of(chunks).to_bytes())
        self.assertEqual(sorted(chunks), chunks_of(list(subject.runs_present(0, COUNT))))
        self.assertEqual(COUNT - len(chunks), subject.missing)

    @given(st.binary(min_size=1))
    def test_foreign_bytes_are_no_map(self, data: bytes) -> None:
        if set(data) - {0x00, 0xC5}:
            self.assertRaises(ValueError, ChunkMap.from_bytes, data)

    def test_a_map_of_nothing_is_complete(self) -> None:
        self.assertTrue(ChunkMap(0).complete)
        self.assertFalse(ChunkMap(1).complete)

    def test_clear_forgets_every_chunk(self) -> None:
        subject = map_of({0, 5})
        subject.clear()
        self.assertEqual(COUNT, subject.missing)

    @given(SETS, SETS)
    def test_keep_is_the_intersection(self, ours: set[int], theirs: set[int]) -> None:
        subject = map_of(ours)
        subject.keep(map_of(theirs))
        self.assertEqual(map_of(ours & theirs).to_bytes(), subject.to_bytes())
        self.assertEqual(COUNT - len(ours & theirs), subject.missing)

    @given(SETS)
    def test_a_copy_does_not_follow(self, chunks: set[int]) -> None:
        subject = map_of(chunks)
        copy = subject.copy()
        subject.clear()
        self.assertEqual(map_of(chunks).to_bytes(), copy.to_bytes())


MARKS = st.lists(st.sampled_from((ABSENT, FRESH, PRESENT)), max_size=COUNT).map(bytes)


class MarksTests(SynchronousTestCase):
    @given(MARKS)
    def test_what_is_fresh_is_there_if_it_is_believed(self, marks: bytes) -> None:
        for with_fresh, there in ((True, (FRESH, PRESENT)), (False, (PRESENT,))):
            expected = {chunk for chunk, mark in enumerate(marks) if mark in there}
            subject = ChunkMap.from_marks(marks, with_fresh=with_fresh)
            self.assertEqual(sorted(expected), chunks_of(list(subject.runs_present(0, len(marks)))))

    @given(SETS, MARKS, st.data())
    def test_what_is_taken_over_is_there_beside_the_rest(
        self, ours: set[int], marks: bytes, data: st.DataObject
    ) -> None:
        first = data.draw(st.integers(0, COUNT - len(marks)))
        theirs = {first + chunk for chunk, mark in enumerate(marks) if mark != ABSENT}
        subject = map_of(ours)
        self.assertEqual(not theirs <= ours, subject.take_over(first, marks))
        self.assertEqual(map_of(ours | theirs).to_bytes(), subject.to_bytes())
        self.assertEqual(COUNT - len(ours | theirs), subject.missing)

    @given(MARKS, st.sampled_from((ABSENT, FRESH, PRESENT)))
    def test_runs_are_all_chunks_of_a_mark(self, marks: bytes, mark: int) -> None:
        runs = list(runs_of(mark, marks))
        self.assertEqual([chunk for chunk, m in enumerate(marks) if m == mark], chunks_of(runs))
        self.assertTrue(all(a[1] < b[0] for a, b in itertools.pairwise(runs)))
