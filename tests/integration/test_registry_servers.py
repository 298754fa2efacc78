"""The registry's client against docker-registry and nginx."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

from twisted.internet import reactor
from twisted.internet.defer import CancelledError, Deferred, gatherResults
from twisted.internet.task import deferLater
from twisted.internet.threads import deferToThread
from twisted.trial.unittest import TestCase

from erofs_twisted.errors import RangesIgnored
from erofs_twisted.registry.credentials import Credentials
from erofs_twisted.registry.digest import Digest
from erofs_twisted.registry.errors import BlobUnreadable, NotInRegistry, TransferFailed
from erofs_twisted.registry.manifest import ResolvedImage
from erofs_twisted.registry.platform import Platform
from erofs_twisted.registry.reference import parse_reference
from erofs_twisted.registry.settings import RegistrySettings
from erofs_twisted.registry.store import open_store
from tests.images import EROFS, Layout, push
from tests.servers import DockerRegistry, Nginx, Process, free_port, tool

AMD64 = Platform.parse("linux/amd64")
MIB = 1 << 20
CONTENT = os.urandom(9 * MIB + 321)


class ServerTests(TestCase):
    timeout = 60

    def setUp(self) -> None:
        self.layout = Layout(Path(self.mktemp()).absolute())
        self.image = self.layout.manifest([self.layout.blob(CONTENT, EROFS)])
        self.index = self.layout.index(
            [
                self.layout.manifest([self.layout.blob(b"arm", EROFS)], platform="linux/arm64"),
                self.image,
                self.layout.attestation(self.image),
            ]
        )

    def open(self, name: str, **how: Any) -> Any:
        no_pool: Any = None
        store = open_store(reactor, parse_reference(name), RegistrySettings(**how), pool=no_pool)
        self.addCleanup(store.close)
        return store

    async def layer(self, name: str, **how: Any) -> Any:
        """The reader of the only layer of an image."""
        store = self.open(name, **how)
        image: ResolvedImage = await store.resolve(AMD64)
        return store.blob(image.layers[0])

    async def check(self, reader: Any, offset: int, length: int) -> None:
        got: list[bytes] = []
        await reader.read(offset, length, got.append)
        self.assertEqual(CONTENT[offset : offset + length], b"".join(got))


class DockerRegistryTests(ServerTests):
    def setUp(self) -> None:
        super().setUp()
        self.registry = self.enterContext(DockerRegistry())
        push(self.layout, self.index, self.registry.url, "team/app:1")
        self.name = f"{self.registry.authority}/team/app:1"

    async def test_an_index_is_resolved(self) -> None:
        image = await self.open(self.name).resolve(AMD64)
        self.assertEqual((self.image["digest"], self.index["digest"]), (image.digest, image.index_digest))
        self.assertEqual(["linux/arm64", "linux/amd64"], [str(platform) for platform in image.platforms])

    def inspected_raw(self, *words: str) -> bytes:
        """A manifest, as skopeo gets it."""
        command = [tool("skopeo"), "inspect", "--raw", "--tls-verify=false", *words]
        return subprocess.run(command, check=True, capture_output=True).stdout

    async def test_skopeo_sees_the_same_image(self) -> None:
        image = await self.open(self.name).resolve(AMD64)
        raw_index = await deferToThread(self.inspected_raw, f"docker://{self.name}")
        self.assertEqual(str(Digest.of(raw_index)), image.index_digest)
        pinned = f"docker://{self.registry.authority}/team/app@{image.digest}"
        raw = await deferToThread(self.inspected_raw, pinned)
        self.assertEqual(str(Digest.of(raw)), image.digest)
        manifest = json.loads(raw)
        for ours, theirs in zip(
            (image.config, *image.layers), (manifest["config"], *manifest["layers"]), strict=True
        ):
            self.assertEqual(
                (theirs["mediaType"], theirs["digest"], theirs["size"]),
                (ours.media_type, ours.digest, ours.size),
            )

    async def test_a_missing_tag_is_said_in_the_registrys_words(self) -> None:
        resolved = self.open(f"{self.registry.authority}/team/app:2").resolve(AMD64)
        error = await self.assertFailure(resolved, NotInRegistry)
        self.assertIn("MANIFEST_UNKNOWN", str(error))

    async def test_many_ranges_at_once_are_read(self) -> None:
        reader = await self.layer(self.name)
        starts = range(0, len(CONTENT), MIB // 3)
        await gatherResults(
            [
                Deferred.fromCoroutine(self.check(reader, start, min(MIB, len(CONTENT) - start)))
                for start in starts
            ]
        )

    async def test_the_whole_blob_is_read(self) -> None:
        await self.check(await self.layer(self.name), 0, len(CONTENT))

    def skopeo_copy(self) -> None:
        self.layout.tag(self.image, "app")
        target = f"docker://{self.registry.authority}/skopeo/app:1"
        options = ["--insecure-policy", "--dest-tls-verify=false"]
        subprocess.run(
            [tool("skopeo"), "copy", *options, f"oci:{self.layout.directory}:app", target],
            check=True,
            capture_output=True,
        )

    async def test_what_skopeo_copied_is_read(self) -> None:
        self.skopeo_copy()
        store = self.open(f"{self.registry.authority}/skopeo/app:1")
        image = await store.resolve(AMD64)
        self.assertEqual(EROFS, image.layers[0].media_type)
        await self.check(store.blob(image.layers[0]), 12345, MIB)

    async def test_a_read_outlives_a_restart_of_the_registry(self) -> None:
        reader = await self.layer(self.name)
        await self.check(reader, 0, 10)
        self.registry.stop()
        reading = Deferred.fromCoroutine(self.check(reader, 10, MIB))
        await deferLater(reactor, 0.5)
        self.assertFalse(reading.called and not reading.paused)
        self.registry.start()
        await reading

    async def test_a_registry_that_stays_away_fails_the_read_in_time(self) -> None:
        reader = await self.layer(self.name, io_timeout=2.0)
        self.registry.stop()
        error = await self.assertFailure(reader.read(0, 10, lambda data: None), BlobUnreadable)
        self.assertIn("within 2 seconds", str(error))
        self.assertIn("refused", str(error))

    async def test_nobody_at_the_port_is_said_soon(self) -> None:
        resolved = self.open(f"127.0.0.1:{free_port()}/a:1").resolve(AMD64)
        self.assertIn("refused", str(await self.assertFailure(resolved, TransferFailed)))


class NginxTests(ServerTests):
    def setUp(self) -> None:
        super().setUp()
        self.registry = self.enterContext(DockerRegistry(users={"alice": "secret"}))
        self.alice = Credentials("alice", "secret")
        headers = {"Authorization": self.alice.authorization()}
        push(self.layout, self.image, self.registry.url, "team/app:1", headers=headers)

    async def through(self, front: Process) -> Any:
        return await self.layer(f"{front.authority}/team/app:1", credentials=self.alice)

    async def test_a_server_without_ranges_is_read_from(self) -> None:
        front = self.enterContext(Nginx.without_ranges(self.registry.url))
        reader = await self.through(front)
        await self.assertFailure(reader.read(3 * MIB, MIB, lambda data: None), RangesIgnored)
        await self.check(reader, 0, reader.size)
        self.assertIn('" 200 ', front.accesses[-1])

    async def test_credentials_stay_with_the_registry_when_it_redirects(self) -> None:
        blobs = self.layout.directory / "blobs" / "sha256"
        cdn = self.enterContext(Nginx(f"root {blobs}; if ($http_authorization) {{ return 418; }}"))
        front = self.enterContext(
            Nginx(
                "location ~ ^/v2/.*/blobs/sha256:(.*)$ { "
                f"if ($http_authorization = '') {{ return 401; }} return 307 {cdn.url}/$1?signature=1; }} "
                f"location / {{ proxy_pass {self.registry.url}; proxy_set_header Host $http_host; }}"
            )
        )
        reader = await self.through(front)
        await self.check(reader, MIB, MIB)
        await self.check(reader, 2 * MIB, MIB)
        self.assertEqual([True, True], ['" 206 ' in access for access in cdn.accesses])
        self.assertEqual(1, sum("/blobs/" in access for access in front.accesses), "the CDN is remembered")

    async def test_a_server_that_takes_few_requests_a_second_gets_few_and_is_read_from(self) -> None:
        front = self.enterContext(Nginx.limited(self.registry.url, rate=40, burst=4))
        reader = await self.through(front)
        pieces = [
            (start, min(MIB // 16, len(CONTENT) - start)) for start in range(0, len(CONTENT), MIB // 16)
        ]
        began = reactor.seconds()
        await gatherResults([Deferred.fromCoroutine(self.check(reader, *piece)) for piece in pieces])
        elapsed = reactor.seconds() - began
        refused = sum('" 429 ' in access for access in front.accesses)
        self.assertGreater(refused, 0)
        self.assertLess(refused, 2 * len(pieces))
        self.assertGreater(elapsed, (len(pieces) - 10) / 40, "as fast as it lets us")

    async def test_a_compressing_server_is_told_not_to(self) -> None:
        compress = "gzip on; gzip_proxied any; gzip_min_length 1; gzip_types *;"
        front = self.enterContext(Nginx.proxy(self.registry.url, compress))
        await self.check(await self.through(front), 100, MIB)

    async def test_a_cancelled_read_closes_its_connection(self) -> None:
        front = self.enterContext(Nginx.proxy(self.registry.url, "limit_rate 200k; proxy_buffering off;"))
        reader = await self.through(front)
        begun: Deferred[bytes] = Deferred()

        def deliver(data: bytes) -> None:
            if not begun.called:
                begun.callback(data)

        reading = reader.read(0, len(CONTENT), deliver)
        await begun
        self.assertEqual(1, connections_to(front.port), "the manifest's connection carries the blob")
        reading.cancel()
        await self.assertFailure(reading, CancelledError)
        for _ in range(100):
            if connections_to(front.port) == 0:
                return
            await deferLater(reactor, 0.02)
        self.fail(f"{connections_to(front.port)} connections are left")


def connections_to(port: int) -> int:
    """Established TCP connections to a port of this machine, counted at the client's end."""
    lines = Path("/proc/net/tcp").read_text().splitlines()[1:]
    fields = [line.split() for line in lines]
    return sum(field[2].endswith(f":{port:04X}") and field[3] == "01" for field in fields)
