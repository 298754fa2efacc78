"""As many requests a second as a server answers; it is found out from what it refuses."""

from __future__ import annotations

from collections import deque

from hypothesis import given
from hypothesis import strategies as st
from twisted.trial.unittest import SynchronousTestCase

from erofs_twisted.registry.pace import FEW, SLOWEST, WINDOW, Pace


class Limiter:
    """As nginx's ``limit_req``: so many requests a second, and ``burst`` above that."""

    def __init__(self, rate: float, burst: int) -> None:
        self.rate, self.burst = rate, burst
        self.excess, self.last = 0.0, 0.0

    def lets_in(self, now: float) -> bool:
        excess = max(self.excess - (now - self.last) * self.rate, 0.0) + 1
        self.last = now
        if excess > self.burst + 1:
            return False
        self.excess = excess
        return True


def drive(pace: Pace, limiter: Limiter, seconds: float, takes: float = 0.01) -> tuple[int, int]:
    """Requests as fast as the pace lets them, each answered after a while; how many are, how many not."""
    now, answered, refused = 0.0, 0, 0
    under_way: deque[tuple[float, bool]] = deque()
    while now < seconds:
        while under_way and under_way[0][0] <= now - takes:
            begun_at, was_let_in = under_way.popleft()
            if was_let_in:
                answered += 1
                pace.answered(now)
            else:
                refused += 1
                pace.refused(begun_at, now)
        if now >= pace.next_at:
            pace.begun(now)
            under_way.append((now, limiter.lets_in(now)))
        now += 0.001
    return answered, refused


class PaceTests(SynchronousTestCase):
    def test_there_is_no_limit_to_begin_with(self) -> None:
        pace = Pace()
        for _ in range(1000):
            pace.begun(5.0)
            pace.answered(5.0)
        self.assertEqual((None, 0.0), (pace.rate, pace.next_at))

    def test_one_refusal_among_many_answers_changes_nothing(self) -> None:
        pace = Pace()
        for number in range(1000):
            now = number / 100
            if number % 10 == 5:
                self.assertTrue(pace.refused(now, now))
            else:
                pace.answered(now)
        self.assertIsNone(pace.rate)

    def test_a_few_refusals_alone_make_it_slow(self) -> None:
        pace = Pace()
        for _ in range(FEW - 1):
            pace.refused(1.0, 1.0)
            self.assertIsNone(pace.rate)
        pace.refused(1.0, 1.0)
        self.assertEqual((SLOWEST, 1.0 + 1 / SLOWEST), (pace.rate, pace.next_at))

    def test_what_began_before_it_slowed_down_says_nothing(self) -> None:
        pace = Pace()
        for _ in range(FEW):
            self.assertTrue(pace.refused(0.9, 1.0))
        self.assertFalse(pace.refused(0.9, 1.1))
        self.assertTrue(pace.refused(1.5, 1.6))

    def test_without_refusals_there_is_soon_no_limit_any_more(self) -> None:
        pace = Pace()
        for _ in range(FEW):
            pace.refused(0.0, 0.0)
        for second in range(1, 12):
            pace.answered(second * WINDOW)
        self.assertEqual((None, 0.0), (pace.rate, pace.next_at))

    @given(st.floats(10, 300), st.integers(1, 50))
    def test_a_limiter_is_asked_about_as_often_as_it_lets_in(self, rate: float, burst: int) -> None:
        answered, refused = drive(Pace(), Limiter(rate, burst), 20.0)
        self.assertGreater(answered, 0.45 * 20 * rate)
        self.assertLess(refused, 0.45 * answered + 40)
