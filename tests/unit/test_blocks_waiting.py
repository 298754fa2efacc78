"""Who waits for what, against a plain model."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st
from twisted.internet.defer import Deferred
from twisted.trial.unittest import SynchronousTestCase

from erofs_twisted.blocks.waiting import Waiter, Waiters

COUNT = 100
RUNS = st.tuples(st.integers(0, COUNT - 1), st.integers(1, 40)).map(lambda r: (r[0], min(sum(r), COUNT)))


class WaitersTests(SynchronousTestCase):
    @given(st.lists(st.tuples(st.sampled_from(("add", "arrived", "remove", "of")), RUNS, st.data())))
    def test_each_hears_of_its_own_chunks_and_of_no_others(
        self, steps: list[tuple[str, tuple[int, int], st.DataObject]]
    ) -> None:
        waiters, waits_for = Waiters(), dict[Waiter, set[int]]()
        for what, (first, end), data in steps:
            run = set(range(first, end))
            if what == "add":
                waiter = Waiter(0, 1, first, end, True, Deferred())
                absent = data.draw(st.sets(st.sampled_from(sorted(run)), min_size=1))
                waits_for[waiter] = absent
                waiters.add(waiter, [(chunk, chunk + 1) for chunk in sorted(absent)])
            elif what == "remove" and waits_for:
                waiter = data.draw(st.sampled_from(list(waits_for)))
                del waits_for[waiter]
                waiters.remove(waiter)
            elif what == "of":
                self.assertEqual({w for w in waits_for if waits_for[w] & run}, set(waiters.of(first, end)))
            elif what == "arrived":
                expected = [waiter for waiter in waits_for if waits_for[waiter] & run]
                self.assertEqual(set(expected), set(waiters.arrived(first, end)))
                for waiter in expected:
                    waits_for[waiter] -= run
                    self.assertEqual(bool(waits_for[waiter]), bool(waiter.missing))
                    if not waits_for[waiter]:
                        del waits_for[waiter]
        self.assertEqual(set(waits_for), set(waiters.pop_all()))
        self.assertEqual([], waiters.of(0, COUNT))
