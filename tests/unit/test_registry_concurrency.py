"""How many requests an origin gets at a time, and when the next one's turn comes."""

from __future__ import annotations

from typing import Any

from hypothesis import given
from hypothesis import strategies as st
from twisted.internet.defer import CancelledError, Deferred
from twisted.internet.error import ConnectionRefusedError
from twisted.internet.task import Clock
from twisted.trial.unittest import SynchronousTestCase
from twisted.web.http_headers import Headers

from erofs_twisted.blocks.queue import LIMIT
from erofs_twisted.registry.body import abandon, discard, receive
from erofs_twisted.registry.concurrency import CONNECTIONS, LimitedAgent
from erofs_twisted.registry.errors import TransferFailed
from tests.unit.fakehttp import FakeAgent

STEPS = ("ask", "fail", "respond", "finish", "break_off", "cancel")


class LimitTests(SynchronousTestCase):
    def setUp(self) -> None:
        self.network = FakeAgent()
        self.agent = LimitedAgent(self.network, 2)
        self.clock = Clock()

    def ask(self, *names: str, host: str = "a.example") -> list[Deferred[Any]]:
        answers = [self.agent.request(b"GET", f"http://{host}/{name}".encode(), Headers()) for name in names]
        self.addCleanup(lambda: [answer.addErrback(lambda _: None) for answer in answers])
        return answers

    @property
    def asked(self) -> str:
        return "".join(url[-1] for url in self.network.urls)

    def test_a_queues_fetches_have_room_and_others_beside_them(self) -> None:
        self.assertGreater(CONNECTIONS, LIMIT)

    def test_requests_beyond_the_limit_wait_in_order(self) -> None:
        self.ask(*"12345")
        self.assertEqual("12", self.asked)
        self.network.requests[0].fail(ConnectionRefusedError())
        self.network.requests[1].fail(ConnectionRefusedError())
        self.assertEqual("1234", self.asked)

    def test_each_origin_has_its_own_limit(self) -> None:
        self.ask(*"123")
        self.ask(*"456", host="b.example")
        self.ask(*"789", host="a.example:5000")
        self.assertEqual("124578", self.asked)

    def test_a_request_lasts_until_its_body_has_been_received(self) -> None:
        first, *_ = self.ask(*"123")
        sender = self.network.requests[0].respond(200, None)
        got: list[bytes] = []
        done = receive(self.successResultOf(first), lambda data: not got.append(data), self.clock, 10)
        sender.send(b"piece")
        self.assertEqual("12", self.asked)
        sender.finish()
        self.successResultOf(done)
        self.assertEqual(([b"piece"], "123"), (got, self.asked))

    def test_an_answer_without_a_body_is_over_when_that_is_delivered(self) -> None:
        first, *_ = self.ask(*"123")
        self.network.requests[0].respond(200, b"")
        response = self.successResultOf(first)
        self.assertEqual("12", self.asked)
        self.successResultOf(Deferred.fromCoroutine(discard(response, self.clock, 10)))
        self.assertEqual("123", self.asked)

    def test_a_body_that_is_cut_off_ends_its_request(self) -> None:
        for end in (
            lambda response, sender: abandon(response),
            lambda response, sender: (
                receive(response, lambda data: True, self.clock, 10).addErrback(lambda _: None).cancel()
            ),
            lambda response, sender: (
                receive(response, lambda data: True, self.clock, 10).addErrback(
                    lambda failure: failure.trap(TransferFailed)
                ),
                sender.break_off(),
            ),
            lambda response, sender: (
                receive(response, lambda data: False, self.clock, 10),
                sender.send(b"enough"),
            ),
        ):
            self.setUp()
            first, *_ = self.ask(*"123")
            sender = self.network.requests[0].respond(200, None)
            end(self.successResultOf(first), sender)
            self.assertEqual("123", self.asked)

    def test_a_body_has_the_connection_for_its_transport(self) -> None:
        (first,) = self.ask("1")
        sender = self.network.last.respond(200, None)
        receive(self.successResultOf(first), lambda data: False, self.clock, 10)
        sender.send(b"enough")
        self.assertTrue(sender.is_aborted)

    def test_the_answer_is_what_it_was(self) -> None:
        (first,) = self.ask("1")
        self.network.last.respond(206, b"abc", ETag="x")
        response = self.successResultOf(first)
        self.assertEqual((206, 3, b"Partial Content"), (response.code, response.length, response.phrase))
        self.assertEqual(["x"], response.headers.getRawHeaders("ETag"))

    def test_cancelling_a_request_that_waits_gives_up_its_place(self) -> None:
        _, _, third, _ = self.ask(*"1234")
        third.cancel()
        self.failureResultOf(third, CancelledError)
        self.network.requests[0].fail(ConnectionRefusedError())
        self.assertEqual("124", self.asked)

    def test_cancelling_a_request_that_was_made_withdraws_it(self) -> None:
        first, *_ = self.ask(*"123")
        first.cancel()
        self.assertTrue(self.network.requests[0].is_cancelled)
        self.assertEqual("123", self.asked)

    @given(st.lists(st.tuples(st.sampled_from(STEPS), st.integers(0, 9)), max_size=40))
    def test_whatever_happens_no_place_is_lost_and_none_is_taken_twice(
        self, steps: list[tuple[str, int]]
    ) -> None:
        self.setUp()
        asked: list[Deferred[Any]] = []
        for step, number in (*steps, *[("fail", 0), ("finish", 0)] * len(steps)):
            unanswered = [request for request in self.network.requests if not request.answer.called]
            receiving = [
                r.response for r in self.network.requests if r.response and not r.response.is_finished
            ]
            if step == "ask":
                answer = self.agent.request(b"GET", b"http://a.example/x", Headers())
                answer.addCallback(receive, lambda data: True, self.clock, 10).addErrback(lambda _: None)
                asked.append(answer)
            elif step == "cancel" and asked:
                asked[number % len(asked)].cancel()
            elif step in ("fail", "respond") and unanswered:
                request = unanswered[number % len(unanswered)]
                request.fail(ConnectionRefusedError()) if step == "fail" else request.respond(200, None)
            elif step in ("finish", "break_off") and receiving:
                getattr(receiving[number % len(receiving)], step)()
            at_it = sum(
                not request.answer.called
                or (request.response is not None and not request.response.is_finished)
                for request in self.network.requests
            )
            undecided = sum(not answer.called or bool(answer.paused) for answer in asked)
            self.assertEqual(min(2, undecided), at_it)
        self.assertEqual({}, self.agent._turns)

    def test_requests_that_fail_at_once_end_one_within_the_other(self) -> None:
        self.agent = LimitedAgent(self.network, 1)
        answers = self.ask(*"12345")
        self.network.answer = lambda request: request.fail(ConnectionRefusedError())
        self.network.last.fail(ConnectionRefusedError())
        for answer in answers:
            self.failureResultOf(answer, ConnectionRefusedError)
        self.assertEqual(("12345", {}), (self.asked, self.agent._turns))

    def test_nothing_is_kept_of_an_origin_without_requests(self) -> None:
        for _ in range(3):
            self.ask(*"123")
            for number in range(len(self.network.requests)):
                request = self.network.requests[number]
                if not request.answer.called:
                    request.fail(ConnectionRefusedError())
        while pending := [r for r in self.network.requests if not r.answer.called]:
            pending[0].fail(ConnectionRefusedError())
        self.assertEqual(9, len(self.network.requests))
        self.assertEqual({}, self.agent._turns)
