"""The fuse back end does not outlive its daemon, but one that is killed is in nobody's way."""

from __future__ import annotations

from tests.killing import KilledTestCase


class KilledTests(KilledTestCase):
    attach = "fuse"

    def test_the_next_one_has_a_whole_mount_after_each_step_of_a_life(self) -> None:
        self.for_each(self.steps_of_a_life())
