"""Signed URLs: how long they work, how long they are kept, and who asks for new ones."""

from __future__ import annotations

import time
from datetime import UTC, datetime
from typing import Any
from urllib.parse import urlencode

from hypothesis import given
from hypothesis import strategies as st
from twisted.internet.defer import CancelledError, Deferred
from twisted.internet.error import ConnectionLost
from twisted.internet.task import Clock
from twisted.logger import globalLogPublisher
from twisted.trial.unittest import SynchronousTestCase

from erofs_twisted.registry.blob import MAX_DETOURS, MAX_MISTAKES
from erofs_twisted.registry.location import PATIENCE, BlobLocation, Way
from erofs_twisted.registry.signedurl import MAX_LIFE, lifetime
from erofs_twisted.steadyclock import SteadyClock
from tests.unit.fakehttp import FakeRequest
from tests.unit.test_registry_blob import BLOB, URL, BlobTests

NOW = 1_700_000_000.0
CDN = "https://cdn.example/x"


def compact(offset: float) -> str:
    return datetime.fromtimestamp(NOW + offset, UTC).strftime("%Y%m%dT%H%M%SZ")


class LifetimeTests(SynchronousTestCase):
    def life(self, **query: str) -> float | None:
        pairs = [(name.replace("_", "-"), value) for name, value in query.items()]
        return lifetime(f"{CDN}?{urlencode(pairs)}", NOW)

    def test_amazons_counts_from_when_it_was_signed(self) -> None:
        self.assertEqual(1100, self.life(X_Amz_Date=compact(-100), X_Amz_Expires="1200"))

    def test_googles_does_too(self) -> None:
        self.assertEqual(900, self.life(X_Goog_Date=compact(0), X_Goog_Expires="900"))

    def test_clocks_that_disagree_do_not_count(self) -> None:
        for offset in (-5000, 5000):
            self.assertEqual(1200, self.life(X_Amz_Date=compact(offset), X_Amz_Expires="1200"))

    def test_a_time_of_signing_that_cannot_be_read_does_not_count(self) -> None:
        for date in ("", "yesterday", "20231399T000000Z"):
            self.assertEqual(1200, self.life(X_Amz_Date=date, X_Amz_Expires="1200"))

    def test_cloudfronts_is_unix_time(self) -> None:
        self.assertEqual(60, self.life(Expires="1700000060", Signature="x"))
        self.assertEqual(60, self.life(expires="1700000060"))

    def test_azures_is_iso_8601(self) -> None:
        for end in ("2023-11-14T22:14:20Z", "2023-11-14T22:14:20.0000000Z", "2023-11-14T22:14:20"):
            self.assertEqual(60, self.life(se=end))

    def test_a_day_is_a_time_too(self) -> None:
        self.assertEqual(datetime(2023, 11, 16, tzinfo=UTC).timestamp() - NOW, self.life(se="2023-11-16"))

    def test_the_shortest_of_several_counts(self) -> None:
        self.assertEqual(60, self.life(X_Amz_Expires="1200", Expires="1700000060"))

    def test_what_says_nothing_has_none(self) -> None:
        for query in ({}, {"token": "x"}, {"Expires": "soon"}, {"X_Amz_Expires": "0"}, {"se": "x"}):
            self.assertIsNone(self.life(**query))

    def test_a_time_that_is_over_says_nothing(self) -> None:
        self.assertIsNone(self.life(Expires="1600000000"))

    def test_a_url_with_very_many_parameters_says_nothing(self) -> None:
        self.assertIsNone(lifetime(f"{CDN}?{'a=b&' * 1000}Expires=1700000060", NOW))

    @given(
        st.text() | st.sampled_from([CDN, "https://[", "//"]),
        st.dictionaries(
            st.sampled_from(["X-Amz-Date", "X-Amz-Expires", "X-Goog-Expires", "Expires", "se"]),
            st.text()
            | st.integers().map(str)
            | st.datetimes().map(datetime.isoformat)
            | st.sampled_from([compact(0), compact(-10), compact(10)]),
        ),
    )
    def test_whatever_it_says_a_life_is_sensible_or_unknown(self, base: str, query: dict[str, str]) -> None:
        life = lifetime(f"{base}?{urlencode(query, errors='replace')}", NOW)
        self.assertTrue(life is None or 0 < life <= MAX_LIFE)


class SteadyTime(Clock):
    def __init__(self, seconds: SteadyClock) -> None:
        super().__init__()
        self.seconds = seconds  # type: ignore[method-assign]


class BlobLocationTests(SynchronousTestCase):
    def setUp(self) -> None:
        self.clock = Clock()
        self.clock.advance(NOW)
        self.location = BlobLocation(self.clock)

    def choose(self) -> Deferred[Way]:
        return Deferred.fromCoroutine(self.location.choose())

    def way(self) -> Way:
        return self.successResultOf(self.choose())

    def signed(self, life: int) -> str:
        return f"{CDN}?Expires={int(self.clock.seconds()) + life}"

    def test_a_url_lives_as_long_as_the_clock_says_that_was_set_meanwhile(self) -> None:
        now = 50.0
        self.patch(time, "monotonic", lambda: now)
        self.patch(time, "time", lambda: NOW)
        location = BlobLocation(SteadyTime(SteadyClock(0.0)))
        url = f"{CDN}?Expires={int(NOW) + 60}"
        location.found(self.successResultOf(Deferred.fromCoroutine(location.choose())), url)
        for now, expected in ((99.0, url), (101.0, None)):  # noqa: B007
            way = self.successResultOf(Deferred.fromCoroutine(location.choose()))
            self.assertEqual(expected, way.url)

    def test_one_asks_and_the_others_wait_for_what_it_finds(self) -> None:
        first, others = self.way(), [self.choose() for _ in range(10)]
        self.assertEqual((None, True), (first.url, first.asks))
        for other in others:
            self.assertNoResult(other)
        self.location.found(first, CDN)
        self.assertEqual([CDN] * 10, [self.successResultOf(other).url for other in others])

    def test_where_the_registry_sends_the_bytes_itself_nobody_waits(self) -> None:
        first, other = self.way(), self.choose()
        self.location.found(first, None)
        ways = [self.successResultOf(other), self.way(), self.way()]
        self.assertEqual([(None, False)] * 3, [(way.url, way.asks) for way in ways])

    def test_when_the_one_that_asked_fails_the_next_asks(self) -> None:
        first, second, third = self.way(), self.choose(), self.choose()
        self.assertFalse(self.location.lost(first))
        self.location.settle(first)
        self.assertTrue(self.successResultOf(second).asks)
        self.assertNoResult(third)

    def test_who_leaves_disturbs_nobody(self) -> None:
        first, second, third = self.way(), self.choose(), self.choose()
        second.cancel()
        self.failureResultOf(second, CancelledError)
        self.location.found(first, CDN)
        self.assertEqual(CDN, self.successResultOf(third).url)

    def test_the_one_that_asks_is_not_waited_for_for_ever(self) -> None:
        silent, second, third = self.way(), self.choose(), self.choose()
        self.clock.advance(PATIENCE)
        self.assertTrue(self.successResultOf(second).asks)
        self.assertNoResult(third)
        self.location.found(silent, CDN)
        self.assertEqual(CDN, self.successResultOf(third).url)
        self.assertEqual([], self.clock.getDelayedCalls())

    def test_near_its_end_one_asks_and_the_others_use_the_old_one(self) -> None:
        self.location.found(self.way(), old := self.signed(100))
        self.clock.advance(89)
        self.assertEqual(old, self.way().url)
        self.clock.advance(2)
        self.assertTrue(self.way().asks)
        self.assertEqual([old] * 3, [self.way().url for _ in range(3)])

    def test_after_its_end_nobody_uses_it(self) -> None:
        self.location.found(self.way(), self.signed(100))
        self.clock.advance(100)
        asking, other = self.way(), self.choose()
        self.assertTrue(asking.asks)
        self.assertNoResult(other)

    def test_what_is_short_lived_is_renewed_late_in_its_life(self) -> None:
        self.location.found(self.way(), self.signed(4))
        self.clock.advance(2.9)
        self.assertFalse(self.way().asks)
        self.clock.advance(0.2)
        self.assertTrue(self.way().asks)

    def test_what_does_not_say_is_used_until_it_is_refused(self) -> None:
        self.location.found(self.way(), CDN)
        self.clock.advance(1e6)
        used = self.way()
        self.assertEqual(CDN, used.url)
        self.assertTrue(self.location.lost(used))
        self.assertTrue(self.way().asks)

    def test_a_late_refusal_of_the_old_one_leaves_the_new_one_alone(self) -> None:
        self.location.found(self.way(), f"{CDN}?1")
        late, soon = self.way(), self.way()
        self.location.lost(soon)
        self.location.found(self.way(), f"{CDN}?2")
        self.assertTrue(self.location.lost(late))
        self.assertEqual(f"{CDN}?2", self.way().url)

    def test_a_renewal_that_fails_ahead_of_time_is_not_repeated_before_it_has_to_be(self) -> None:
        self.location.found(self.way(), old := self.signed(100))
        self.clock.advance(95)
        self.assertTrue(self.location.lost(self.way()))
        self.assertEqual(old, self.way().url)
        self.clock.advance(5)
        self.assertTrue(self.way().asks)

    def test_no_url_shows(self) -> None:
        self.location.found(self.way(), f"{CDN}?secret")
        self.assertNotIn("secret", repr(self.location) + repr(self.way()))


class RenewalTests(BlobTests):
    """A registry that redirects to URLs which live for ``life`` seconds."""

    life = 2.0

    def setUp(self) -> None:
        super().setUp()
        self.ends: dict[str, float] = {}
        self.held: list[FakeRequest] | None = None
        self.agent.answer = self.answer
        self.events: list[Any] = []
        globalLogPublisher.addObserver(self.events.append)
        self.addCleanup(globalLogPublisher.removeObserver, self.events.append)

    def answer(self, request: FakeRequest) -> None:
        if self.held is not None:
            self.held.append(request)
        elif request.url == URL:
            end = self.clock.seconds() + self.life
            url = f"{CDN}?sig=secret{len(self.ends)}"
            self.ends[url] = end
            request.respond(307, b"", Location=url)
        elif self.clock.seconds() < self.ends[request.url]:
            request.respond_range(BLOB)
        else:
            request.respond(403, b"expired")

    def asked(self) -> int:
        return self.agent.urls.count(URL)

    def test_however_many_reads_meet_an_expired_url_one_asks_for_another(self) -> None:
        self.successResultOf(self.read(0, 4))
        self.clock.advance(3)
        self.held = []
        reads = [self.read(4, 4) for _ in range(20)]
        held, self.held = self.held, None
        for request in held:
            self.answer(request)
        for done in reads:
            self.successResultOf(done)
        self.assertEqual(2, self.asked())

    def test_the_first_reads_share_one_redirect(self) -> None:
        self.held = []
        reads = [self.read(0, 4) for _ in range(20)]
        (first,), self.held = self.held, None
        self.answer(first)
        for done in reads:
            self.successResultOf(done)
        self.assertEqual(1, self.asked())

    def test_the_log_holds_no_signature(self) -> None:
        self.successResultOf(self.read(0, 4))
        self.held = []
        done = self.read(4, 4)
        (request,), self.held = self.held, None
        request.fail(ConnectionLost())
        self.clock.advance(5)
        self.successResultOf(done)
        self.assertTrue([event for event in self.events if "cdn.example" in str(event)])
        self.assertNotIn("secret", str(self.events))

    def test_urls_that_are_all_refused_end_the_read(self) -> None:
        self.successResultOf(self.read(0, 4))
        self.life = -1
        self.clock.advance(3)
        done = self.read(4, 4)
        self.clock.pump([1] * 40)
        self.assertIn("403", self.refusal(done))
        self.assertLessEqual(len(self.agent.urls), 3 + 2 * MAX_MISTAKES)

    def test_a_read_that_is_refused_wherever_others_are_not_ends(self) -> None:
        self.life = 1e6
        self.successResultOf(self.read(0, 4))
        self.held = []
        done = self.read(4, 4)
        for _ in range(MAX_DETOURS):
            (unlucky,), self.held = self.held, []
            other = self.read(8, 4)
            (refused,), self.held = self.held, None
            refused.respond(403)  # so that it asks for another URL, with which all is well
            self.successResultOf(other)
            self.held = []
            unlucky.respond(403)
            self.assertNoResult(done)
        (unlucky,), self.held = self.held, None
        self.successResultOf(self.read(8, 4))
        self.life = -1
        unlucky.respond(403)
        self.clock.pump([1] * 40)
        self.assertIn("403", self.refusal(done))
