"""What transfers tell of the way that they come."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st
from twisted.trial.unittest import SynchronousTestCase

from erofs_twisted.blocks.link import KIB, MIB, RATES, ROUND_TRIPS, SAMPLE, UNKNOWN_WINDOW, Link


def known(round_trip: float, bandwidth: float, pieces: int = 100) -> Link:
    """A link that has shown itself."""
    link = Link()
    link.answered(round_trip)
    receive(link, bandwidth, pieces)
    return link


def receive(link: Link, bandwidth: float, pieces: int, start: float = 0.0) -> float:
    """Pieces that follow each other; the time when the last one came."""
    now, size = start, max(int(bandwidth / 1000), 1)
    for _ in range(pieces * SAMPLE // 10 // size + 1):
        now += size / bandwidth
        link.received(now, size)
    return now


def share(link: Link) -> int:
    """What comes in a quarter of a round trip."""
    return link.share(4, default=128 * KIB, least=32 * KIB, most=MIB)


class MeasureTests(SynchronousTestCase):
    def assert_rate(self, expected: float, link: Link) -> None:
        assert link.bandwidth is not None
        self.assertLess(abs(link.bandwidth - expected), expected / 1000)

    def test_nothing_is_known_at_first(self) -> None:
        link = Link()
        self.assertEqual(
            (None, None, None, None), (link.round_trip, link.bandwidth, link.product, link.seconds(1))
        )
        self.assertEqual(UNKNOWN_WINDOW, link.window)
        self.assertEqual(128 * KIB, share(link))

    def test_the_round_trip_is_the_shortest_of_late(self) -> None:
        link = Link()
        for seconds in (0.3, 0.025, 0.1):
            link.answered(seconds)
        self.assertEqual(0.025, link.round_trip)
        for _ in range(ROUND_TRIPS):
            link.answered(0.08)
        self.assertEqual(0.08, link.round_trip)

    def test_the_bandwidth_is_that_of_all_transfers_together(self) -> None:
        self.assert_rate(12.5e6, known(0.025, 12.5e6))

    def test_waits_for_answers_lower_no_rate(self) -> None:
        link, now = known(0.025, 12.5e6), 10.0
        for _ in range(100):
            for _ in range(10):
                link.received(now, 12_500)
                now += 0.001
            now += 0.025
        self.assert_rate(12.5e6, link)

    def test_a_few_bytes_that_had_waited_for_us_raise_no_rate(self) -> None:
        link = known(0.025, 12.5e6)
        receive(link, 1e9, 10, start=10.0)
        self.assert_rate(12.5e6, link)

    def test_throughput_is_what_came_in_all_with_the_waits(self) -> None:
        link, now = Link(), 0.0
        self.assertIsNone(link.throughput)
        for _ in range(20):  # answers that had waited for us, all at once, every 25 ms
            for _ in range(28):
                link.received(now, 4096)
                now += 0.0001
            now += 0.025
        assert link.throughput is not None and link.bandwidth is not None
        self.assertLess(abs(link.throughput - 28 * 4096 / 0.0278), 1e6)
        self.assertGreater(link.bandwidth, 5 * link.throughput)

    def test_a_link_that_became_slower_is_seen(self) -> None:
        link = known(0.025, 12.5e6)
        receive(link, 1e6, 10 * (RATES + 1), start=10.0)
        self.assert_rate(1e6, link)

    @given(st.lists(st.tuples(st.floats(0, 1), st.integers(0, MIB), st.booleans())))
    def test_no_order_of_events_makes_a_rate_out_of_nothing(
        self, events: list[tuple[float, int, bool]]
    ) -> None:
        link, now, total = Link(), 0.0, 0
        for seconds, length, answer in events:
            now += seconds
            if answer:
                link.answered(seconds)
            else:
                link.received(now, length)
                total += length
        self.assertTrue(0 <= (link.bandwidth or 0) <= total / 1e-5)


class SizeTests(SynchronousTestCase):
    def test_a_far_slow_registry_gets_larger_requests_than_a_near_one(self) -> None:
        near, far = known(0.002, 12.5e6), known(0.05, 12.5e6)
        self.assertEqual(32 * KIB, share(near))
        self.assertEqual(128 * KIB, share(far))

    @given(st.floats(1e-5, 10), st.floats(1e5, 1e10))
    def test_a_request_is_a_power_of_two_within_bounds(self, round_trip: float, bandwidth: float) -> None:
        size = share(known(round_trip, bandwidth, pieces=10))
        self.assertTrue(32 * KIB <= size <= MIB)
        self.assertEqual(0, size & size - 1)

    def test_the_window_is_a_few_round_trips_and_never_too_little_to_notice_more(self) -> None:
        self.assertEqual(MIB, known(0.001, 1e6).window)
        self.assertAlmostEqual(4 * 0.1 * 125e6, known(0.1, 125e6).window, delta=10e6)

    def test_sharers_divide_the_bandwidth(self) -> None:
        link = known(0.025, 10e6)
        one, four = link.seconds(MIB), link.seconds(MIB, 4)
        assert one is not None and four is not None
        self.assertAlmostEqual(4 * one, four)
