"""What transfers tell of the way that they come."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st
from twisted.trial.unittest import SynchronousTestCase

from erofs_twisted.blocks.link import KIB, MIB, RATES, ROUND_TRIPS, UNKNOWN_WINDOW, Link


def known(round_trip: float, bandwidth: float) -> Link:
    """A link that has shown itself for a second."""
    link = Link()
    link.answered(round_trip)
    for tick in range(101):
        link.received(tick / 100, int(bandwidth / 100))
    return link


def share(link: Link) -> int:
    """What comes in a quarter of a round trip."""
    return link.share(4, default=128 * KIB, least=32 * KIB, most=MIB)


class MeasureTests(SynchronousTestCase):
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
        link = known(0.025, 12.5e6)
        assert link.bandwidth is not None
        self.assertAlmostEqual(12.5e6, link.bandwidth, delta=2e6)

    def test_a_pause_lowers_no_rate(self) -> None:
        link = known(0.025, 12.5e6)
        before = link.bandwidth
        link.idle(1.0)
        link.received(100.0, 1000)
        link.received(100.01, 1000)
        link.idle(100.01)
        self.assertEqual(before, link.bandwidth)

    def test_a_link_that_became_slower_is_seen(self) -> None:
        link = known(0.025, 12.5e6)
        for tick in range(20 * (RATES + 1)):
            link.received(2.0 + tick / 100, 10_000)
        assert link.bandwidth is not None
        self.assertLess(link.bandwidth, 2e6)

    def test_the_first_transfer_tells_something_even_if_it_is_short(self) -> None:
        link = Link()
        link.answered(0.025)
        link.received(0.025, 64 * KIB)
        link.received(0.030, 64 * KIB)
        link.idle(0.030)
        self.assertAlmostEqual(64 * KIB / 0.005, link.bandwidth or 0, delta=1)

    @given(st.lists(st.tuples(st.floats(0, 1), st.integers(0, MIB), st.booleans())))
    def test_no_order_of_events_makes_a_rate_out_of_nothing(
        self, events: list[tuple[float, int, bool]]
    ) -> None:
        link, now, total = Link(), 0.0, 0
        for seconds, length, idle in events:
            now += seconds
            if idle:
                link.idle(now)
            else:
                link.received(now, length)
                total += length
        self.assertTrue(0 <= (link.bandwidth or 0) <= total / 1e-4)


class SizeTests(SynchronousTestCase):
    def test_a_far_slow_registry_gets_larger_requests_than_a_near_one(self) -> None:
        near, far = known(0.002, 12.5e6), known(0.05, 12.5e6)
        self.assertEqual(32 * KIB, share(near))
        self.assertEqual(128 * KIB, share(far))

    @given(st.floats(1e-5, 10), st.floats(1000, 1e10))
    def test_a_request_is_a_power_of_two_within_bounds(self, round_trip: float, bandwidth: float) -> None:
        size = share(known(round_trip, bandwidth))
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
