"""Which proxy the environment's variables name for which URL."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st
from twisted.trial.unittest import SynchronousTestCase

from erofs_twisted.registry.errors import InvalidProxy
from erofs_twisted.registry.noproxy import NoProxy
from erofs_twisted.registry.proxies import Proxies, Proxy

LISTED = (
    "foobar.com, .barbaz.net, *.wildcard.io, 192.168.1.1, 192.168.1.2:81, 192.168.1.3:80, 10.0.0.0/30, "
    "2001:db8::52:0:1, [2001:db8::52:0:2]:443, [2001:db8::52:0:3]:80, 2002:db8:a::45/64"
)
COVERED = (
    *("localhost", "127.0.0.1", "127.0.0.2", "::1", "::ffff:127.0.0.1"),  # of this machine
    *("192.168.1.1", "192.168.1.3", "10.0.0.2", "::ffff:10.0.0.2"),
    *("2001:db8::52:0:1", "2001:db8::52:0:3", "2002:db8:a::123"),
    *("www.barbaz.net", "foobar.com", "www.foobar.com", "WWW.FooBar.com", "foobar.com.", "a.b.wildcard.io"),
)
NOT_COVERED = (
    *("::2", "192.168.1.2", "192.168.1.4", "10.0.0.4", "2001:db8::52:0:2", "fe80::424b:c8be:1643:a1b6"),
    *("barbaz.net", "foofoobar.com", "baz.com", "localhost.net", "local.localhost", "barbarbaz.net"),
    *("wildcard.io", "awildcard.io", "com"),
)
"""All of these at port 80: the table that Go's httpproxy package is tested with, and a little more."""

VARIABLES = ("HTTP_PROXY", "http_proxy", "HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy")


class NoProxyTests(SynchronousTestCase):
    def covers(self, listed: str, host: str, port: int = 80) -> bool:
        return NoProxy.parse(listed).covers(host, port)

    def test_the_hosts_that_go_reaches_directly_are_reached_directly(self) -> None:
        self.assertEqual([], [host for host in COVERED if not self.covers(LISTED, host)])

    def test_the_hosts_that_go_asks_a_proxy_for_have_one(self) -> None:
        self.assertEqual([], [host for host in NOT_COVERED if self.covers(LISTED, host)])

    def test_an_asterisk_covers_all_hosts_also_beside_others(self) -> None:
        for listed in ("*", "a.example,*", "* b.example"):
            self.assertTrue(all(self.covers(listed, host) for host in COVERED + NOT_COVERED), listed)

    def test_blanks_and_commas_separate_in_any_number(self) -> None:
        listed = " a.example,, b.example\tc.example ,"
        hosts = ["a.example", "b.example", "c.example", "d.example"]
        self.assertEqual([True, True, True, False], [self.covers(listed, host) for host in hosts])

    def test_a_port_limits_a_name_to_that_port(self) -> None:
        ports = [self.covers("a.example:5000", "sub.a.example", port) for port in (5000, 443)]
        self.assertEqual([True, False], ports)

    def test_an_address_may_stand_in_brackets_without_a_port(self) -> None:
        self.assertTrue(self.covers("[2001:db8::1]", "2001:db8::1"))

    def test_the_zone_of_an_address_is_no_part_of_a_name(self) -> None:
        self.assertFalse(self.covers("example.com", "1000::%25.example.com"))

    def test_names_in_other_scripts_are_those_of_dns(self) -> None:
        for listed in (".示例.com", "xn--fsq092h.com", "示例.com"):
            for host in ("www.示例.com", "www.xn--fsq092h.com"):
                self.assertTrue(self.covers(listed, host), (listed, host))

    def test_what_cannot_be_read_covers_nothing(self) -> None:
        for listed in (":1", "10.0.0.0/99", "a b/c", "[", "*.", ".", "foo.example:x", "300.0.0.1", "*:80"):
            self.assertFalse(self.covers(listed, "foo.example"), listed)
            self.assertFalse(self.covers(listed, "10.0.0.1"), listed)

    def test_without_rules_even_this_machine_is_not_covered(self) -> None:
        self.assertFalse(NoProxy().covers("localhost", 80))

    @given(st.text(max_size=60), st.text(min_size=1, max_size=30), st.integers(1, 65535))
    def test_no_list_and_no_host_are_too_odd(self, listed: str, host: str, port: int) -> None:
        self.assertIn(NoProxy.parse(listed).covers(host, port), (True, False))

    @given(st.ip_addresses(v=4).map(str) | st.ip_addresses(v=6).map(str), st.integers(1, 65535))
    def test_an_address_covers_itself_however_it_is_spelt(self, address: str, port: int) -> None:
        bracketed = f"[{address}]" if ":" in address else address
        for listed in (
            address,
            bracketed,
            f"{bracketed}:{port}",
            f"{address}/{120 if ':' in address else 24}",
        ):
            self.assertTrue(self.covers(listed, address, port), listed)

    @given(
        st.from_regex(r"[a-z]{1,8}(\.[a-z]{1,8}){1,3}", fullmatch=True),
        st.from_regex(r"[a-z]{1,8}", fullmatch=True),
    )
    def test_a_name_covers_what_is_below_it_and_not_what_ends_like_it(self, name: str, more: str) -> None:
        self.assertTrue(self.covers(name, f"{more}.{name}"))
        self.assertFalse(self.covers(name, f"{more}{name}"))
        self.assertTrue(self.covers(f".{name}", f"{more}.{name}"))
        self.assertFalse(self.covers(f".{name}", name))


class EnvironmentTests(SynchronousTestCase):
    def found(self, url: str, **environ: str) -> str | None:
        proxy = Proxies.from_environment(environ).proxy_for(url)
        return None if proxy is None else proxy.url

    def test_each_scheme_has_its_own_proxy(self) -> None:
        both = {"HTTP_PROXY": "plain.example", "HTTPS_PROXY": "secure.example:8080"}
        self.assertEqual("http://plain.example:80", self.found("http://a.example/", **both))
        self.assertEqual("http://secure.example:8080", self.found("https://a.example/", **both))

    def test_the_proxy_for_http_is_none_for_https(self) -> None:
        self.assertIsNone(self.found("https://a.example/", HTTP_PROXY="plain.example"))

    def test_the_proxy_for_all_is_for_what_has_none_of_its_own(self) -> None:
        all_of_them = {"ALL_PROXY": "all.example", "HTTPS_PROXY": "secure.example"}
        self.assertEqual("http://all.example:80", self.found("http://a.example/", **all_of_them))
        self.assertEqual("http://secure.example:80", self.found("https://a.example/", **all_of_them))

    def test_a_proxy_for_all_that_nobody_needs_may_be_of_any_kind(self) -> None:
        both = {"HTTP_PROXY": "plain.example", "HTTPS_PROXY": "secure.example"}
        self.assertIsNotNone(self.found("http://a.example/", ALL_PROXY="socks5://s.example", **both))

    def test_lower_case_will_do_and_upper_case_comes_first(self) -> None:
        for name in ("http_proxy", "all_proxy"):
            self.assertEqual(
                "http://low.example:80", self.found("http://a.example/", **{name: "low.example"})
            )
        both = {"https_proxy": "low.example", "HTTPS_PROXY": "high.example"}
        self.assertEqual("http://high.example:80", self.found("https://a.example/", **both))
        without = {"ALL_PROXY": "p.example", "no_proxy": "a.example", "NO_PROXY": "b.example"}
        self.assertIsNone(self.found("https://b.example/", **without))
        self.assertIsNotNone(self.found("https://a.example/", **without))

    def test_what_is_empty_is_missing(self) -> None:
        self.assertEqual(
            "http://low.example:80", self.found("https://a/", HTTPS_PROXY=" ", https_proxy="low.example")
        )
        self.assertIsNone(self.found("https://a.example/", HTTPS_PROXY=""))

    def test_a_cgi_program_does_not_take_what_a_client_sent(self) -> None:
        sent = {"REQUEST_METHOD": "GET", "HTTP_PROXY": "evil.example"}
        self.assertIsNone(self.found("http://a.example/", **sent))
        self.assertEqual("http://low.example:80", self.found("http://a/", http_proxy="low.example", **sent))
        self.assertIsNotNone(self.found("https://a.example/", HTTPS_PROXY="secure.example", **sent))

    def test_hosts_that_need_none_have_none(self) -> None:
        environ = {"ALL_PROXY": "p.example", "NO_PROXY": "a.example:5000,10.0.0.0/8"}
        self.assertIsNone(self.found("https://a.example:5000/v2/", **environ))
        self.assertIsNotNone(self.found("https://a.example/v2/", **environ))
        self.assertIsNone(self.found("http://10.1.2.3/v2/", **environ))

    def test_this_machine_is_reached_directly(self) -> None:
        for host in ("localhost", "LOCALHOST:5000", "127.0.0.1:5000", "[::1]:5000", "127.8.9.1"):
            self.assertIsNone(self.found(f"http://{host}/", ALL_PROXY="p.example"), host)

    def test_who_has_no_proxies_has_none_for_any_url(self) -> None:
        self.assertIsNone(Proxies().proxy_for("https://a.example/"))

    def test_without_a_list_of_hosts_all_have_one(self) -> None:
        proxy = Proxy.parse("p.example", "HTTP_PROXY")
        self.assertIs(proxy, Proxies(http=proxy).proxy_for("http://localhost/"))


class ProxyTests(SynchronousTestCase):
    def test_urls_are_understood_as_go_does(self) -> None:
        for text, url in (
            ("127.0.0.1:8080", "http://127.0.0.1:8080"),
            ("cache.corp.example.com:1234", "http://cache.corp.example.com:1234"),
            ("cache.corp.example.com", "http://cache.corp.example.com:80"),
            ("localhost", "http://localhost:80"),
            ("https://cache.corp.example.com", "https://cache.corp.example.com:443"),
            ("HTTP://Proxy.Example:3128/", "http://proxy.example:3128"),
            ("http://[2001:db8::1]:3128", "http://[2001:db8::1]:3128"),
            ("[::1]:3128", "http://[::1]:3128"),
            ("http://示例.com", "http://xn--fsq092h.com:80"),
            ("user:secret@proxy.example:3128", "http://proxy.example:3128"),
        ):
            self.assertEqual(url, Proxy.parse(text, "HTTP_PROXY").url)

    def test_user_and_password_are_decoded(self) -> None:
        for text, pair in (
            ("http://us%20er:p%40s%2fs%3A%25@p.example", ("us er", "p@s/s:%")),
            ("http://user@p.example", ("user", "")),
            ("http://user:@p.example", ("user", "")),
            ("user:a:b@c@p.example", ("user", "a:b@c")),
            ("http://%C3%BC:%C3%B6@p.example", ("ü", "ö")),
        ):
            credentials = Proxy.parse(text, "HTTP_PROXY").credentials
            assert credentials is not None
            self.assertEqual(pair, (credentials.username, credentials.password), text)

    def test_without_a_user_there_are_no_credentials(self) -> None:
        for text in ("http://p.example", "http://@p.example", "http://:@p.example"):
            self.assertIsNone(Proxy.parse(text, "HTTP_PROXY").credentials, text)

    def test_other_kinds_of_proxies_are_refused_by_name(self) -> None:
        for scheme in ("socks5", "socks5h", "socks4a", "ftp", "SOCKS5"):
            for variable in VARIABLES:
                with self.assertRaises(InvalidProxy) as caught:
                    Proxies.from_environment({variable: f"{scheme}://user:tops3cret@p.example"})
                self.assertIn(f"{variable}: ", str(caught.exception))
                self.assertIn(scheme.lower(), str(caught.exception))
                self.assertNotIn("tops3cret", str(caught.exception))

    def test_what_is_no_proxy_is_refused_and_not_shown(self) -> None:
        for text in (
            "http://",
            "http://user:tops3cret@",
            "http://user:tops3cret@p.example:0",
            "http://user:tops3cret@p.example:70000",
            "http://user:tops3cret@p.example:port",
            "http://user:tops3cret@p.example/path",
            "http://user:tops3cret@p.example/?q",
            "http://user:tops3cret/with@p.example:3128",
            "http://user:123/tops3cret@p.example:3128",
            "http://user:12#tops3cret@p.example:3128",
            "http://user:12?tops3cret@p.example:3128",
            "http://user:tops3cret[@p.example:3128",
            "user:tops3cret",
            "http://user:tops3cret@p example",
            "http://user:tops3cret\n@p.example",
            "http://user:tops3cret@p.example\x00",
            "http://us%3Aer:tops3cret@p.example",
            "http://tops3cret:tops3cret@[p.example]",
            "http://tops3cret@[fe80::1%25eth0]:3128",
        ):
            with self.assertRaises(InvalidProxy, msg=text) as caught:
                Proxies.from_environment({"https_proxy": text})
            error: BaseException | None = caught.exception
            self.assertTrue(str(error).startswith("https_proxy: "), str(error))
            while error is not None:
                self.assertNotIn("tops3cret", repr(error), text)
                error = error.__cause__ or error.__context__

    def test_the_cure_is_said(self) -> None:
        with self.assertRaises(InvalidProxy) as caught:
            Proxies.from_environment({"HTTP_PROXY": "http://user:a/b@p.example"})
        self.assertIn("http://USER:PASSWORD@HOST:PORT", str(caught.exception))
        self.assertIn("%2F for /", str(caught.exception))

    @given(st.text(max_size=60))
    def test_any_text_is_a_proxy_or_refused(self, text: str) -> None:
        for value in (text, f"http://{text}", f"http://user:{text}@p.example:3128"):
            try:
                proxy = Proxy.parse(value, "HTTP_PROXY")
            except InvalidProxy:
                continue
            self.assertTrue(proxy.host.isascii() and 0 < proxy.port < 65536, value)

    def test_neither_user_nor_password_is_in_a_repr(self) -> None:
        proxies = Proxies.from_environment({"ALL_PROXY": "http://us3r:tops3cret@p.example"})
        for shown in (repr(proxies), str(proxies.https), repr(proxies.http)):
            self.assertNotIn("tops3cret", shown)
            self.assertNotIn("us3r", shown)
