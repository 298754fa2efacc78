"""Mirrors named by hosts.toml: real registries that go away and come back, and a pull-through cache."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

from twisted.internet import reactor
from twisted.internet.defer import Deferred, gatherResults
from twisted.internet.task import deferLater
from twisted.internet.threads import deferToThread
from twisted.trial.unittest import SynchronousTestCase, TestCase

from erofs_twisted.registry.errors import TransferFailed
from erofs_twisted.registry.hostsdir import find_hosts
from erofs_twisted.registry.platform import Platform
from erofs_twisted.registry.reference import parse_reference
from erofs_twisted.registry.settings import RegistrySettings
from erofs_twisted.registry.store import open_store
from tests.certificates import issue, make_authority, pem
from tests.images import EROFS, Layout, push
from tests.processes import BIN, run
from tests.servers import DockerRegistry, Nginx, TokenServer

AMD64 = Platform.parse("linux/amd64")
CONTENT = os.urandom(6 << 20)
PIECE = 64 * 1024


def reads(server: Any) -> int:
    """How many blobs, or parts of them, a docker-registry sent."""
    return sum("/blobs/" in line and '"GET /v2/' in line for line in server.log.splitlines())


class MirrorTests(TestCase):
    """``team/app:1`` in two registries, of which one is configured as the mirror of the other."""

    timeout = 60

    def setUp(self) -> None:
        self.layout = Layout(Path(self.mktemp()).absolute())
        self.image = self.layout.manifest([self.layout.blob(CONTENT, EROFS)])
        self.registry = self.serve()
        self.mirror = self.serve()
        self.directory = Path(tempfile.mkdtemp(prefix="mirrors-"))
        self.addCleanup(shutil.rmtree, self.directory)

    def serve(self, **how: Any) -> DockerRegistry:
        server = self.enterContext(DockerRegistry(**how))
        push(self.layout, self.image, server.url, "team/app:1")
        return server

    def configure(self, text: str) -> None:
        directory = self.directory / self.registry.authority
        directory.mkdir(exist_ok=True)
        (directory / "hosts.toml").write_text(text)

    async def open(self) -> Any:
        reference: Any = parse_reference(f"{self.registry.authority}/team/app:1")
        hosts = find_hosts([str(self.directory)], reference.registry)
        no_pool: Any = None
        store: Any = open_store(reactor, reference, RegistrySettings(hosts=hosts), pool=no_pool)
        self.addCleanup(store.close)
        image = await store.resolve(AMD64)
        return store.blob(image.layers[0])

    async def check(self, reader: Any, number: int) -> None:
        offset = number * PIECE % (len(CONTENT) - PIECE)
        got: list[bytes] = []
        await reader.read(offset, PIECE, got.append)
        self.assertEqual(CONTENT[offset : offset + PIECE], b"".join(got))

    async def test_the_mirror_is_read_from_and_the_registry_not(self) -> None:
        self.configure(f'[host."{self.mirror.url}"]')
        reader = await self.open()
        await gatherResults([Deferred.fromCoroutine(self.check(reader, number)) for number in range(32)])
        self.assertGreater(reads(self.mirror), 25)  # it may not have written the last ones yet
        self.assertEqual(0, self.registry.log.count('"GET /v2/team'))

    async def test_reads_go_on_while_the_mirror_goes_away_and_return_to_it(self) -> None:
        self.configure(f'[host."{self.mirror.url}"]')
        reader = await self.open()
        await self.check(reader, 0)
        self.mirror.stop()
        longest = 0.0
        for number in range(40):
            began = time.monotonic()
            await self.check(reader, number)
            longest = max(longest, time.monotonic() - began)
            await deferLater(reactor, 0.02)
        self.assertLess(longest, 1.0)
        before = reads(self.registry)
        self.assertGreater(before, 30)
        await deferToThread(self.mirror.start)
        back = time.monotonic()
        while reads(self.mirror) < 10:
            await self.check(reader, 1)
            await deferLater(reactor, 0.02)
            self.assertLess(time.monotonic() - back, 3.0)

    async def test_the_mirror_is_enough_while_the_registry_is_away(self) -> None:
        self.configure(f'[host."{self.mirror.url}"]')
        self.registry.stop()
        reader = await self.open()
        await self.check(reader, 3)

    async def test_when_all_were_away_the_first_that_is_back_is_enough(self) -> None:
        self.configure(f'[host."{self.mirror.url}"]')
        reader = await self.open()
        self.mirror.stop()
        self.registry.stop()
        reading = gatherResults([Deferred.fromCoroutine(self.check(reader, number)) for number in range(16)])
        await deferLater(reactor, 2.0)
        await deferToThread(self.mirror.start)
        back = time.monotonic()
        await reading
        self.assertLess(time.monotonic() - back, 1.0)

    async def test_a_mirror_without_the_image_is_passed_over(self) -> None:
        empty = self.enterContext(DockerRegistry())
        self.configure(f'[host."{empty.url}"]\n[host."{self.mirror.url}"]')
        reader = await self.open()
        for number in range(20):
            await self.check(reader, number)
        self.assertEqual(1, reads(empty))
        self.assertGreater(reads(self.mirror), 15)

    async def test_a_path_that_is_overridden_is_the_apis_and_headers_go_along(self) -> None:
        front = Nginx(
            'location /cache/docker/ { if ($http_x_team != "blue") { return 403; } '
            f"proxy_pass {self.mirror.url}/v2/; proxy_set_header Host $http_host; }}"
        )
        self.enterContext(front)
        self.registry.stop()
        self.configure(
            f'[host."{front.url}/cache/docker"]\noverride_path = true\n'
            f'[host."{front.url}/cache/docker".header]\nX-Team = "blue"\n'
        )
        reader = await self.open()
        await self.check(reader, 2)
        asked = f"?ns=127.0.0.1%3A{self.registry.port} "
        self.assertEqual([], [line for line in front.accesses if asked not in line])

    async def test_a_pull_through_cache_is_read_from_cold_and_warm(self) -> None:
        cache = self.enterContext(DockerRegistry(upstream=self.registry.url))
        self.configure(f'[host."{cache.url}"]')
        reader = await self.open()
        await gatherResults([Deferred.fromCoroutine(self.check(reader, number)) for number in range(16)])
        # It has sent the whole blob for a range, and got it by that: soon it answers ranges.
        await deferLater(reactor, 5.5)
        before = reads(self.registry)
        for number in range(20):
            await self.check(reader, number)
        self.assertLess(reads(self.registry) - before, 5)


class CertificateTests(TestCase):
    """What hosts.toml, or Docker's files, say of the certificates of each server."""

    timeout = 60

    def setUp(self) -> None:
        self.directory = Path(tempfile.mkdtemp(prefix="certs-"))
        self.addCleanup(shutil.rmtree, self.directory)
        self.layout = Layout(self.directory / "layout")
        self.image = self.layout.manifest([self.layout.blob(CONTENT, EROFS)])
        self.authority = make_authority("servers")
        self.registry = self.serve()
        self.hosts = self.directory / "certs.d" / self.registry.authority
        self.hosts.mkdir(parents=True)

    def serve(self, **how: Any) -> DockerRegistry:
        """One that speaks TLS, as an authority that nobody trusts has certified."""
        plain = self.enterContext(DockerRegistry())
        push(self.layout, self.image, plain.url, "team/app:1")
        directory = Path(tempfile.mkdtemp(dir=self.directory))
        certificate = issue(self.authority, ["127.0.0.1"], directory)
        server = self.enterContext(DockerRegistry(certificate=certificate, **how))
        plain.stop()
        (server.directory / "storage").symlink_to(plain.directory / "storage")
        return server

    async def check(self) -> None:
        reference: Any = parse_reference(f"{self.registry.authority}/team/app:1")
        hosts = find_hosts([str(self.hosts.parent)], reference.registry)
        no_pool: Any = None
        store: Any = open_store(reactor, reference, RegistrySettings(hosts=hosts), pool=no_pool)
        try:
            image = await store.resolve(AMD64)
            got: list[bytes] = []
            await store.blob(image.layers[0]).read(1000, PIECE, got.append)
        finally:
            await store.close()
        self.assertEqual(CONTENT[1000 : 1000 + PIECE], b"".join(got))

    async def test_an_authority_in_dockers_place_is_trusted(self) -> None:
        error = await self.assertFailure(Deferred.fromCoroutine(self.check()), TransferFailed)
        self.assertIn("servers", str(error))
        (self.hosts / "ca.crt").write_bytes(pem(self.authority[1]))
        await self.check()

    async def test_an_authority_of_one_server_does_not_vouch_for_another(self) -> None:
        mirror = self.serve()
        (self.hosts / "ca.pem").write_bytes(pem(self.authority[1]))
        (self.hosts / "hosts.toml").write_text(f'[host."{mirror.url}"]\nca = "ca.pem"')
        await self.check()
        mirror.stop()
        await self.assertFailure(Deferred.fromCoroutine(self.check()), TransferFailed)

    async def test_a_client_certificate_is_shown_to_the_server_that_it_is_for(self) -> None:
        clients = make_authority("clients")
        accepted = self.directory / "clients.pem"
        accepted.write_bytes(pem(clients[1]))
        mirror = self.serve(clients=accepted)
        (self.hosts / "ca.pem").write_bytes(pem(self.authority[1]))
        chain, key = issue(clients, ["us"], self.hosts)
        text = f'[host."{mirror.url}"]\nca = "ca.pem"\n'
        (self.hosts / "hosts.toml").write_text(text)
        await self.assertFailure(Deferred.fromCoroutine(self.check()), TransferFailed)
        (self.hosts / "hosts.toml").write_text(f'{text}client = [["{chain.name}", "{key.name}"]]')
        await self.check()
        self.assertIn("/blobs/", mirror.log)

    async def test_a_server_that_is_not_to_be_verified_is_not_and_others_are(self) -> None:
        mirror = self.serve()
        (self.hosts / "hosts.toml").write_text(f'[host."{mirror.url}"]\nskip_verify = true')
        await self.check()
        mirror.stop()
        await self.assertFailure(Deferred.fromCoroutine(self.check()), TransferFailed)


class InspectTests(SynchronousTestCase):
    """``erofs-nbd inspect --verbose`` as its user types it."""

    def test_it_tells_how_an_image_is_got_at_and_no_secret(self) -> None:
        directory = Path(tempfile.mkdtemp(prefix="inspect-"))
        self.addCleanup(shutil.rmtree, directory)
        layout = Layout(directory / "layout")
        image = layout.manifest([layout.blob(CONTENT, EROFS)])
        tokens = self.enterContext(TokenServer(users={"bob": "swordfish"}))
        registry = self.enterContext(DockerRegistry(auth=tokens.registry_auth))
        push(layout, image, registry.url, "team/app:1", headers=tokens.authorization("team/app"))
        mirror = self.enterContext(DockerRegistry())
        push(layout, image, mirror.url, "team/app:1")
        hosts = directory / registry.authority / "hosts.toml"
        hosts.parent.mkdir()
        hosts.write_text(
            f'[host."{mirror.url}"]\ncapabilities = ["pull"]\nheader = {{ X-Key = "swordfish" }}'
        )
        auth = directory / "auth.json"
        auth.write_text(json.dumps({"auths": {registry.authority: {"auth": "Ym9iOnN3b3JkZmlzaA=="}}}))
        options = ("--verbose", f"--hosts-dir={directory}", f"--auth-file={auth}")
        done = run(BIN / "erofs-nbd", "inspect", *options, f"{registry.authority}/team/app:1", cwd=directory)
        self.assertEqual(0, done.returncode, done.stderr)
        for said in (
            str(hosts),
            f"mirror {mirror.url}: pull; headers X-Key",
            f"GET {registry.url}/v2/team/app/manifests/1: 401 Unauthorized",
            f"wants bearer (realm {tokens.realm}, service test-registry, scope repository:team/app:pull)",
            f"credentials for 127.0.0.1: {auth}",
            "bytes=0-0: 206 Partial Content",
        ):
            self.assertIn(said, done.stderr)
        for said in (f"server     {mirror.authority}", "ranges     yes", "round trip", "MB/s"):
            self.assertIn(said, done.stdout)
        for secret in ("swordfish", "Ym9iOnN3b3JkZmlzaA", "bob", "eyJ"):
            self.assertNotIn(secret, done.stderr + done.stdout)
