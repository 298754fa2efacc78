"""Registries behind proxies: tinyproxy, and one of our own that knows names and speaks TLS."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from twisted.internet import reactor as global_reactor
from twisted.internet.defer import Deferred, gatherResults
from twisted.internet.task import deferLater
from twisted.internet.threads import deferToThread
from twisted.logger import eventAsText, globalLogPublisher
from twisted.trial.unittest import TestCase

from erofs_twisted.registry.body import read_body
from erofs_twisted.registry.concurrency import CONNECTIONS
from erofs_twisted.registry.errors import AccessDenied, TransferFailed, Unreachable
from erofs_twisted.registry.platform import Platform
from erofs_twisted.registry.proxies import Proxies, Proxy
from erofs_twisted.registry.reference import parse_reference
from erofs_twisted.registry.settings import RegistrySettings
from erofs_twisted.registry.store import open_store
from erofs_twisted.registry.tls import TLSPolicy
from erofs_twisted.registry.tlssettings import TLSSettings
from erofs_twisted.registry.transport import Transport
from tests.certificates import issue, make_authority, pem
from tests.connectproxy import ConnectProxy
from tests.images import EROFS, Layout, push
from tests.integration.test_registry_servers import connections_to
from tests.processes import BIN
from tests.servers import DockerRegistry, Nginx, Tinyproxy, free_port, tool

reactor: Any = global_reactor
CONTENT = os.urandom(900_000)
AMD64 = Platform.parse("linux/amd64")
USER, PASSWORD = "proxy-us3r", "tops3cret@/:"
ENCODED = f"{USER}:tops3cret%40%2F%3A"
SECRETS = (USER, "tops3cret", "cHJveHktdXMzcjp0b3BzM2NyZXRALzo")
"""The last is what basic authentication makes of them."""


def all_through(url: str) -> Proxies:
    """One proxy for everything, also for this machine."""
    proxy = Proxy.parse(url, "HTTPS_PROXY")
    return Proxies(http=proxy, https=proxy)


class ProxyTestCase(TestCase):
    timeout = 60

    def setUp(self) -> None:
        self.authority = make_authority("test authority")
        self.tls = TLSSettings(authorities=(str(self.authority_file()),))
        self.logged: list[str] = []
        observer = self.observe
        globalLogPublisher.addObserver(observer)
        self.addCleanup(globalLogPublisher.removeObserver, observer)

    def observe(self, event: Any) -> None:
        self.logged.append(f"{eventAsText(event)} {event!r}")

    def directory(self) -> Path:
        directory = Path(self.mktemp()).absolute()
        directory.mkdir()
        return directory

    def authority_file(self) -> Path:
        path = self.directory() / "ca.pem"
        path.write_bytes(pem(self.authority[1]))
        return path

    def certificate(self, *hosts: str) -> tuple[Path, Path]:
        return issue(self.authority, list(hosts), self.directory())

    def plain_registry(self) -> DockerRegistry:
        """With one image, a:1."""
        layout = Layout(Path(self.mktemp()).absolute())
        entry = layout.manifest([layout.blob(CONTENT, EROFS)])
        registry = self.enterContext(DockerRegistry())
        push(layout, entry, registry.url, "a:1")
        return registry

    def tls_front(self, *hosts: str) -> Nginx:
        """A registry of that image that speaks TLS as ``hosts``."""
        front = Nginx.proxy(self.plain_registry().url)
        front.tls = self.certificate(*hosts)
        return self.enterContext(front)

    def own_proxy(self, **how: Any) -> ConnectProxy:
        proxy = ConnectProxy(**how)
        proxy.start()
        self.addCleanup(lambda: Deferred.fromCoroutine(proxy.stop()))
        return proxy

    def transport(self, proxies: Proxies | None = None) -> Transport:
        transport = Transport.over_sockets(reactor, TLSPolicy(self.tls), proxies=proxies)
        self.addCleanup(lambda: Deferred.fromCoroutine(transport.close()))
        return transport

    async def get(self, transport: Transport, url: str) -> bytes:
        response = await transport.get(url, {}, 10)
        self.assertEqual(200, response.code)
        return await read_body(response, 1 << 20, reactor, 10)

    async def check(self, name: str, **how: Any) -> None:
        """Is the image read?"""
        no_pool: Any = None
        settings = RegistrySettings(tls=self.tls, **how)
        store = open_store(reactor, parse_reference(name), settings, pool=no_pool)
        try:
            image = await store.resolve(AMD64)
            got: list[bytes] = []
            await gatherResults(
                [
                    store.blob(image.layers[0]).read(1000, 700_000, got.append),
                    store.blob(image.layers[0]).read(700_000, 1000, lambda data: None),
                ]
            )
            self.assertEqual(CONTENT[1000:701_000], b"".join(got))
        finally:
            await store.close()

    async def failure(self, proxies: Proxies, url: str) -> TransferFailed:
        """Why there is no answer, which says neither user nor password of the proxy."""
        getting = Deferred.fromCoroutine(self.transport(proxies).get(url, {}, 20))
        error = await self.assertFailure(getting, TransferFailed)
        self.assertNotIsInstance(error, AccessDenied)
        self.assert_no_secret(repr(error), str(error.__cause__), repr(proxies), *self.logged)
        assert isinstance(error, TransferFailed)
        return error

    def assert_no_secret(self, *texts: str) -> None:
        for secret in SECRETS:
            self.assertEqual([], [text for text in texts if secret in text])


class TinyproxyTests(ProxyTestCase):
    def tinyproxy(self, **how: Any) -> Tinyproxy:
        return self.enterContext(Tinyproxy(**how))

    async def test_a_registry_with_tls_is_read_through_a_tunnel(self) -> None:
        front, proxy = self.tls_front("127.0.0.1"), self.tinyproxy()
        await self.check(f"127.0.0.1:{front.port}/a:1", proxies=all_through(proxy.authority))
        self.assertIn(f"CONNECT 127.0.0.1:{front.port}", proxy.log)

    async def test_a_registry_without_tls_is_read_through_the_proxy(self) -> None:
        registry, proxy = self.plain_registry(), self.tinyproxy()
        await self.check(f"{registry.authority}/a:1", proxies=all_through(proxy.authority))
        self.assertIn(f"GET {registry.url}/v2/a/manifests/1", proxy.log)

    async def test_user_and_password_are_for_the_proxy_and_not_for_the_registry(self) -> None:
        user, password = "us3r", "tops3cret"
        proxy = self.tinyproxy(user=f"{user}:{password}")
        proxies = all_through(f"http://{user}:{password}@{proxy.authority}")
        told = "add_header X-Told '[$http_proxy_authorization]' always; return 200 x;"
        plain = self.enterContext(Nginx(told))
        secure = self.enterContext(Nginx(told, tls=self.certificate("127.0.0.1")))
        for server in (plain, secure):
            response = await self.transport(proxies).get(server.url, {}, 10)
            self.assertEqual((200, ["[]"]), (response.code, response.headers.getRawHeaders("X-Told")))
            await read_body(response, 10, reactor, 10)

    async def test_a_user_who_is_missing_or_wrong_is_the_proxys_matter(self) -> None:
        proxy = self.tinyproxy(user="other:word")
        registry, front = (
            self.plain_registry(),
            self.enterContext(Nginx("return 200 x;", tls=self.certificate("127.0.0.1"))),
        )
        for url in (registry.url, front.url):
            error = await self.failure(all_through(proxy.authority), url)
            self.assertIn(f"HTTPS_PROXY=http://USER:PASSWORD@{proxy.authority}", str(error))
            self.assertFalse(error.temporary)
        error = await self.failure(all_through(f"{ENCODED}@{proxy.authority}"), front.url)
        self.assertIn(f"the proxy {proxy.url} refuses the user and password in HTTPS_PROXY", str(error))

    async def test_what_the_proxy_forbids_is_said(self) -> None:
        proxy = self.tinyproxy(directives="ConnectPort 1")
        error = await self.failure(all_through(proxy.authority), f"https://127.0.0.1:{free_port()}/")
        self.assertIn(f"the proxy {proxy.url} does not connect us to 127.0.0.1:", str(error))
        self.assertIn("403", str(error))
        self.assertFalse(error.temporary)

    async def test_a_registry_that_is_down_behind_the_proxy_may_come_back(self) -> None:
        proxy = self.tinyproxy()
        error = await self.failure(all_through(proxy.authority), f"https://127.0.0.1:{free_port()}/")
        self.assertIsInstance(error, Unreachable)
        self.assertTrue(error.temporary)

    async def test_a_proxy_that_is_down_may_come_back(self) -> None:
        nobody = f"127.0.0.1:{free_port()}"
        for url in ("http://a.example/", "https://a.example/"):
            error = await self.failure(all_through(f"{ENCODED}@{nobody}"), url)
            self.assertIsInstance(error, Unreachable)
            self.assertIn(f"the proxy http://{nobody}", str(error))
            self.assertIn("HTTPS_PROXY", str(error))
            self.assertTrue(error.temporary)

    async def test_a_proxy_without_a_host_is_said(self) -> None:
        error = await self.failure(all_through("http://proxy.invalid:3128"), "https://a.example/")
        self.assertIsInstance(error, Unreachable)
        self.assertIn("the proxy http://proxy.invalid:3128", str(error))


class OwnProxyTests(ProxyTestCase):
    async def test_a_name_that_only_the_proxy_knows_is_read_from(self) -> None:
        front = self.tls_front("registry.test")
        proxy = self.own_proxy(hosts={"registry.test:443": front.authority}, user=f"{USER}:{PASSWORD}")
        environ = {"HTTPS_PROXY": f"http://{ENCODED}@127.0.0.1:{proxy.port}"}
        await self.check("registry.test/a:1", proxies=Proxies.from_environment(environ))
        self.assertEqual({"registry.test:443"}, set(proxy.targets))
        self.assert_no_secret(*self.logged)

    async def test_tunnels_are_kept_for_the_next_request(self) -> None:
        front = self.tls_front("registry.test")
        proxy = self.own_proxy(hosts={"registry.test:443": front.authority})
        transport = self.transport(all_through(f"127.0.0.1:{proxy.port}"))
        for _ in range(5):
            await self.get(transport, "https://registry.test/v2/")
        self.assertEqual(["registry.test:443"], proxy.targets)

    async def test_a_proxy_may_speak_tls(self) -> None:
        front = self.tls_front("registry.test")
        plain = self.plain_registry()
        proxy = self.own_proxy(
            hosts={"registry.test:443": front.authority, "plain.test:80": plain.authority},
            user=f"{USER}:{PASSWORD}",
            tls=self.certificate("localhost"),
        )
        proxies = all_through(f"https://{ENCODED}@localhost:{proxy.port}")
        await self.check("registry.test/a:1", proxies=proxies)
        await self.check("plain.test/a:1", proxies=proxies, plain_http=True)
        self.assertTrue(any(target.startswith("http://plain.test/v2/") for target in proxy.targets))

    async def test_a_proxy_with_a_strange_certificate_is_refused_by_name(self) -> None:
        strangers = make_authority("strangers")
        for tls in (issue(strangers, ["localhost"], self.directory()), self.certificate("other.test")):
            proxy = self.own_proxy(tls=tls)
            for url in ("https://registry.test/", "http://registry.test/"):
                error = await self.failure(all_through(f"https://localhost:{proxy.port}"), url)
                self.assertIn(f"the proxy https://localhost:{proxy.port}", str(error))
                self.assertIn("certificate", str(error))
                self.assertFalse(error.temporary)
            self.assertEqual([], proxy.heads)

    async def test_a_proxy_that_does_not_speak_tls_is_said(self) -> None:
        proxy = self.enterContext(Nginx("return 400;"))
        error = await self.failure(all_through(f"https://localhost:{proxy.port}"), "https://registry.test/")
        self.assertIn(f"HTTPS_PROXY=http://localhost:{proxy.port}", str(error))

    async def test_the_registrys_certificate_is_looked_at_through_a_tunnel(self) -> None:
        front = self.tls_front("other.test")
        proxy = self.own_proxy(hosts={"registry.test:443": front.authority})
        error = await self.failure(all_through(f"127.0.0.1:{proxy.port}"), "https://registry.test/")
        self.assertIn("https://registry.test/", str(error))
        self.assertNotIn("proxy", str(error))
        self.assertFalse(error.temporary)

    async def test_a_gateway_that_is_away_for_a_moment_is_asked_again(self) -> None:
        front = self.tls_front("registry.test")
        refusals = ["502 Bad Gateway", "503 Service Unavailable"]
        proxy = self.own_proxy(hosts={"registry.test:443": front.authority}, answers=refusals)
        await self.check("registry.test/a:1", proxies=all_through(f"127.0.0.1:{proxy.port}"))
        self.assertEqual([], refusals)

    async def test_hosts_that_need_no_proxy_are_reached_directly(self) -> None:
        front = self.tls_front("127.0.0.1")
        proxy = self.own_proxy()
        environ = {"ALL_PROXY": f"http://127.0.0.1:{proxy.port}"}
        await self.check(f"127.0.0.1:{front.port}/a:1", proxies=Proxies.from_environment(environ))
        self.assertEqual([], proxy.heads)


class CommandTests(ProxyTestCase):
    """The variables, as the program finds them."""

    async def inspect(self, image: str, *options: str, **variables: str) -> subprocess.CompletedProcess[str]:
        environment = {**os.environ, "SSL_CERT_FILE": str(self.authority_file()), **variables}
        words = [str(BIN / "erofs-nbd"), "inspect", image, *options]
        return await deferToThread(
            subprocess.run, words, env=environment, capture_output=True, text=True, timeout=50, check=False
        )

    def authority_file(self) -> Path:
        path = Path(self.mktemp()).absolute()
        path.write_bytes(pem(self.authority[1]))
        return path

    async def test_a_command_goes_through_the_proxy_of_its_environment(self) -> None:
        front = self.tls_front("registry.test")
        proxy = self.own_proxy(hosts={"registry.test:443": front.authority}, user=f"{USER}:{PASSWORD}")
        variables = {"https_proxy": f"http://{ENCODED}@127.0.0.1:{proxy.port}"}
        done = await self.inspect("registry.test/a:1", **variables)
        self.assertEqual((0, ""), (done.returncode, done.stderr))
        self.assertIn("sha256:", done.stdout)

    async def test_a_refusal_is_one_line_with_the_cure(self) -> None:
        proxy = self.own_proxy(user="somebody:else")
        done = await self.inspect("registry.test/a:1", HTTPS_PROXY=f"http://{ENCODED}@127.0.0.1:{proxy.port}")
        self.assertEqual(1, done.returncode)
        self.assertIn(f"the proxy http://127.0.0.1:{proxy.port} refuses the user and password", done.stderr)
        self.assertNotIn("Traceback", done.stderr)
        self.assert_no_secret(done.stdout, done.stderr)

    async def test_a_variable_that_is_wrong_is_named_before_anything_is_begun(self) -> None:
        for variable, value, said in (
            ("HTTPS_PROXY", f"socks5://{ENCODED}@p.example", "HTTPS_PROXY: proxies that speak socks5"),
            ("all_proxy", f"http://{USER}:{PASSWORD}@p.example", "all_proxy: not a proxy's URL"),
        ):
            done = await self.inspect("registry.test/a:1", **{variable: value})
            self.assertEqual(1, done.returncode)
            self.assertIn(said, done.stderr)
            self.assertNotIn("Traceback", done.stderr)
            self.assert_no_secret(done.stdout, done.stderr)


CASES: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("", ("http://a.test/", "https://a.test/", "http://192.0.2.1/", "https://[2001:db8::1]/")),
    ("*", ("http://a.test/", "https://a.test/", "http://192.0.2.1/")),
    ("a.test", ("http://a.test/", "http://sub.a.test/", "http://aa.test/", "https://a.test.b.test/")),
    (".a.test", ("https://sub.a.test/", "https://b.test/", "http://aa.test/")),
    ("b.test, a.test ,c.test", ("http://a.test/", "https://b.test/", "https://c.test/", "http://d.test/")),
    ("A.TEST", ("http://a.test/", "https://sub.A.test/")),
    ("192.0.2.1", ("http://192.0.2.1/", "http://192.0.2.11/", "https://192.0.2.1:8443/")),
    ("192.0.2.0/25", ("http://192.0.2.1/", "http://192.0.2.127/", "http://192.0.2.128/")),
    ("2001:db8::1", ("https://[2001:db8::1]/", "https://[2001:db8::2]/")),
    ("test", ("http://a.test/", "http://test/", "http://contest/")),
)


class CurlTests(ProxyTestCase):
    """curl agrees, wherever Go and curl do: with lower case, and away from this machine."""

    async def test_curl_sends_the_same_urls_through_the_proxy(self) -> None:
        proxy = self.own_proxy(answers=["403 Forbidden"] * 1000)
        address = f"http://127.0.0.1:{proxy.port}"
        differing, proxied, direct = [], 0, 0
        for listed, urls in CASES:
            environ = {"http_proxy": address, "https_proxy": address, "no_proxy": listed}
            proxies = Proxies.from_environment(environ)
            for url in urls:
                asked = len(proxy.heads)
                await deferToThread(self.curl, url, environ)
                by_curl, by_us = len(proxy.heads) > asked, proxies.proxy_for(url) is not None
                proxied, direct = proxied + by_us, direct + (not by_us)
                if by_curl != by_us:
                    differing.append((listed, url, f"curl: {by_curl}"))
        self.assertEqual([], differing)
        self.assertTrue(proxied > 10 and direct > 10, "both occur")

    def curl(self, url: str, environ: Mapping[str, str]) -> None:
        """Names have no address here, and addresses no host: without the proxy there is no answer."""
        words = [tool("curl"), "--silent", "--globoff", "--output", "/dev/null", "--connect-timeout", "0.5"]
        clean = {name: value for name, value in os.environ.items() if "proxy" not in name.lower()}
        pinned = ["--resolve", "*:80:127.0.0.1", "--resolve", "*:443:127.0.0.1"]
        subprocess.run([*words, *pinned, url], env={**clean, **environ}, timeout=20, check=False)


class ConnectionTests(ProxyTestCase):
    async def test_an_address_of_ipv6_is_a_registry(self) -> None:
        registry, port = self.plain_registry(), free_port()
        front = Nginx.proxy(registry.url)
        front.directives = f"listen [::1]:{port}; {front.directives}"
        self.enterContext(front)
        await self.check(f"[::1]:{port}/a:1")
        proxy = self.own_proxy()
        await self.check(f"[::1]:{port}/a:1", proxies=all_through(f"127.0.0.1:{proxy.port}"))
        self.assertIn(f"http://[::1]:{port}/v2/a/manifests/1", proxy.targets)

    async def test_a_name_with_an_address_where_nobody_listens_is_reached_by_the_other(self) -> None:
        front = self.enterContext(Nginx("return 200 x;"))  # 127.0.0.1 only; localhost is ::1, too
        self.assertEqual(b"x", await self.get(self.transport(), f"http://localhost:{front.port}/"))

    async def test_idle_connections_are_probed_by_the_kernel(self) -> None:
        front = self.tls_front("127.0.0.1")
        plain = self.enterContext(Nginx("return 200 x;"))
        proxy = self.own_proxy(tls=self.certificate("localhost"))
        through = all_through(f"https://localhost:{proxy.port}")
        for proxies, url, port in (
            (None, plain.url, plain.port),
            (None, f"{front.url}/v2/", front.port),
            (through, f"{front.url}/v2/", proxy.port),
        ):
            await self.get(self.transport(proxies), url)
            self.assertEqual([True], keepalive_timers(port), url)

    async def test_one_origin_gets_so_many_connections_and_no_more(self) -> None:
        root = self.directory()
        (root / "x").write_bytes(bytes(100_000))
        front = self.enterContext(Nginx(f"root {root}; limit_rate_after 1k; limit_rate 20k;"))
        transport = self.transport()
        asking = [Deferred.fromCoroutine(self.get(transport, f"{front.url}/x")) for _ in range(60)]
        await deferLater(reactor, 1.0)
        self.assertEqual(CONNECTIONS, connections_to(front.port))
        for one in asking[:30]:
            one.addErrback(lambda _: None)
            one.cancel()
        await deferLater(reactor, 0.5)
        self.assertEqual(30, connections_to(front.port), "those in the queue took the places that were free")
        self.assertEqual([bytes(100_000)] * 30, await gatherResults(asking[30:]))


def keepalive_timers(port: int) -> list[bool]:
    """Of each established connection to a port of this machine: does a timer of probes run, 30 s at most?"""
    lines = Path("/proc/net/tcp").read_text().splitlines()[1:]
    found = []
    for _, _, remote, state, _, timer, *_ in map(str.split, lines):
        if state == "01" and remote.endswith(f":{port:04X}"):
            kind, _, ticks = timer.partition(":")
            found.append(kind == "02" and int(ticks, 16) <= 30 * os.sysconf("SC_CLK_TCK"))
    return found
