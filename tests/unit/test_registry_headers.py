"""Headers and URLs that come from a server: challenges, ranges, pauses, redirects."""

from __future__ import annotations

import contextlib
from email.utils import formatdate

from hypothesis import given
from hypothesis import strategies as st
from twisted.trial.unittest import SynchronousTestCase

from erofs_twisted.registry.challenge import Challenge, parse_challenges
from erofs_twisted.registry.contentrange import (
    ContentRange,
    Unsatisfied,
    check_partial,
    parse_content_range,
)
from erofs_twisted.registry.errors import InvalidHeader, RegistryError
from erofs_twisted.registry.link import MAX_LENGTH, next_target
from erofs_twisted.registry.retry import Backoff, parse_retry_after
from erofs_twisted.registry.urls import Origin, redacted, resolve_location, with_parameters

tokens = st.text("abcXYZ019!#$%&'*+.^_`|~-", min_size=1, max_size=8)


def quoted(value: str) -> str:
    return '"' + value.replace("\\", "\\\\").replace('"', '\\"') + '"'


class ChallengeTests(SynchronousTestCase):
    def test_what_docker_hub_sends(self) -> None:
        line = (
            'Bearer realm="https://auth.docker.io/token",service="registry.docker.io",'
            'scope="repository:library/alpine:pull,push"'
        )
        self.assertEqual(
            [
                Challenge(
                    "bearer",
                    {
                        "realm": "https://auth.docker.io/token",
                        "service": "registry.docker.io",
                        "scope": "repository:library/alpine:pull,push",
                    },
                )
            ],
            parse_challenges([line]),
        )

    def test_every_form_is_read(self) -> None:
        cases: dict[str, list[Challenge]] = {
            "": [],
            " , ,": [],
            "Negotiate": [Challenge("negotiate")],
            "Negotiate YII==": [Challenge("negotiate", {}, "YII==")],
            'Basic realm="a b"': [Challenge("basic", {"realm": "a b"})],
            "BASIC Realm=x": [Challenge("basic", {"realm": "x"})],
            'Basic realm = "x"': [Challenge("basic", {"realm": "x"})],
            r'Basic realm="a \"b\" \\ c"': [Challenge("basic", {"realm": 'a "b" \\ c'})],
            'Negotiate, Bearer realm="r"': [Challenge("negotiate"), Challenge("bearer", {"realm": "r"})],
            'Negotiate YII=, Basic realm="r"': [
                Challenge("negotiate", {}, "YII="),
                Challenge("basic", {"realm": "r"}),
            ],
            'Basic realm="x, Bearer realm=y", Bearer realm="z"': [
                Challenge("basic", {"realm": "x, Bearer realm=y"}),
                Challenge("bearer", {"realm": "z"}),
            ],
            'Bearer realm="r",service="",scope="s"': [
                Challenge("bearer", {"realm": "r", "service": "", "scope": "s"})
            ],
            'Bearer service=,realm="r"': [Challenge("bearer", {"service": "", "realm": "r"})],
            "Bearer realm=https://a.example/token,service=s": [
                Challenge("bearer", {"realm": "https://a.example/token", "service": "s"})
            ],
            'Bearer realm="first",realm="second"': [Challenge("bearer", {"realm": "first"})],
            'Bearer ,, realm="r" ,': [Challenge("bearer", {"realm": "r"})],
        }
        for line, expected in cases.items():
            with self.subTest(line=line):
                self.assertEqual(expected, parse_challenges([line]))

    def test_several_lines_are_several_challenges(self) -> None:
        found = parse_challenges(['Bearer realm="r"', 'Basic realm="b"'])
        self.assertEqual(["bearer", "basic"], [challenge.scheme for challenge in found])

    def test_an_unfinished_string_is_refused(self) -> None:
        self.assertRaises(InvalidHeader, parse_challenges, ['Bearer realm="r'])

    def test_an_endless_header_is_refused(self) -> None:
        self.assertRaises(InvalidHeader, parse_challenges, ["a," * 10_000])

    @given(
        st.lists(
            st.tuples(tokens, st.dictionaries(tokens.map(str.lower), st.text(max_size=12), min_size=1)),
            min_size=1,
            max_size=3,
        )
    )
    def test_what_was_written_is_read(self, written: list[tuple[str, dict[str, str]]]) -> None:
        line = ", ".join(
            scheme + " " + ", ".join(f"{name}={quoted(value)}" for name, value in parameters.items())
            for scheme, parameters in written
        )
        if len(line) <= 16 * 1024:
            expected = [Challenge(scheme.lower(), parameters) for scheme, parameters in written]
            self.assertEqual(expected, parse_challenges([line]))

    @given(st.lists(st.one_of(st.text(), st.text('aB=", \\/:~'))))
    def test_any_lines_are_challenges_or_refused(self, lines: list[str]) -> None:
        with contextlib.suppress(InvalidHeader):
            parse_challenges(lines)


class ContentRangeTests(SynchronousTestCase):
    def test_every_form_is_read(self) -> None:
        self.assertEqual(ContentRange(0, 100, 1000), parse_content_range("bytes 0-99/1000"))
        self.assertEqual(ContentRange(5, 6, None), parse_content_range("Bytes 5-5/*"))
        self.assertEqual(Unsatisfied(1000), parse_content_range(" bytes */1000 "))

    def test_what_is_no_range_of_bytes_is_refused(self) -> None:
        for text in (
            "",
            "items 0-1/2",
            "bytes 0-99",
            "bytes=0-99/100",
            "bytes */*",
            "bytes 9-8/10",
            "bytes 0-10/10",
            "bytes -1-2/3",
            "bytes 0-99/1000, bytes 0-1/2",
            "bytes \u0660-\u0661/\u0669",
            "bytes 0-1/" + "9" * 5000,
        ):
            with self.subTest(text=text[:40]):
                self.assertRaises(InvalidHeader, parse_content_range, text)

    @given(st.integers(0, 2**62), st.integers(1, 2**61), st.integers(0, 2**61))
    def test_what_was_written_is_read(self, start: int, length: int, rest: int) -> None:
        total = start + length + rest
        found = parse_content_range(f"bytes {start}-{start + length - 1}/{total}")
        self.assertEqual(ContentRange(start, start + length, total), found)

    @given(st.one_of(st.text(), st.text("bytes 0123456789-/*")))
    def test_any_text_is_a_range_or_refused(self, text: str) -> None:
        with contextlib.suppress(InvalidHeader):
            parse_content_range(text)

    def test_headers_of_the_range_asked_for_are_accepted(self) -> None:
        check_partial(["bytes 10-19/100"], 10, 10, 20, 100)
        check_partial(["bytes 10-19/100"], "unknown", 10, 20, 100)

    def test_headers_of_anything_else_are_refused(self) -> None:
        for lines, body_length in (
            ([], 10),
            (["bytes 10-19/100", "bytes 10-19/100"], 10),
            (["bytes 0-9/100"], 10),
            (["bytes 10-18/100"], 9),
            (["bytes 10-20/100"], 11),
            (["bytes 10-19/101"], 10),
            (["bytes 10-19/*"], 10),
            (["bytes */100"], 10),
            (["chars 10-19/100"], 10),
            (["bytes 10-19/100"], 9),
            (["bytes 10-19/100"], 11),
        ):
            with self.subTest(lines=lines, body_length=body_length):
                self.assertRaises(RegistryError, check_partial, lines, body_length, 10, 20, 100)


class RetryTests(SynchronousTestCase):
    def test_the_span_doubles_up_to_its_limit(self) -> None:
        backoff = Backoff(first=1.0, longest=5.0, random=lambda: 1.0)
        self.assertEqual([1, 2, 4, 5, 5], [backoff.delay(attempt, 1000) for attempt in range(5)])

    def test_the_delay_is_anywhere_in_the_span(self) -> None:
        backoff = Backoff(first=1.0, longest=5.0, random=lambda: 0.0)
        self.assertEqual(0, backoff.delay(3, 1000))

    def test_the_delay_ends_with_the_time_that_is_left(self) -> None:
        self.assertEqual(2, Backoff(first=8, longest=8, random=lambda: 1.0).delay(0, 2))

    def test_a_pause_asked_for_is_kept(self) -> None:
        backoff = Backoff(first=1.0, random=lambda: 0.5)
        self.assertEqual(30.5, backoff.delay(0, 1000, 30))

    def test_a_pause_that_is_too_long_leaves_time_for_an_attempt(self) -> None:
        self.assertEqual(50, Backoff(random=lambda: 0.0).delay(0, 100, 3600))

    def test_a_thousandth_attempt_overflows_nothing(self) -> None:
        self.assertEqual(5, Backoff(random=lambda: 1.0).delay(5000, 100))

    def test_retry_after_is_read(self) -> None:
        now = 1_700_000_000.0
        cases = {
            "120": 120,
            " 0 ": 0,
            formatdate(now + 90, usegmt=True): 90,
            formatdate(now - 90, usegmt=True): 0,
            "soon": None,
            "-5": None,
            "": None,
            "9" * 5000: None,
            "Mon, 99 Foo 2023 99:99:99 GMT": None,
        }
        for text, expected in cases.items():
            with self.subTest(text=text[:40]):
                self.assertEqual(expected, parse_retry_after(text, now))

    @given(st.one_of(st.text(), st.text("0123456789 :,+-GMTJanSun")))
    def test_any_text_asks_for_a_pause_or_for_nothing(self, text: str) -> None:
        pause = parse_retry_after(text, 0.0)
        self.assertTrue(pause is None or pause >= 0)


class UrlTests(SynchronousTestCase):
    def test_an_origin_has_the_port_that_its_scheme_implies(self) -> None:
        self.assertEqual(Origin("https", "a.example", 443), Origin.of("https://A.example/x?y"))
        self.assertEqual(Origin("http", "::1", 5000), Origin.of("http://[::1]:5000/"))

    def test_an_origin_differs_by_scheme_host_and_port(self) -> None:
        urls = ["https://a.example/", "http://a.example/", "https://b.example/", "https://a.example:444/"]
        self.assertEqual(4, len({Origin.of(url) for url in urls}))

    def test_other_schemes_have_no_origin(self) -> None:
        for url in (
            "ftp://a.example/",
            "file:///etc/passwd",
            "",
            "https://",
            "https://a.example:x/",
            "http://[",
        ):
            with self.subTest(url=url):
                self.assertRaises(InvalidHeader, Origin.of, url)

    def test_locations_are_resolved(self) -> None:
        base = "https://a.example/v2/x/blobs/sha256:1"
        cases = {
            "/other?sig=%2F": "https://a.example/other?sig=%2F",
            "//b.example/y": "https://b.example/y",
            "https://b.example/y#part": "https://b.example/y",
        }
        for location, expected in cases.items():
            with self.subTest(location=location):
                self.assertEqual(expected, resolve_location(base, location))

    def test_odd_locations_are_refused(self) -> None:
        for location in (
            "ftp://a.example/",
            "https://user:secret@b.example/",
            "https://b.example/a b",
            "https://b.example/\u00e9",
            "http://[",
            "https://b.example:99999/",
        ):
            with self.subTest(location=location):
                self.assertRaises(InvalidHeader, resolve_location, "https://a.example/", location)

    @given(st.one_of(st.text(), st.text("htps:/[]@.?#%1a")))
    def test_any_location_is_resolved_or_refused(self, location: str) -> None:
        with contextlib.suppress(InvalidHeader):
            Origin.of(resolve_location("https://a.example/b", location))

    def test_a_redacted_url_shows_neither_query_nor_user(self) -> None:
        shown = redacted("https://user:secret@a.example/p?X-Signature=secret#secret")
        self.assertEqual("https://a.example/p?\u2026", shown)

    @given(st.text())
    def test_any_text_can_be_redacted(self, text: str) -> None:
        redacted(text)

    def test_parameters_are_added_to_a_query(self) -> None:
        self.assertEqual(
            "https://a.example/t?x=1&service=a+b&scope=c%3Ad",
            with_parameters("https://a.example/t?x=1", [("service", "a b"), ("scope", "c:d")]),
        )


class LinkTests(SynchronousTestCase):
    def check(self, expected: str | None, *lines: str) -> None:
        self.assertEqual(expected, next_target(lines))

    def test_the_target_stands_between_angle_brackets(self) -> None:
        self.check("/v2/a/referrers/b?n=2", '</v2/a/referrers/b?n=2>; rel="next"')

    def test_quotes_and_case_do_not_matter(self) -> None:
        for text in ("rel=next", 'REL="Next"', ' rel = "next" ', "rel=NEXT"):
            self.check("?2", f"<?2>;{text}")

    def test_a_link_may_have_several_relations_and_other_parameters(self) -> None:
        self.check("?2", '<?2>; title="a, \\"b\\"; <c>"; rel="last next"; flag')

    def test_only_the_first_rel_counts(self) -> None:
        self.check(None, '<?2>; rel="prev"; rel="next"')

    def test_others_are_passed_over(self) -> None:
        self.check("?3", '<?1>; rel="prev", <?2>,, <?3>; rel=next')
        self.check("?3", "<?1>; rel=prev", "<?3>; rel=next")

    def test_without_one_there_is_none(self) -> None:
        self.check(None)
        for text in ("", "nonsense", "<?2>", "<?2>; rel=nextpage", '<?2>; title="rel=next"', "?2; rel=next"):
            self.check(None, text)

    def test_a_line_of_any_length_ends(self) -> None:
        self.check(None, "<?1>," * MAX_LENGTH + "<?2>; rel=next")

    @given(st.text('<>;,="\\ relnxt?2\t', max_size=80))
    def test_anything_can_be_read(self, line: str) -> None:
        target = next_target([line])
        self.assertTrue(target is None or ("next" in line and target in line))

    @given(st.text("abc/?=&,;%", max_size=20), st.lists(st.sampled_from(["prev", "first", "x"]), max_size=3))
    def test_what_was_written_is_read(self, target: str, others: list[str]) -> None:
        links = [f'<{target}{number}>; rel="{name}"' for number, name in enumerate(others)]
        self.check(target, ", ".join([*links, f'<{target}>; rel="next"']))
