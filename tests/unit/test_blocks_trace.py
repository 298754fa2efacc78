"""Traces: what is recorded, how it is written down, and what is refused when it is read."""

from __future__ import annotations

import json
from typing import Any

from hypothesis import example, given
from hypothesis import strategies as st
from twisted.trial.unittest import SynchronousTestCase

from erofs_twisted.blocks import trace as module
from erofs_twisted.blocks.trace import MAX_ENCODED, MAX_RANGES, InvalidTrace, Recorder, Trace
from erofs_twisted.errors import ErofsTwistedError

DIGEST = "sha256:" + "a1" * 32
CHUNK = 16
SIZE = 10 * CHUNK - 3
LAST = SIZE - SIZE % CHUNK
READS = st.lists(
    st.integers(0, SIZE - 1).flatmap(lambda start: st.tuples(st.just(start), st.integers(1, SIZE - start)))
)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
)
FIELDS: dict[str, Any] = json.loads(Trace(DIGEST, SIZE, ((0, 5), (9, 20))).encode())


def record(reads: list[tuple[int, int]], size: int = SIZE) -> Trace:
    recorder = Recorder(DIGEST, size, CHUNK)
    for offset, length in reads:
        recorder.read(offset, length)
    return recorder.trace()


class RecorderTests(SynchronousTestCase):
    def test_the_order_is_that_of_the_first_reads(self) -> None:
        ranges = record([(5 * CHUNK, 1), (0, 1), (5 * CHUNK + 3, 2), (9 * CHUNK, 1)]).ranges
        self.assertEqual(((5 * CHUNK, 6 * CHUNK), (0, CHUNK), (LAST, SIZE)), ranges)

    def test_a_sequential_reader_makes_one_range(self) -> None:
        self.assertEqual(((0, SIZE),), record([(offset, 1) for offset in range(SIZE)]).ranges)

    def test_a_read_around_what_is_known_adds_only_what_is_new(self) -> None:
        ranges = record([(3 * CHUNK, CHUNK), (2 * CHUNK, 3 * CHUNK)]).ranges
        parts = ((3 * CHUNK, 4 * CHUNK), (2 * CHUNK, 3 * CHUNK), (4 * CHUNK, 5 * CHUNK))
        self.assertEqual(parts, ranges)

    @given(READS)
    def test_exactly_the_chunks_that_were_read_are_in_it(self, reads: list[tuple[int, int]]) -> None:
        wanted = {byte // CHUNK for start, length in reads for byte in range(start, start + length)}
        trace = record(reads)
        found = [byte // CHUNK for start, end in trace.ranges for byte in range(start, end)]
        self.assertEqual(wanted, set(found))
        self.assertEqual(trace.length, len(found))

    @given(READS)
    def test_a_chunk_comes_no_later_than_those_that_were_read_after_it(
        self, reads: list[tuple[int, int]]
    ) -> None:
        touched = [byte // CHUNK for start, length in reads for byte in range(start, start + length)]
        found = [byte // CHUNK for start, end in record(reads).ranges for byte in range(start, end)]
        self.assertEqual(list(dict.fromkeys(touched)), list(dict.fromkeys(found)))

    @given(READS)
    def test_the_version_changes_just_when_the_trace_does(self, reads: list[tuple[int, int]]) -> None:
        recorder = Recorder(DIGEST, SIZE, CHUNK)
        for offset, length in reads:
            before = recorder.version, recorder.trace()
            recorder.read(offset, length)
            self.assertEqual(before[1] == recorder.trace(), before[0] == recorder.version)

    def test_what_is_recorded_has_a_limit_and_can_still_be_kept(self) -> None:
        self.patch(module, "MAX_RANGES", 3)
        trace = record([(chunk * CHUNK, 1) for chunk in (8, 6, 4, 2, 5, 0)])
        self.assertEqual([8, 6, 4], [start // CHUNK for start, _ in trace.ranges])
        self.assertEqual(trace, Trace.decode(trace.encode()))

    def test_the_longest_trace_of_the_largest_blob_is_within_the_limit(self) -> None:
        top = 2**63 - 1
        ranges = tuple((top - 2 * n - 1, top - 2 * n) for n in range(MAX_RANGES))
        trace = Trace("sha512:" + "f" * 128, top, ranges)
        self.assertLessEqual(len(trace.encode()), MAX_ENCODED)
        self.assertEqual(trace, Trace.decode(trace.encode()))


class CodecTests(SynchronousTestCase):
    @given(READS)
    def test_what_was_recorded_is_decoded_as_it_was(self, reads: list[tuple[int, int]]) -> None:
        trace = record(reads)
        self.assertEqual(trace, Trace.decode(trace.encode()))

    @given(st.binary() | JSON.map(lambda value: json.dumps(value).encode()))
    @example(b"[" * 100_000)
    @example(b"9" * 5000)
    def test_garbage_is_refused_by_an_error_that_can_be_shown(self, data: bytes) -> None:
        self.assertRaises(InvalidTrace, Trace.decode, data)

    @given(st.sampled_from(sorted(FIELDS)), JSON)
    def test_a_field_of_garbage_is_refused_or_means_what_it_says(self, name: str, value: Any) -> None:
        try:
            trace = Trace.decode(json.dumps({**FIELDS, name: value}).encode())
        except InvalidTrace:
            return
        if name in ("digest", "size"):
            self.assertEqual(value, getattr(trace, name))
        elif name == "ranges":
            self.assertEqual([list(pair) for pair in trace.ranges], value)
        else:
            self.assertEqual(FIELDS[name], value)

    @given(st.lists(st.tuples(st.integers(-1, 12), st.integers(-1, 12)), max_size=4))
    def test_ranges_are_taken_if_they_could_have_been_recorded(self, ranges: list[tuple[int, int]]) -> None:
        known: set[int] = set()
        possible = True
        for number, (start, end) in enumerate(ranges):
            possible &= 0 <= start < end <= 10 and known.isdisjoint(range(start, end))
            possible &= not number or ranges[number - 1][1] != start
            known.update(range(start, end))
        data = json.dumps({**FIELDS, "size": 10, "ranges": ranges}).encode()
        if possible:
            self.assertEqual(tuple(ranges), Trace.decode(data).ranges)
        else:
            self.assertRaises(InvalidTrace, Trace.decode, data)

    def test_each_mistake_is_named(self) -> None:
        cases = {
            "version is 2": {"version": 2},
            "version is True": {"version": True},
            "mediaType is 'text/plain'": {"mediaType": "text/plain"},
            "not the digest": {"digest": "md5:1"},
            "not a range of a blob of 157 bytes": {"ranges": [[100, 158]]},
            "pairs of numbers": {"ranges": [[1, 2, 3]]},
            "overlaps": {"ranges": [[5, 9], [0, 6]]},
            "these are one": {"ranges": [[5, 9], [9, 10]]},
            "at most 32768": {"ranges": [[0, 1]] * (MAX_RANGES + 1)},
        }
        for message, change in cases.items():
            data = json.dumps({**FIELDS, **change}).encode()
            self.assertIn(message, str(self.assertRaises(InvalidTrace, Trace.decode, data)))
        self.assertIn("bytes, at most", str(self.assertRaises(InvalidTrace, Trace.decode, bytes(3 << 20))))

    def test_fields_of_later_minor_versions_are_passed_over(self) -> None:
        trace = Trace.decode(json.dumps({**FIELDS, "comment": "from the future"}).encode())
        self.assertEqual(((0, 5), (9, 20)), trace.ranges)

    def test_a_bad_trace_is_an_operators_error_and_a_value_error(self) -> None:
        error = self.assertRaises(InvalidTrace, Trace, DIGEST, -1, ())
        self.assertIsInstance(error, ErofsTwistedError)
        self.assertIsInstance(error, ValueError)


class RequestTests(SynchronousTestCase):
    def test_a_long_range_is_fetched_in_parts(self) -> None:
        self.assertEqual(3, Trace(DIGEST, 100, ((50, 61), (0, 10))).requests(longest=10))
        self.assertEqual(0, Trace(DIGEST, 100, ()).requests(longest=10))
