"""TLS to real registries, and to real servers that no registry should be."""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from unittest import mock

from twisted.internet import reactor
from twisted.internet.defer import Deferred
from twisted.trial.unittest import TestCase

from erofs_twisted.registry.errors import RegistryError, TransferFailed
from erofs_twisted.registry.platform import Platform
from erofs_twisted.registry.reference import parse_reference
from erofs_twisted.registry.settings import RegistrySettings
from erofs_twisted.registry.store import open_store
from erofs_twisted.registry.tlssettings import TLSSettings, parse_unverified
from tests.certificates import DAY, HOUR, Authority, issue, make_authority, pem
from tests.images import EROFS, Layout, push
from tests.processes import BIN, run
from tests.servers import DockerRegistry, Nginx

CONTENT = os.urandom(300_000)
AMD64 = Platform.parse("linux/amd64")


class TLSTestCase(TestCase):
    timeout = 60

    def setUp(self) -> None:
        self.authority = make_authority("test authority")
        self.tls = TLSSettings(authorities=(self.authorities_file(self.authority),))

    def directory(self) -> Path:
        path = Path(self.mktemp()).absolute()
        path.mkdir(parents=True)
        return path

    def authorities_file(self, *authorities: Authority) -> str:
        path = self.directory() / "ca.pem"
        path.write_bytes(b"".join(pem(certificate) for _, certificate in authorities))
        return str(path)

    def certificate(self, *hosts: str, by: Authority | None = None, **how: Any) -> tuple[Path, Path]:
        return issue(by or self.authority, hosts, self.directory(), **how)

    def client_pair(self, name: str, by: Authority) -> tuple[str, str]:
        chain, key = issue(by, [], self.directory(), common=name)
        return str(chain), str(key)

    def serve(self, *hosts: str, clients: str | None = None, **how: Any) -> DockerRegistry:
        """A registry with one image, that speaks TLS as ``hosts``; with ``clients``, only to those that an
        authority in that file vouches for."""
        layout = Layout(self.directory())
        entry = layout.manifest([layout.blob(CONTENT, EROFS)])
        plain = self.enterContext(DockerRegistry())
        push(layout, entry, plain.url, "a:1")
        certificate = self.certificate(*hosts, **how)
        accepted = Path(clients) if clients else None
        front = self.enterContext(DockerRegistry(certificate=certificate, clients=accepted))
        plain.stop()
        (front.directory / "storage").symlink_to(plain.directory / "storage")
        return front

    def open(self, name: str, **how: Any) -> Any:
        no_pool: Any = None
        settings = RegistrySettings(**{"tls": self.tls, **how})
        store = open_store(reactor, parse_reference(name), settings, pool=no_pool)
        self.addCleanup(store.close)
        return store

    async def check(self, name: str, **how: Any) -> None:
        store = self.open(name, **how)
        image = await store.resolve(AMD64)
        await self.check_blob(store.blob(image.layers[0]))

    async def check_blob(self, blob: Any) -> None:
        got: list[bytes] = []
        await blob.read(1000, 200_000, got.append)
        self.assertEqual(CONTENT[1000:201_000], b"".join(got))

    async def refusal(self, name: str, **how: Any) -> str:
        error = await self.assertFailure(self.open(name, **how).resolve(AMD64), TransferFailed)
        self.assertFalse(error.temporary, error)
        return str(error)


class ServerTests(TLSTestCase):
    """What a server's certificate has to be."""

    async def test_a_registry_on_this_machine_that_wants_tls_gets_it(self) -> None:
        registry = self.serve("localhost")
        await self.check(f"localhost:{registry.port}/a:1")

    async def test_an_address_can_be_certified_too(self) -> None:
        registry = self.serve("127.0.0.1")
        await self.check(f"127.0.0.1:{registry.port}/a:1")

    async def test_an_address_is_not_certified_by_a_name(self) -> None:
        registry = self.serve("localhost", "registry.example")
        said = await self.refusal(f"127.0.0.1:{registry.port}/a:1")
        self.assertIn("is for localhost, registry.example, not for 127.0.0.1", said)

    async def test_an_address_of_ipv6_can_be_certified(self) -> None:
        registry = self.serve("127.0.0.1")
        with socket.socket(socket.AF_INET6) as probe:
            probe.bind(("::1", 0))
            port = probe.getsockname()[1]
        for hosts, is_taken in (("::1",), True), (("::2", "localhost"), False):
            front = Nginx(
                f"listen [::1]:{port} ssl; location / {{ proxy_pass {registry.url}; }}",
                tls=self.certificate(*hosts),
            )
            with front:
                if is_taken:
                    await self.check(f"[::1]:{port}/a:1")
                else:
                    said = await self.refusal(f"[::1]:{port}/a:1")
                    self.assertIn("is for localhost, ::2, not for ::1", said)

    async def test_the_authority_can_be_named_by_the_environment(self) -> None:
        registry = self.serve("localhost")
        with mock.patch.dict(os.environ, SSL_CERT_FILE=self.tls.authorities[0]):
            await self.check(f"localhost:{registry.port}/a:1", tls=TLSSettings())

    async def test_an_unknown_authority_is_refused_at_once_with_the_cure(self) -> None:
        registry = self.serve("localhost")
        said = await self.refusal(f"localhost:{registry.port}/a:1", tls=TLSSettings())
        self.assertIn("'CN=test authority'", said)
        self.assertIn("--tls-ca", said)

    async def test_a_chain_over_an_authority_in_between(self) -> None:
        between = make_authority("in between", self.authority)
        whole = self.serve("localhost", by=between, between=[between])
        await self.check(f"localhost:{whole.port}/a:1")
        cut = self.serve("localhost", by=between)
        self.assertIn("'CN=in between'", await self.refusal(f"localhost:{cut.port}/a:1"))

    async def test_the_certificate_of_another_host_is_refused(self) -> None:
        registry = self.serve("registry.example", "*.registry.example")
        said = await self.refusal(f"localhost:{registry.port}/a:1")
        self.assertIn("is for registry.example, *.registry.example, not for localhost", said)

    async def test_an_expired_certificate_is_refused(self) -> None:
        registry = self.serve("localhost", valid=(-2 * DAY, -HOUR))
        self.assertIn("expired on", await self.refusal(f"localhost:{registry.port}/a:1"))

    async def test_a_certificate_of_the_future_is_refused(self) -> None:
        registry = self.serve("localhost", valid=(DAY, 2 * DAY))
        self.assertIn("is the clock right?", await self.refusal(f"localhost:{registry.port}/a:1"))

    async def test_a_server_of_old_versions_only_is_refused(self) -> None:
        front = self.enterContext(
            Nginx(
                "ssl_protocols TLSv1 TLSv1.1; ssl_ciphers ALL:@SECLEVEL=0; location / { return 200; }",
                tls=self.certificate("localhost"),
            )
        )
        self.assertIn("1.2 is the oldest", await self.refusal(f"localhost:{front.port}/a:1"))

    async def test_a_registry_behind_tls_1_2_is_read(self) -> None:
        registry = self.serve("127.0.0.1")
        front = self.enterContext(
            Nginx(
                f"ssl_protocols TLSv1.2; location / {{ proxy_pass {registry.url}; }}",
                tls=self.certificate("localhost"),
            )
        )
        await self.check(f"localhost:{front.port}/a:1")

    async def test_a_server_without_tls_is_told_from_one_with(self) -> None:
        plain = self.enterContext(Nginx("location / { return 200; }"))
        from erofs_twisted.registry.tls import TLSPolicy
        from erofs_twisted.registry.transport import Transport

        transport = Transport.over_sockets(reactor, TLSPolicy())
        self.addCleanup(transport.close)
        asked = Deferred.fromCoroutine(transport.get(f"https://localhost:{plain.port}/", {}, 10))
        error = await self.assertFailure(asked, TransferFailed)
        self.assertIn("--plain-http", str(error))
        self.assertFalse(error.temporary)

    async def test_a_redirect_out_of_tls_is_refused(self) -> None:
        front = self.enterContext(
            Nginx("location / { return 307 http://127.0.0.1:1/x; }", tls=self.certificate("localhost"))
        )
        self.assertIn("--plain-http", await self.refusal(f"localhost:{front.port}/a:1"))


class ClientTests(TLSTestCase):
    """Registries that want to know who comes."""

    def setUp(self) -> None:
        super().setUp()
        self.others = make_authority("clients' authority")
        self.accepted = self.authorities_file(self.others)

    def with_pairs(self, *pairs: tuple[str, str]) -> TLSSettings:
        return TLSSettings(authorities=self.tls.authorities, clients=pairs)

    async def test_who_shows_a_certificate_that_is_accepted_comes_in(self) -> None:
        registry = self.serve("localhost", clients=self.accepted)
        pair = self.client_pair("me", self.others)
        await self.check(f"localhost:{registry.port}/a:1", tls=self.with_pairs(pair))

    async def test_of_several_the_one_that_is_accepted_is_shown(self) -> None:
        registry = self.serve("localhost", clients=self.accepted)
        pairs = [self.client_pair(name, by) for name, by in (("a", self.authority), ("b", self.others))]
        await self.check(f"localhost:{registry.port}/a:1", tls=self.with_pairs(*pairs))

    async def test_who_shows_none_is_told_to(self) -> None:
        registry = self.serve("localhost", clients=self.accepted)
        said = await self.refusal(f"localhost:{registry.port}/a:1")
        self.assertIn("wants a client certificate", said)
        self.assertIn("NAME.cert", said)

    async def test_who_shows_that_of_a_stranger_is_told_so(self) -> None:
        registry = self.serve("localhost", clients=self.accepted)
        tls = self.with_pairs(self.client_pair("me", make_authority("a stranger")))
        said = await self.refusal(f"localhost:{registry.port}/a:1", tls=tls)
        self.assertIn("one that it refuses", said)

    async def test_nginx_in_front_says_it_in_http(self) -> None:
        directives = (
            f"ssl_client_certificate {self.accepted}; ssl_verify_client on; location / {{ return 200; }}"
        )
        front = self.enterContext(Nginx(directives, tls=self.certificate("localhost")))
        store = self.open(f"localhost:{front.port}/a:1")
        error = await self.assertFailure(store.resolve(AMD64), RegistryError)
        self.assertIn("400 Bad Request: 400 No required SSL certificate was sent", str(error))


class RotationTests(TLSTestCase):
    """Certificates are replaced under a store that is open."""

    async def opened(self, registry: DockerRegistry, tls: TLSSettings) -> Any:
        store = self.open(f"localhost:{registry.port}/a:1", tls=tls)
        blob = store.blob((await store.resolve(AMD64)).layers[0])
        await self.check_blob(blob)
        return blob

    async def test_reads_go_on_by_another_authority(self) -> None:
        registry = self.serve("localhost")
        blob = await self.opened(registry, self.tls)
        registry.stop()
        new = make_authority("its successor")
        registry.certificate = self.certificate("localhost", by=new)
        os.replace(self.authorities_file(new), self.tls.authorities[0])
        registry.start()
        await self.check_blob(blob)

    async def test_reads_go_on_with_another_client_certificate(self) -> None:
        old, new = make_authority("the old one"), make_authority("the new one")
        registry = self.serve("localhost", clients=self.authorities_file(old))
        pair = self.client_pair("me", old)
        blob = await self.opened(registry, TLSSettings(self.tls.authorities, clients=(pair,)))
        registry.stop()
        registry.clients = Path(self.authorities_file(new))
        for replacement, path in zip(self.client_pair("me", new), pair, strict=True):
            os.replace(replacement, path)
        registry.start()
        await self.check_blob(blob)

    async def test_reads_go_on_when_the_file_has_gone(self) -> None:
        registry = self.serve("localhost")
        blob = await self.opened(registry, self.tls)
        registry.stop()
        os.unlink(self.tls.authorities[0])
        registry.start()
        await self.check_blob(blob)


class UnverifiedTests(TLSTestCase):
    """``localhost`` at one port is not verified; wherever it sends us is."""

    def setUp(self) -> None:
        super().setUp()
        self.tls = TLSSettings()

    def trusting(self, port: int) -> TLSSettings:
        return TLSSettings(unverified=parse_unverified(f"localhost:{port}"))

    async def test_the_server_that_is_named_is_read(self) -> None:
        registry = self.serve("other.example", valid=(-2 * DAY, -HOUR))
        await self.check(f"localhost:{registry.port}/a:1", tls=self.trusting(registry.port))

    async def test_the_cdn_that_it_sends_us_to_is_verified(self) -> None:
        registry = self.serve("localhost")
        cdn = self.enterContext(Nginx("location / { return 200; }", tls=self.certificate("localhost")))
        directives = (
            f"location / {{ proxy_pass {registry.url}; }}"
            f"location ~ /blobs/ {{ return 307 {cdn.url.replace('127.0.0.1', 'localhost')}/x; }}"
        )
        front = self.enterContext(Nginx(directives, tls=self.certificate("localhost")))
        store = self.open(f"localhost:{front.port}/a:1", tls=self.trusting(front.port))
        image = await store.resolve(AMD64)
        read = Deferred.fromCoroutine(_read(store.blob(image.layers[0])))
        error = await self.assertFailure(read, RegistryError)
        self.assertIn(f"https://localhost:{cdn.port}/x: TLS failed", str(error))
        self.assertEqual([], cdn.accesses)

    async def test_the_token_server_that_it_names_is_verified(self) -> None:
        tokens = self.enterContext(Nginx("location / { return 200; }", tls=self.certificate("localhost")))
        realm = f"https://localhost:{tokens.port}/token"
        challenge = f"add_header WWW-Authenticate 'Bearer realm=\"{realm}\"' always; return 401;"
        front = self.enterContext(Nginx(f"location / {{ {challenge} }}", tls=self.certificate("localhost")))
        store = self.open(f"localhost:{front.port}/a:1", tls=self.trusting(front.port))
        error = await self.assertFailure(store.resolve(AMD64), RegistryError)
        self.assertIn(f"{realm}", str(error))
        self.assertIn("TLS failed", str(error))
        self.assertEqual([], tokens.accesses)


class CommandTests(TLSTestCase):
    """As a user types it."""

    def inspect(self, name: str, *options: str, **environment: str) -> tuple[int, str, str]:
        done = run(BIN / "erofs-nbd", "inspect", name, *options, env={**_environment(), **environment})
        return done.returncode, done.stdout, done.stderr

    def test_the_option_names_the_authority(self) -> None:
        registry = self.serve("localhost")
        name = f"localhost:{registry.port}/a:1"
        status, shown, said = self.inspect(name, "--tls-ca", self.tls.authorities[0])
        self.assertEqual((0, ""), (status, said))
        self.assertIn("sha256:", shown)
        status, shown, said = self.inspect(name)
        self.assertEqual((1, ""), (status, shown))
        self.assertTrue(said.startswith(f"erofs-nbd: {name}: https://localhost:{registry.port}/v2/"), said)
        self.assertEqual(1, said.count("\n"))

    def test_who_does_not_want_it_verified_is_warned(self) -> None:
        registry = self.serve("other.example")
        server = f"localhost:{registry.port}"
        status, shown, said = self.inspect(f"{server}/a:1", "--insecure-skip-verify", server)
        self.assertEqual(0, status)
        self.assertIn("sha256:", shown)
        self.assertIn(f"the certificate of {server} is not verified", said)


async def _read(blob: Any) -> None:
    await blob.read(0, 1000, lambda piece: None)


def _environment() -> Mapping[str, str]:
    return {name: value for name, value in os.environ.items() if not name.startswith("SSL_CERT_")}
