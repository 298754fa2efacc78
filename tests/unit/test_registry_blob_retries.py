"""When the read of a blob's range is tried again, from where, how soon, and when it is given up."""

from __future__ import annotations

import itertools

from twisted.internet.defer import CancelledError
from twisted.internet.error import ConnectionRefusedError

from tests.unit.fakehttp import FakeResponse
from tests.unit.test_registry_blob import BLOB, URL, BlobTests


class RetryTests(BlobTests):
    def test_temporary_errors_are_tried_again(self) -> None:
        for code in (408, 429, 499, 500, 502, 503, 504):
            self.setUp()
            done = self.read(100, 50)
            self.agent.last.respond(code)
            self.retry(done).respond_range(BLOB)
            self.expect(done, 100, 50)

    def test_a_refused_connection_is_tried_again(self) -> None:
        done = self.read(100, 50)
        self.agent.last.fail(ConnectionRefusedError())
        self.retry(done).respond_range(BLOB)
        self.expect(done, 100, 50)

    def test_a_read_goes_on_where_its_body_broke_off(self) -> None:
        done = self.read(100, 50)
        response = self.partial(30)
        response.break_off()
        self.assertEqual((130, 150), self.retry(done).range)
        self.agent.last.respond_range(BLOB)
        self.expect(done, 100, 50)

    def test_however_many_bodies_break_off_at_once_the_registry_is_not_taken_to_be_down(self) -> None:
        first_of_all = self.read(0, 10)
        self.agent.last.respond_range(BLOB)
        self.successResultOf(first_of_all)
        reads = [self.read(100 * number, 50) for number in range(10)]
        answers = []
        for number, request in enumerate(self.agent.requests[1:]):
            first = 100 * number
            answers.append(request.respond(206, None, Content_Range=f"bytes {first}-{first + 49}/1024"))
        for number, answer in enumerate(answers):
            answer.send(BLOB[100 * number : 100 * number + 10])
            answer.break_off()
        self.clock.advance(0.25)
        self.assertEqual(1 + 20, len(self.agent.requests), "each goes on by itself")
        for request in self.agent.requests[11:]:
            request.respond_range(BLOB)
        for done in reads:
            self.assertIsNone(self.successResultOf(done))

    def test_a_read_goes_on_where_its_body_ended_too_early(self) -> None:
        done = self.read(100, 50)
        response = self.partial(30)
        response.finish()
        self.assertEqual((130, 150), self.retry(done).range)
        self.agent.last.respond_range(BLOB)
        self.expect(done, 100, 50)

    def test_a_body_that_stalls_is_cut_off_and_gone_on_with(self) -> None:
        done = self.read(100, 50)
        response = self.partial(30)
        self.clock.advance(15)
        self.assertTrue(response.is_aborted)
        self.assertEqual((130, 150), self.retry(done).range)
        self.agent.last.respond_range(BLOB)
        self.expect(done, 100, 50)

    def test_a_request_that_is_not_answered_is_given_up_and_made_again(self) -> None:
        done = self.read(100, 50)
        self.clock.advance(15)
        self.assertTrue(self.agent.requests[0].is_cancelled)
        self.retry(done).respond_range(BLOB)
        self.expect(done, 100, 50)

    def test_the_pauses_grow(self) -> None:
        done = self.read(100, 50)
        starts = []
        for _ in range(6):
            starts.append(self.clock.seconds())
            self.agent.last.respond(502)
            waited = len(self.agent.requests)
            while len(self.agent.requests) == waited:
                self.clock.advance(0.25)
        pauses = [after - before for before, after in itertools.pairwise(starts)]
        self.assertEqual([0.25, 0.5, 1, 2, 4], pauses)
        done.cancel()
        self.failureResultOf(done, CancelledError)

    def test_progress_makes_the_pauses_short_again(self) -> None:
        done = self.read(100, 50)
        for _ in range(5):
            self.agent.last.respond(503)
            self.retry(done)
        self.partial(1).break_off()
        self.retry(done, 0.25).respond_range(BLOB)
        self.expect(done, 100, 50)

    def test_a_pause_asked_for_is_kept(self) -> None:
        done = self.read(100, 50)
        self.agent.last.respond(429, Retry_After="20")
        self.clock.advance(19.9)
        self.assertEqual(1, len(self.agent.requests))
        self.retry(done, 1).respond_range(BLOB)
        self.expect(done, 100, 50)

    def test_without_progress_it_ends_and_names_the_cause(self) -> None:
        done = self.read(100, 50)
        begun = self.clock.seconds()
        self.agent.answer = lambda request: request.respond(503)
        self.agent.last.respond(503)
        while not done.called or done.paused:
            self.clock.advance(0.25)
            self.assertLess(self.clock.seconds() - begun, 101)
        self.assertIn(f"within 100 seconds: {URL}: 503", self.refusal(done))
        self.assertLess(len(self.agent.requests), 30)

    def test_a_server_that_asks_for_an_hour_is_not_waited_for_in_vain(self) -> None:
        done = self.read(100, 50)
        self.agent.answer = lambda request: request.respond(429, Retry_After="3600")
        self.agent.last.respond(429, Retry_After="3600")
        self.clock.pump([0.25] * 600)
        self.assertIn("429", self.refusal(done))
        self.assertGreater(len(self.agent.requests), 3)
        self.assertLess(len(self.agent.requests), 30)

    def test_with_progress_it_goes_on_beyond_the_limit(self) -> None:
        done = self.read(0, 20)
        for position in range(20):
            self.clock.advance(10)
            start, stop = self.agent.last.range
            self.assertEqual(position, start)
            response = self.agent.last.respond(206, None, Content_Range=f"bytes {start}-{stop - 1}/1024")
            response.send(BLOB[start : start + 1])
            response.break_off()
            if position < 19:
                self.clock.advance(1)
        self.clock.advance(1)
        self.expect(done, 0, 20)

    def partial(self, count: int) -> FakeResponse:
        """The headers of what was asked for, and the first ``count`` bytes of the body."""
        start, stop = self.agent.last.range
        response = self.agent.last.respond(206, None, Content_Range=f"bytes {start}-{stop - 1}/1024")
        response.send(BLOB[start : start + count])
        return response
