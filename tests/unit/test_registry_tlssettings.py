"""Which servers are not verified, as users type it."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st
from twisted.trial.unittest import SynchronousTestCase

from erofs_twisted.registry.tlssettings import TLSSettings, authority_of, parse_unverified


class UnverifiedTests(SynchronousTestCase):
    def test_a_server_without_a_port_is_at_that_of_https(self) -> None:
        self.assertEqual({("a.example", 443)}, parse_unverified("a.example"))

    def test_several_are_separated_by_commas(self) -> None:
        self.assertEqual(
            {("a.example", 443), ("localhost", 5000), ("192.0.2.7", 8443)},
            parse_unverified("A.Example,localhost:5000,192.0.2.7:8443"),
        )

    def test_addresses_of_ipv6_are_in_brackets(self) -> None:
        self.assertEqual(
            {("::1", 443), ("2001:db8::7", 5000)}, parse_unverified("[::1],[2001:DB8:0::7]:5000")
        )

    def test_what_is_no_server_is_refused_with_what_is_wanted(self) -> None:
        for text, said in (
            ("https://a.example", "is a URL"),
            ("a.example/app", "is a URL"),
            ("*.example", "would be many servers"),
            ("a.example,", "'' is not a server"),
            ("::1", "in brackets"),
            ("[a]", "not an IPv6 address"),
            ("a.example:0", "1 to 65535"),
            ("a.example:65536", "1 to 65535"),
            ("a.example:https", "HOST:PORT"),
            ("a example", "not a host's name"),
            ("a.example;b.example", "not a host's name"),
        ):
            self.assertIn(said, str(self.assertRaises(ValueError, parse_unverified, text)))

    @given(st.text(alphabet=st.sampled_from("ab1.:[],/*- \n٣é"), max_size=12) | st.text(max_size=12))
    def test_any_text_is_servers_or_a_value_error(self, text: str) -> None:
        try:
            servers = parse_unverified(text)
        except ValueError:
            return
        for host, port in servers:
            self.assertTrue(host.isascii() and host == host.lower())
            self.assertTrue(1 <= port <= 65535)
        self.assertEqual(servers, parse_unverified(",".join(map(authority_of, servers))))

    def test_each_is_warned_of(self) -> None:
        warnings = TLSSettings(unverified=parse_unverified("b.example:5000,a.example")).warnings()
        self.assertEqual(2, len(warnings))
        self.assertIn("a.example:443 is not verified", warnings[0])
        self.assertEqual([], TLSSettings(authorities=("/x",)).warnings())
