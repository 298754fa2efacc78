"""Daemons that are killed at each step of their lives: the next one has a whole mount, and leaves nothing."""

from __future__ import annotations

import signal

from tests.killing import KilledTestCase, outward
from tests.reading import Reader
from tests.scenery import BIG, scenery


class KilledTests(KilledTestCase):
    attach = "nbd"

    def test_the_next_one_has_a_whole_mount_after_each_step_of_a_life(self) -> None:
        steps = self.steps_of_a_life("--mkdir")
        self.assertLessEqual({"prepare 1", "request 1", "mount 1", "umount 1", "release 1"}, {*steps})
        self.for_each(steps, "--mkdir")

    def test_a_reader_goes_on_after_each_step_of_taking_over(self) -> None:
        first = self.daemon_that(None)
        first.ready()
        reader = Reader(first.mountpoint / BIG, scenery().tree / BIG, 1)
        self.addCleanup(reader.kill)
        first.signal(signal.SIGKILL)
        first.ended()
        second = self.daemon_that(None)
        second.ready()
        steps = outward(second.steps())
        self.assertIn("request 1", steps)
        second.signal(signal.SIGKILL)
        second.ended()
        for step in steps:
            third = self.daemon_that(step)
            self.assertEqual(-signal.SIGKILL, third.ended(), f"{step}: {third.log}")
        fourth = self.daemon_that(None)
        fourth.ready()
        self.assertGreater(reader.end()["reads"], 0)
        fourth.signal(signal.SIGTERM)
        self.assertEqual(0, fourth.ended(), fourth.log)
        self.assert_nothing_left(*self._daemons)
