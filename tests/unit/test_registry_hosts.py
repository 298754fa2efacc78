"""What hosts.toml says of a registry's servers, and which of the directories it lies in counts."""

from __future__ import annotations

import os
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st
from twisted.trial.unittest import SynchronousTestCase

from erofs_twisted.registry.hosts import (
    ALL,
    Capability,
    HostSettings,
    InvalidHosts,
    default_host,
    directories_of,
    parse_hosts,
)
from erofs_twisted.registry.hostsdir import FoundHosts, find_hosts

FULL = """
server = "https://registry.example"
capabilities = ["pull", "resolve"]
ca = "/etc/ca.pem"
[header]
  x-team = "blue"

[host."https://mirror.example"]
  capabilities = ["Pull"]
  ca = ["one.pem", "/etc/two.pem"]
  skip_verify = false
  dial_timeout = "1m1.5s"
  [host."https://mirror.example".header]
    Authorization = "Bearer swordfish"
    x-many = ["a", "b"]

[host."HTTP://192.0.2.1:5000/cache/"]
  client = [["a.cert", "a.key"], ["b.pem", ""]]
  skip_verify = true

[host."https://odd.example/api/docker"]
  override_path = true
  client = ["c.pem", "d.pem"]

[host."[2001:db8::5]:5000"]
  client = "e.pem"
"""


def parsed(text: str, registry: str = "r.example") -> tuple[HostSettings, ...]:
    hosts, unknown = parse_hosts(text, "/dir", registry)
    assert not unknown, unknown
    return hosts


class ParseTests(SynchronousTestCase):
    def refusal(self, text: str) -> str:
        return str(self.assertRaises(InvalidHosts, parse_hosts, text, "/dir", "r.example"))

    def test_hosts_come_in_their_order_and_the_server_last(self) -> None:
        hosts = parsed(FULL)
        self.assertEqual(
            ["mirror.example", "192.0.2.1:5000", "odd.example", "[2001:db8::5]:5000", "registry.example"],
            [host.authority for host in hosts],
        )
        self.assertEqual([True] * 4 + [False], [host.is_mirror for host in hosts])
        self.assertEqual(["https", "http", "https", "https", "https"], [host.scheme for host in hosts])

    def test_paths_are_relative_to_the_file(self) -> None:
        mirror, cache, odd, last, server = parsed(FULL)
        self.assertEqual(("/dir/one.pem", "/etc/two.pem"), mirror.authorities)
        self.assertEqual(("/etc/ca.pem",), server.authorities)
        self.assertEqual((("/dir/a.cert", "/dir/a.key"), ("/dir/b.pem", "/dir/b.pem")), cache.clients)
        self.assertEqual((("/dir/c.pem", "/dir/c.pem"), ("/dir/d.pem", "/dir/d.pem")), odd.clients)
        self.assertEqual((("/dir/e.pem", "/dir/e.pem"),), last.clients)

    def test_the_api_is_below_v2_unless_the_path_is_overridden(self) -> None:
        self.assertEqual(
            ["/v2", "/cache/v2", "/api/docker", "/v2", "/v2"], [host.root for host in parsed(FULL)]
        )
        self.assertEqual("/v2", parsed('server = "https://r.example/v2/"')[0].root)
        self.assertEqual("", parsed('server = "https://r.example"\noverride_path = true')[0].root)

    def test_capabilities_are_what_is_named_or_all(self) -> None:
        mirror, cache, *_, server = parsed(FULL)
        self.assertEqual({Capability.PULL}, mirror.capabilities)
        self.assertEqual(ALL, cache.capabilities)
        self.assertEqual({Capability.PULL, Capability.RESOLVE}, server.capabilities)

    def test_headers_are_lists_in_one_and_do_not_show(self) -> None:
        mirror, *_, server = parsed(FULL)
        self.assertEqual({"Authorization": "Bearer swordfish", "x-many": "a, b"}, mirror.headers)
        self.assertEqual({"x-team": "blue"}, server.headers)
        self.assertNotIn("swordfish", repr(mirror))

    def test_a_time_is_in_gos_notation(self) -> None:
        for text, seconds in (("500ms", 0.5), ("3s", 3.0), ("1m1.5s", 61.5), (".5h", 1800.0)):
            self.assertEqual(seconds, parsed(f'dial_timeout = "{text}"')[0].dial_timeout)
        for text in ("3", "s", "-3s", "0s", "3 s", "1e3s", "9999999h"):
            self.assertIn(repr(text), self.refusal(f'dial_timeout = "{text}"'))

    def test_without_a_server_the_registry_itself_is_the_last_and_may_do_all(self) -> None:
        (host,) = parsed('ca = "ca.pem"\ncapabilities = ["pull"]\nskip_verify = true', "docker.io")
        self.assertEqual("registry-1.docker.io", host.authority)
        self.assertEqual((None, ALL, ("/dir/ca.pem",)), (host.scheme, host.capabilities, host.authorities))
        self.assertTrue(host.skip_verify)
        self.assertTrue(host.is_of("docker.io"))

    def test_an_empty_file_says_nothing(self) -> None:
        self.assertEqual((default_host("r.example"),), parsed(""))

    def test_what_means_nothing_is_told(self) -> None:
        text = 'colour = "red"\n[host."https://m.example"]\nserver = "x"\nprefer = 1'
        _, unknown = parse_hosts(text, "/dir", "r.example")
        self.assertEqual(
            ["colour", '[host."https://m.example"] prefer', '[host."https://m.example"] server'], unknown
        )

    def test_what_it_cannot_say_is_refused_by_its_name(self) -> None:
        for text, said in (
            ("server = [", "TOML"),
            ("server = 5", "server"),
            ('server = "ftp://r.example"', "server"),
            ('server = "https://"', "server"),
            ('server = "https://r.example:x"', "server"),
            ('server = "https://r example"', "server"),
            ('server = "https://r.example%2f"', "server"),
            ('server = "https://r.example/?a=b"', "query"),
            ("host = 5", "host"),
            ("[host]\nx = 5", "host"),
            ('[host."https://m.example"]\ncapabilities = ["fly"]', "pull, resolve, push, referrers"),
            ('[host."https://m.example"]\ncapabilities = "fly"', '[host."https://m.example"] capabilities'),
            ('[host."https://m.example"]\nca = 5', '[host."https://m.example"] ca'),
            ('[host."https://m.example"]\nca = [5]', "ca"),
            ("client = 5", "client"),
            ('client = [["a", "b", "c"]]', "client"),
            ('client = [["", "b"]]', "client"),
            ('skip_verify = "yes"', "skip_verify"),
            ('override_path = 1\nserver = "https://r.example"', "override_path"),
            ("dial_timeout = 3", "dial_timeout"),
            ("header = 5", "header"),
            ('[header]\n"a b" = "c"', "'a b'"),
            ('[header]\na = "c\\nd"', "'a'"),
            ("[header]\na = 5", "header a"),
        ):
            self.assertIn(said, self.refusal(text), text)

    def test_a_url_with_a_password_is_refused_and_not_shown(self) -> None:
        for text in (
            '[host."https://bob:swordfish@m.example"]',
            'server = "https://bob:swordfish@m.example"',
        ):
            said = self.refusal(text)
            self.assertIn("user information", said)
            self.assertNotIn("swordfish", said)

    @given(st.text())
    def test_whatever_is_in_it_is_understood_or_refused(self, text: str) -> None:
        try:
            hosts, _ = parse_hosts(text, "/dir", "r.example")
        except InvalidHosts:
            return
        self.assertTrue(hosts)

    @given(
        st.recursive(st.none() | st.booleans() | st.integers() | st.text(max_size=5), st.lists, max_leaves=6)
    )
    def test_values_of_any_type_are_understood_or_refused(self, value: object) -> None:
        text = repr(value).replace("None", '""').replace("True", "true").replace("False", "false")
        for key in (
            "server",
            "capabilities",
            "ca",
            "client",
            "skip_verify",
            "header",
            "dial_timeout",
            "host",
        ):
            try:
                parse_hosts(f"{key} = {text}", "/dir", "r.example")
            except InvalidHosts as error:
                self.assertTrue(str(error))


class DirectoryTests(SynchronousTestCase):
    def setUp(self) -> None:
        self.root = Path(self.mktemp()).absolute()
        self.root.mkdir()

    def put(self, path: str, text: str = "") -> None:
        file = self.root / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)

    def find(self, registry: str) -> FoundHosts:
        return find_hosts([str(self.root)], registry)

    def server(self, registry: str) -> str:
        return self.find(registry).hosts[-1].authority

    def test_the_ways_to_spell_a_port(self) -> None:
        self.assertEqual(["r.example_5000_", "r.example:5000", "_default"], directories_of("r.example:5000"))
        self.assertEqual(["[::1]_5000_", "[::1]:5000", "_default"], directories_of("[::1]:5000"))
        self.assertEqual(["r.example", "_default"], directories_of("r.example"))

    def test_the_first_directory_that_is_there_counts(self) -> None:
        self.put("_default/hosts.toml", 'server = "https://d.example"')
        self.assertEqual("d.example", self.server("r.example:5000"))
        self.put("r.example:5000/hosts.toml", 'server = "https://c.example"')
        self.assertEqual("c.example", self.server("r.example:5000"))
        self.put("r.example_5000_/hosts.toml", 'server = "https://u.example"')
        self.assertEqual("u.example", self.server("r.example:5000"))

    def test_trees_are_looked_through_in_their_order(self) -> None:
        self.put("one/_default/hosts.toml", 'server = "https://d.example"')
        self.put("two/r.example/hosts.toml", 'server = "https://r2.example"')
        roots = [str(self.root / name) for name in ("none", "two", "one")]
        self.assertEqual("r2.example", find_hosts(roots, "r.example").hosts[0].authority)
        self.assertEqual("d.example", find_hosts(roots, "s.example").hosts[0].authority)

    def test_where_nothing_is_said_there_is_the_registry(self) -> None:
        self.assertEqual(FoundHosts((default_host("r.example"),)), self.find("r.example"))
        self.put("r.example/README")
        self.assertEqual(FoundHosts((default_host("r.example"),)), self.find("r.example"))

    def test_certificates_as_docker_has_them_are_the_registrys(self) -> None:
        for name in ("b.crt", "a.crt", "client.cert", "client.key", "whole.cert", "other.key"):
            self.put(f"r.example/{name}")
        (host,) = self.find("r.example").hosts
        at = str(self.root / "r.example") + "/"
        self.assertEqual((at + "a.crt", at + "b.crt"), host.authorities)
        whole = at + "whole.cert"
        self.assertEqual(((at + "client.cert", at + "client.key"), (whole, whole)), host.clients)
        self.put("r.example/hosts.toml", 'server = "https://r.example"')
        self.assertEqual((), self.find("r.example").hosts[0].authorities, "the file counts instead")

    def test_what_cannot_be_read_is_named(self) -> None:
        self.put("r.example/hosts.toml", "server = 5")
        path = self.root / "r.example" / "hosts.toml"
        for make, said in (
            (lambda: None, "server"),
            (lambda: path.write_bytes(b"\xff"), "UTF-8"),
            (lambda: path.write_text("#" * (1 << 21)), "larger"),
            (lambda: (path.unlink(), path.mkdir()), os.strerror(21)),
        ):
            make()
            error = self.assertRaises(InvalidHosts, self.find, "r.example")
            self.assertIn(str(path), str(error))
            self.assertIn(said, str(error))

    def test_keys_that_mean_nothing_are_a_warning(self) -> None:
        self.put("r.example/hosts.toml", "colour = 1")
        (warning,) = self.find("r.example").warnings
        self.assertIn("colour", warning)
        self.assertIn("hosts.toml", warning)
