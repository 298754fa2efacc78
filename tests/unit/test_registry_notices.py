"""Warnings of a registry: read, shown once, and only where they come from the registry itself."""

from __future__ import annotations

from typing import Any

from hypothesis import given
from hypothesis import strategies as st
from twisted.logger import globalLogPublisher
from twisted.trial.unittest import SynchronousTestCase

from erofs_twisted.registry.notices import MAX_TEXT, MAX_TEXTS, Notices, parse_warnings
from tests.unit.fakehttp import FakeRequest
from tests.unit.test_registry_auth import AuthTests


class WarningTests(SynchronousTestCase):
    def test_the_text_is_read(self) -> None:
        self.assertEqual(["it is over"], parse_warnings(['299 - "it is over"']))

    def test_quotes_and_commas_within_are_text(self) -> None:
        self.assertEqual(['say "a, b"'], parse_warnings([r'299 - "say \"a, b\""']))

    def test_several_are_read_from_one_line_and_from_several(self) -> None:
        self.assertEqual(
            ["a", "b", "c"], parse_warnings(['299 - "a", 299 r.example "b"', '299 - "c" "date"'])
        )

    def test_what_is_meant_for_caches_is_not(self) -> None:
        self.assertEqual([], parse_warnings(['110 - "Response is Stale"', '1299 - "x"', "299 - x", ""]))

    def test_what_cannot_be_printed_is_not(self) -> None:
        self.assertEqual(["a b"], parse_warnings(['299 - "a\x1bb"']))

    @given(st.lists(st.text() | st.text('29 -"\\,a')))
    def test_any_header_gives_texts_that_can_be_shown(self, lines: list[str]) -> None:
        for text in parse_warnings(lines):
            self.assertTrue(0 < len(text) <= MAX_TEXT)
            self.assertTrue(text.isprintable())

    def test_each_is_new_once(self) -> None:
        notices = Notices()
        self.assertEqual(["a"], notices.new(['299 - "a"', '299 - "a"']))
        self.assertEqual(["b"], notices.new(['299 - "a"', '299 - "b"']))
        self.assertEqual([], notices.new(['299 - "b"']))

    def test_a_registry_that_goes_on_and_on_is_not_listened_to(self) -> None:
        notices = Notices()
        told = [text for number in range(1000) for text in notices.new([f'299 - "{number}"'])]
        self.assertEqual(MAX_TEXTS, len(told))


class SessionTests(AuthTests):
    def setUp(self) -> None:
        super().setUp()
        self.events: list[Any] = []
        globalLogPublisher.addObserver(self.events.append)
        self.addCleanup(globalLogPublisher.removeObserver, self.events.append)

    def answer(self, request: FakeRequest) -> None:
        if request.url == "https://cdn.example/b":
            request.respond(200, b"", Warning='299 - "from elsewhere"')
        elif request.url.endswith("/away"):
            request.respond(307, b"", Location="https://cdn.example/b", Warning='299 - "moved"')
        else:
            request.respond(200, b"", Warning='299 - "it is over"')

    def told(self) -> list[str]:
        return [event["text"] for event in self.events if "text" in event]

    def test_a_warning_is_logged_once_however_often_it_comes(self) -> None:
        self.status()
        self.status()
        apart = self.session.apart()
        self.session = apart
        self.status()
        self.assertEqual(["it is over"], self.told())

    def test_what_another_host_says_is_not_the_registrys_word(self) -> None:
        self.successResultOf(self.get("https://r.example/away"))
        self.assertEqual(["moved"], self.told())
