"""What a token server answers, and what it is asked with."""

from __future__ import annotations

import base64
import contextlib
import json
from datetime import UTC, datetime
from typing import Any

from hypothesis import given
from hypothesis import strategies as st
from twisted.trial.unittest import SynchronousTestCase

from erofs_twisted.registry.credentials import Credentials
from erofs_twisted.registry.errors import AccessDenied, TransferFailed
from erofs_twisted.registry.tokens import parse_token

ALICE = Credentials("alice", "secret")


class TokenAnswerTests(SynchronousTestCase):
    NOW = 1_700_000_000.0

    def parse(self, **answer: Any) -> tuple[str, float, float]:
        token = parse_token(json.dumps(answer).encode(), self.NOW, self.NOW)
        return token.value, token.refresh_at - self.NOW, token.expires_at - self.NOW

    def stamp(self, offset: float) -> str:
        return datetime.fromtimestamp(self.NOW + offset, UTC).isoformat().replace("+00:00", "Z")

    def test_a_token_lives_as_long_as_it_says(self) -> None:
        self.assertEqual(("t", 225, 300), self.parse(token="t", expires_in=300))

    def test_a_token_that_does_not_say_lives_60_seconds(self) -> None:
        self.assertEqual(("t", 45, 60), self.parse(token="t"))

    def test_access_token_wins(self) -> None:
        self.assertEqual("a", self.parse(token="t", access_token="a")[0])

    def test_an_empty_access_token_does_not(self) -> None:
        self.assertEqual("t", self.parse(token="t", access_token="")[0])

    def test_the_time_of_issue_counts(self) -> None:
        found = self.parse(token="t", expires_in=300, issued_at=self.stamp(-100))
        self.assertEqual(("t", 125, 200), found)

    def test_the_time_of_issue_is_compared_with_the_clock_that_may_be_set(self) -> None:
        answer = json.dumps({"token": "t", "expires_in": 300, "issued_at": self.stamp(-100)}).encode()
        self.assertEqual(50 + 200, parse_token(answer, 50, self.NOW).expires_at)

    def test_clocks_that_disagree_do_not_count(self) -> None:
        for offset in (-4000, 4000):
            found = self.parse(token="t", expires_in=300, issued_at=self.stamp(offset))
            self.assertEqual(("t", 225, 300), found)

    def test_nanoseconds_are_read(self) -> None:
        self.assertEqual("t", self.parse(token="t", issued_at="2023-11-14T22:13:20.123456789Z")[0])

    def test_odd_lifetimes_are_60_seconds(self) -> None:
        for expires_in in (0, -1, True, "soon", None, 1e300, [], "1" * 5000):
            self.assertEqual(60, self.parse(token="t", expires_in=expires_in)[2])

    def test_a_lifetime_may_be_a_string(self) -> None:
        self.assertEqual(90, self.parse(token="t", expires_in="90")[2])

    def test_a_token_that_would_break_the_header_is_refused(self) -> None:
        for value in ("", "a b", "a\r\nX: y", "\u00e9", 5, None):
            self.assertRaises(TransferFailed, self.parse, token=value)

    def test_a_token_does_not_show(self) -> None:
        self.assertNotIn("hush", repr(parse_token(b'{"token":"hush"}', 0, 0)))

    @given(
        st.one_of(
            st.binary(),
            st.dictionaries(
                st.sampled_from(["token", "access_token", "expires_in", "issued_at"]),
                st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.lists(st.none()),
            ).map(lambda answer: json.dumps(answer).encode()),
        )
    )
    def test_any_answer_is_a_token_or_refused(self, body: bytes) -> None:
        with contextlib.suppress(TransferFailed):
            token = parse_token(body, self.NOW, self.NOW)
            self.assertLessEqual(self.NOW, token.expires_at)


class CredentialsTests(SynchronousTestCase):
    def test_they_do_not_show(self) -> None:
        shown = repr(ALICE) + str(ALICE) + f"{ALICE}"
        self.assertNotIn("alice", shown)
        self.assertNotIn("secret", shown)

    def test_they_are_sent_in_utf_8(self) -> None:
        sent = Credentials("j\u00fcrgen", "gr\u00fc\u00df:e").authorization()
        self.assertEqual("j\u00fcrgen:gr\u00fc\u00df:e", base64.b64decode(sent.split()[1]).decode())

    def test_a_colon_in_a_user_name_is_refused(self) -> None:
        self.assertRaises(AccessDenied, Credentials, "a:b", "c")
