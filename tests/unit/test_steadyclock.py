"""The reactor's time where somebody sets the machine's clock."""

from __future__ import annotations

import time

from twisted.internet.base import ReactorBase
from twisted.internet.task import Clock
from twisted.trial.unittest import SynchronousTestCase

from erofs_twisted.steadyclock import keep_steady, unix_time

START = 1_700_000_000.0
HOUR = 3600.0


class Timers(ReactorBase):
    """A reactor that has no more than timers."""

    def installWaker(self) -> None:
        pass


class SteadyClockTests(SynchronousTestCase):
    def setUp(self) -> None:
        self.set_to = START
        self.gone_by = 5.0
        self.patch(time, "time", lambda: self.set_to)
        self.patch(time, "monotonic", lambda: self.gone_by)
        self.timers = Timers()
        keep_steady(self.timers)
        self.fired: list[str] = []
        self.timers.callLater(10, self.fired.append, "soon")
        self.timers.callLater(HOUR, self.fired.append, "late")

    def after(self, seconds: float) -> list[str]:
        self.gone_by += seconds
        self.timers.runUntilCurrent()
        return self.fired

    def test_a_timer_fires_in_its_time_when_the_clock_is_set_back(self) -> None:
        self.set_to -= HOUR
        self.assertEqual([], self.after(9))
        self.assertEqual(["soon"], self.after(1))

    def test_no_timer_fires_when_the_clock_is_set_forward(self) -> None:
        self.set_to += 2 * HOUR
        self.assertEqual([], self.after(9))
        self.assertEqual(["soon"], self.after(1))

    def test_it_begins_with_the_time_of_the_machine(self) -> None:
        self.assertEqual(START, self.timers.seconds())

    def test_a_clock_that_is_steady_stays_as_it_is(self) -> None:
        self.set_to += HOUR
        keep_steady(self.timers)
        self.assertEqual(START, self.timers.seconds())

    def test_dates_of_others_are_compared_with_the_clock_as_it_was_set(self) -> None:
        self.set_to += HOUR
        self.assertEqual(START + HOUR, unix_time(self.timers))

    def test_the_clock_of_a_test_tells_both(self) -> None:
        clock = Clock()
        clock.advance(7)
        self.assertEqual(7, unix_time(clock))
