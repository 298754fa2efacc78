"""Where a registry may send us for a token."""

from __future__ import annotations

import ipaddress
import socket

from hypothesis import given
from hypothesis import strategies as st
from twisted.trial.unittest import SynchronousTestCase

from erofs_twisted.registry.errors import AccessDenied
from erofs_twisted.registry.realm import check_realm, literal_address
from erofs_twisted.registry.urls import Origin

PUBLIC = "https://r.example"
PLAIN = "http://r.example:5000"


class RealmTests(SynchronousTestCase):
    def allowed(self, realm: str, registry: str = PUBLIC) -> None:
        check_realm(realm, Origin.of(registry))

    def refused(self, realm: str, registry: str = PUBLIC) -> str:
        return str(self.assertRaises(AccessDenied, check_realm, realm, Origin.of(registry)))

    def test_https_at_another_name_is_fine(self) -> None:
        self.allowed("https://auth.example/token?a=b")

    def test_a_public_address_is_fine(self) -> None:
        self.allowed("https://8.8.8.8/token")
        self.allowed("https://[2606:4700::1111]/token")

    def test_http_is_fine_only_where_the_registry_speaks_it(self) -> None:
        self.allowed("http://auth.example/token", PLAIN)
        self.assertIn("not https", self.refused("http://auth.example/token"))

    def test_private_addresses_are_refused(self) -> None:
        for host in (
            "10.0.0.1",
            "172.16.0.1",
            "192.168.1.1",
            "127.0.0.1",
            "169.254.169.254",
            "100.64.0.1",
            "0.0.0.0",
            "224.0.0.1",
            "[::1]",
            "[::]",
            "[fe80::1]",
            "[fd00::1]",
            "[::ffff:10.0.0.1]",
            "[2002:7f00:1::]",
        ):
            for registry in (PUBLIC, PLAIN):
                self.assertIn("private address", self.refused(f"https://{host}/token", registry))

    def test_other_spellings_of_private_addresses_are_refused_too(self) -> None:
        for host in ("localhost", "LOCALHOST", "x.localhost", "localhost.", "127.1", "2130706433", "0x7f.1"):
            self.assertIn("private address", self.refused(f"https://{host}/token"))

    def test_the_registrys_own_host_is_fine(self) -> None:
        self.allowed("http://10.0.0.1:5001/token", "http://10.0.0.1:5000")
        self.allowed("https://[fd00::1]/token", "https://[fd00::1]:5000")

    def test_a_private_registry_may_not_send_us_to_its_neighbours(self) -> None:
        self.refused("http://10.0.0.2/token", "http://10.0.0.1:5000")

    def test_loopback_is_one_host_however_it_is_called(self) -> None:
        self.allowed("http://127.0.0.1:5001/token", "http://localhost:5000")
        self.allowed("http://localhost:5001/token", "http://[::1]:5000")

    def test_user_information_is_refused_and_not_shown(self) -> None:
        self.assertNotIn("secret", self.refused("https://alice:secret@auth.example/token"))

    def test_what_is_no_url_is_refused(self) -> None:
        for realm in ("", "token", "file:///etc/passwd", "https://", "https://["):
            self.refused(realm)

    @given(
        st.text("0123456789abcdefx.", max_size=20)
        | st.lists(st.integers(0, 300).map(str) | st.integers(0, 300).map(hex), max_size=5).map(".".join)
        | st.integers(0, 1 << 33).map(str)
    )
    def test_what_the_c_library_takes_for_an_address_is_one_here(self, host: str) -> None:
        try:
            expected = ipaddress.IPv4Address(socket.inet_aton(host))
        except OSError:
            return
        self.assertEqual(expected, literal_address(host))

    @given(st.text(max_size=30))
    def test_any_host_is_an_address_or_a_name(self, host: str) -> None:
        literal_address(host)
