"""A registry that is down is probed by one request; when it is back, all who wait go on."""

from __future__ import annotations

from typing import Any

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from twisted.internet.defer import CancelledError, Deferred
from twisted.internet.error import ConnectionLost, ConnectionRefusedError
from twisted.internet.task import Clock
from twisted.trial.unittest import SynchronousTestCase

from erofs_twisted.errors import ReadError
from erofs_twisted.registry.circuit import PATIENCE, SUSPICIOUS, Circuit, Turn
from erofs_twisted.registry.errors import BlobUnreadable, Busy, TransferFailed, Unreachable
from erofs_twisted.registry.retry import Backoff
from tests.unit.fakehttp import FakeRequest
from tests.unit.test_registry_blob import BLOB, URL, BlobTests

BACKOFF = Backoff(random=lambda: 1.0)
AWAY = Unreachable("refused", temporary=True)
FAILED = TransferFailed("502", temporary=True)
BUSY = Busy("503", temporary=True)


class CircuitTests(SynchronousTestCase):
    def setUp(self) -> None:
        self.clock = Clock()
        self.circuit = Circuit(self.clock)

    def enter(self) -> Deferred[Turn]:
        return Deferred.fromCoroutine(self.circuit.enter())

    def turn(self) -> Turn:
        return self.successResultOf(self.enter())

    def fail_one(self, error: TransferFailed, turn: Turn | None = None) -> None:
        turn = turn or self.turn()
        turn.failed(error, 100, BACKOFF)
        turn.leave()

    def test_while_it_is_closed_all_may_ask(self) -> None:
        for _ in range(50):
            self.turn()

    def test_one_connection_that_is_refused_opens_it(self) -> None:
        self.fail_one(AWAY)
        self.assertTrue(self.circuit.is_open)
        self.assertNoResult(self.enter())

    def test_one_error_of_another_kind_does_not(self) -> None:
        for _ in range(SUSPICIOUS - 1):
            self.fail_one(FAILED)
            self.assertFalse(self.circuit.is_open)
        self.fail_one(FAILED)
        self.assertTrue(self.circuit.is_open)

    def test_an_answer_in_between_starts_the_count_anew(self) -> None:
        for _ in range(10):
            self.fail_one(FAILED)
            self.turn().answered()
        self.assertFalse(self.circuit.is_open)

    def test_a_pause_that_is_asked_for_is_everybodys(self) -> None:
        for _ in range(SUSPICIOUS):
            waiting = self.enter()
            self.clock.advance(1.0)
            self.fail_one(Busy("429", temporary=True, retry_after=20.0), self.successResultOf(waiting))
        waiting = self.enter()
        self.clock.advance(19.9)
        self.assertNoResult(waiting)
        self.clock.advance(2.2)
        self.successResultOf(waiting)

    def test_one_that_is_told_to_come_back_is_no_sign_of_an_outage(self) -> None:
        self.fail_one(Busy("429", temporary=True, retry_after=20.0))
        self.assertFalse(self.circuit.is_open)
        self.turn()

    def burst(self, answered: int, refused: int) -> None:
        """Requests that are made at once, more than it takes."""
        turns = [self.turn() for _ in range(answered + refused)]
        self.clock.advance(0.01)
        for turn in turns[:answered]:
            turn.answered()
        for turn in turns[answered:]:
            self.fail_one(BUSY, turn)

    def test_one_that_refuses_a_part_of_a_burst_is_asked_as_often_as_it_answered(self) -> None:
        self.burst(20, 100)
        self.assertFalse(self.circuit.is_open)
        self.assertTrue(self.circuit.is_paced)
        waiting = [self.enter() for _ in range(50)]
        self.clock.pump([0.01] * 100)
        self.assertAlmostEqual(20, sum(each.called for each in waiting), delta=2)

    def test_those_who_give_up_waiting_are_passed_over(self) -> None:
        self.burst(20, 100)
        gone, waiting = self.enter(), self.enter()
        gone.cancel()
        self.failureResultOf(gone, CancelledError)
        self.clock.advance(0.06)
        self.successResultOf(waiting)
        self.assertEqual([], self.clock.getDelayedCalls())

    def test_one_that_goes_on_refusing_is_taken_to_be_down(self) -> None:
        self.burst(0, 20)
        for _ in range(SUSPICIOUS):
            waiting = self.enter()
            self.clock.pump([0.1] * 10)
            if not self.circuit.is_open:
                self.fail_one(BUSY, self.successResultOf(waiting))
        self.assertTrue(self.circuit.is_open)

    def test_while_it_refuses_all_an_answer_to_an_older_request_means_nothing(self) -> None:
        old = self.turn()
        self.clock.advance(0.1)
        self.refuse_all()
        old.answered()
        self.assertTrue(self.circuit.is_open)
        self.clock.advance(10)
        self.turn().answered()
        self.assertFalse(self.circuit.is_open)

    def refuse_all(self) -> None:
        """Until the circuit opens."""
        for _ in range(SUSPICIOUS):
            waiting = self.enter()
            self.clock.advance(1.0)
            self.fail_one(BUSY, self.successResultOf(waiting))
        self.assertTrue(self.circuit.is_open)

    def test_when_it_stops_refusing_all_go_on_at_once(self) -> None:
        self.refuse_all()
        self.clock.advance(10)
        probe, *waiting = [self.enter() for _ in range(50)]
        self.successResultOf(probe).answered()
        for each in waiting:
            self.successResultOf(each)

    def test_what_was_heard_otherwise_counts_too(self) -> None:
        self.circuit.heard().failed(AWAY, 100, BACKOFF)
        self.assertTrue(self.circuit.is_open)
        self.circuit.heard().answered()
        self.assertFalse(self.circuit.is_open)

    def test_one_probes_while_the_others_wait(self) -> None:
        self.fail_one(AWAY)
        first, *others = [self.enter() for _ in range(5)]
        self.clock.advance(1)
        self.successResultOf(first)
        self.clock.advance(PATIENCE - 0.1)
        for other in others:
            self.assertNoResult(other)

    def test_a_probe_that_hears_nothing_is_followed_by_another(self) -> None:
        self.fail_one(AWAY)
        first, second, third = (self.enter() for _ in range(3))
        self.clock.advance(1)
        silent = self.successResultOf(first)
        self.clock.advance(PATIENCE)
        self.successResultOf(second)
        self.assertNoResult(third)
        silent.answered()
        self.successResultOf(third)

    def test_when_the_probe_is_answered_all_go_on_at_once(self) -> None:
        self.fail_one(AWAY)
        first, *others = [self.enter() for _ in range(5)]
        self.clock.advance(1)
        self.successResultOf(first).answered()
        for other in others:
            self.successResultOf(other)
        self.assertEqual([], self.clock.getDelayedCalls())

    def test_when_the_probe_fails_the_next_in_line_probes_a_little_later(self) -> None:
        self.fail_one(AWAY)
        first, second, third = (self.enter() for _ in range(3))
        self.clock.advance(1)
        self.fail_one(AWAY, self.successResultOf(first))
        self.assertNoResult(second)
        self.clock.advance(1)
        self.successResultOf(second)
        self.assertNoResult(third)

    def test_a_probe_that_leaves_makes_room_for_the_next(self) -> None:
        self.fail_one(AWAY)
        first, second = self.enter(), self.enter()
        self.clock.advance(1)
        self.successResultOf(first).leave()
        self.clock.advance(0)
        self.successResultOf(second)

    def test_old_requests_that_fail_later_put_off_no_probe(self) -> None:
        old = [self.turn() for _ in range(10)]
        self.fail_one(AWAY)
        waiting = self.enter()
        self.clock.advance(0.5)
        for turn in old:
            self.fail_one(AWAY, turn)
        self.clock.advance(0.2)
        self.successResultOf(waiting)

    def test_without_anybody_who_waits_nothing_happens(self) -> None:
        self.fail_one(AWAY)
        waiting = self.enter()
        waiting.cancel()
        self.failureResultOf(waiting, CancelledError)
        self.assertEqual([], self.clock.getDelayedCalls())

    def test_after_the_pause_a_new_request_may_probe_at_once(self) -> None:
        self.fail_one(AWAY)
        self.clock.advance(10)
        self.turn()


class CircuitMachine(RuleBasedStateMachine):
    """Whatever happens in whatever order: one probe at most while it is open, and nobody is forgotten."""

    def __init__(self) -> None:
        super().__init__()
        self.clock = Clock()
        self.circuit = Circuit(self.clock)
        self.waiting: list[Deferred[Turn]] = []
        self.turns: list[Turn] = []
        self.let_in = 0
        """While it is open."""

    @rule()
    def enter(self) -> None:
        waiting: Deferred[Turn] = Deferred.fromCoroutine(self.circuit.enter())
        self.waiting.append(waiting)
        waiting.addCallback(self.entered, waiting).addErrback(lambda failure: failure.trap(CancelledError))

    def entered(self, turn: Turn, waiting: Any) -> None:
        self.turns.append(turn)

    @precondition(lambda self: self.turns)
    @rule(data=st.data(), error=st.sampled_from([None, AWAY, FAILED, BUSY, "cancelled"]))
    def end(self, data: Any, error: Any) -> None:
        turn = self.turns.pop(data.draw(st.integers(0, len(self.turns) - 1)))
        if error is None:
            is_old = turn.begun_at < self.circuit._opened_at
            turn.answered()
            assert is_old or not self.circuit.is_open
        elif error != "cancelled":
            turn.failed(error, 100, BACKOFF)
        turn.leave()

    @precondition(lambda self: self.unserved())
    @rule(data=st.data())
    def give_up(self, data: Any) -> None:
        data.draw(st.sampled_from(self.unserved())).cancel()

    @rule(seconds=st.floats(0, 3))
    def wait(self, seconds: float) -> None:
        self.clock.advance(seconds)

    def unserved(self) -> list[Deferred[Turn]]:
        return [each for each in self.waiting if not each.called]

    @invariant()
    def who_waits_has_somebody_who_will_wake_it(self) -> None:
        if self.unserved():
            assert self.circuit.is_open or self.circuit.is_paced
            assert len(self.clock.getDelayedCalls()) == 1
        else:
            assert not self.clock.getDelayedCalls()


CircuitMachine.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
TestCircuitMachine = CircuitMachine.TestCase


class OutageTests(BlobTests):
    """Many reads, and a registry that goes away."""

    def setUp(self) -> None:
        super().setUp()
        self.down: Any = None
        """What its requests fail with; a status that it answers."""
        self.seen = 0
        """Requests that reached somebody."""
        self.agent.answer = self.answer

    def answer(self, request: FakeRequest) -> None:
        down = self.down
        if down == "silent":
            return
        if isinstance(down, Exception):
            # Twisted takes so long to say so.
            self.clock.callLater(0.3, lambda: request.answer.called or request.fail(down))
            return
        self.seen += 1
        if self.down is None:
            request.respond_range(BLOB)
        else:
            request.respond(self.down)

    def outage(self, down: Any, seconds: float) -> list[Deferred[None]]:
        self.successResultOf(self.read(0, 4))
        self.down, self.seen, self.before = down, 0, len(self.agent.requests)
        reads = [self.read(4 * number, 4) for number in range(32)]
        self.clock.pump([0.05] * round(seconds / 0.05))
        for done in reads:
            self.assertNoResult(done)
        return reads

    def test_while_nobody_is_at_the_port_no_request_is_made_and_reads_go_on_within_a_second(self) -> None:
        reads = self.outage(ConnectionRefusedError(), 30)
        self.assertEqual(0, self.seen)
        self.assertLess(len(self.agent.requests) - self.before, 32 + 60, "connections that were tried")
        self.down = None
        self.clock.pump([0.05] * 20)
        for done in reads:
            self.assertIsNone(self.successResultOf(done))

    def test_while_it_answers_errors_it_is_asked_seldom(self) -> None:
        reads = self.outage(503, 30)
        # Those that were in flight when it went down, and a few until it was clear that it is.
        self.assertLess(len(self.agent.requests) - self.before - 32, 20)
        self.down = None
        self.clock.pump([0.05] * 100)
        for done in reads:
            self.assertIsNone(self.successResultOf(done))

    def test_while_it_says_nothing_it_is_asked_seldom_and_soon_found_again(self) -> None:
        reads = self.outage("silent", 40)
        requests = len(self.agent.requests)
        self.clock.pump([0.05] * 600)
        self.assertLessEqual(len(self.agent.requests) - requests, 20)
        self.down = None
        self.clock.pump([0.05] * 50)
        waiting = [done for done in reads if not done.called]
        # Those that had asked just before it came back ask again when their patience is over.
        self.assertLess(len(waiting), 10)
        self.clock.pump([0.05] * 300)
        for done in reads:
            self.assertIsNone(self.successResultOf(done))

    def test_a_read_that_waits_gives_up_in_its_time_and_says_why(self) -> None:
        reads = self.outage(ConnectionRefusedError(), 30)
        self.clock.pump([0.05] * 1500)
        for done in reads:
            error = self.failureResultOf(done, BlobUnreadable).value
            self.assertIsInstance(error, ReadError)
            self.assertIn("within 100 seconds", str(error))
            self.assertIn("refused", str(error))
        self.clock.pump([0.05] * 20)
        self.assertEqual([], self.clock.getDelayedCalls())

    def test_a_read_that_is_cancelled_leaves_the_others_their_turn(self) -> None:
        first, *others = self.outage(ConnectionRefusedError(), 5)
        first.cancel()
        self.failureResultOf(first, CancelledError)
        self.down = None
        self.clock.pump([0.05] * 20)
        for done in others:
            self.successResultOf(done)

    def test_a_probe_that_is_cancelled_is_followed_by_another_at_once(self) -> None:
        reads = self.outage(ConnectionRefusedError(), 5)
        self.down = "silent"
        self.clock.pump([0.05] * 20)
        probe = self.agent.last
        self.assertFalse(probe.answer.called)
        done = reads[probe.range[0] // 4]
        before = len(self.agent.requests)
        done.cancel()
        self.failureResultOf(done, CancelledError)
        self.clock.advance(0.01)
        self.assertEqual(before + 1, len(self.agent.requests))

    def test_a_body_that_breaks_off_with_progress_opens_nothing(self) -> None:
        self.agent.answer = lambda request: None
        done = self.read(0, 20)
        for position in range(10):
            request = self.agent.last
            self.assertEqual(position, request.range[0])
            response = request.respond(206, None, Content_Range=f"bytes {position}-19/{len(BLOB)}")
            response.send(BLOB[position : position + 1])
            response.break_off()
            self.clock.advance(0.25)
        self.agent.last.fail(ConnectionLost())
        self.clock.advance(0.5)
        self.agent.last.respond_range(BLOB)
        self.successResultOf(done)
        self.assertEqual({URL}, set(self.agent.urls))
