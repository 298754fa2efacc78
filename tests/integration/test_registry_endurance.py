"""What a mount lives through: URLs and tokens that expire while it reads, registries that go away."""

from __future__ import annotations

import os
import time
import urllib.request
from pathlib import Path
from typing import Any

from twisted.internet import reactor
from twisted.internet.defer import Deferred, gatherResults
from twisted.internet.task import deferLater
from twisted.internet.threads import deferToThread
from twisted.trial.unittest import TestCase

from erofs_twisted.registry.errors import BlobUnreadable
from erofs_twisted.registry.platform import Platform
from erofs_twisted.registry.reference import parse_reference
from erofs_twisted.registry.settings import RegistrySettings
from erofs_twisted.registry.store import open_store
from tests.daemon import FaultRegistry
from tests.faults import REGISTRY_FAULTS
from tests.images import EROFS, Layout, push
from tests.ranges import read_ranges
from tests.servers import DockerRegistry, Nginx, SignedURLs, TokenServer

AMD64 = Platform.parse("linux/amd64")
CONTENT = os.urandom(4 << 20)
LANES = 16
PIECE = 32 * 1024
RANGES = 400
OUTAGE = 3.0
"""Seconds."""


class EnduranceTests(TestCase):
    timeout = 60

    def setUp(self) -> None:
        self.layout = Layout(Path(self.mktemp()).absolute())
        self.image = self.layout.manifest([self.layout.blob(CONTENT, EROFS)])
        self.reads = 0

    async def open(self, authority: str, **settings: Any) -> Any:
        no_pool: Any = None
        reference = parse_reference(f"{authority}/team/app:1")
        store: Any = open_store(reactor, reference, RegistrySettings(**settings), pool=no_pool)
        self.addCleanup(store.close)
        self.resolved = await store.resolve(AMD64)
        return store.blob(self.resolved.layers[0])

    async def read_on(self, reader: Any, seconds: float) -> float:
        """Read here and there, many at a time; the seconds that it took."""
        began = time.monotonic()

        async def lane(number: int) -> None:
            while time.monotonic() < began + seconds:
                offset = (number * 7919 + self.reads * 104_729) % (len(CONTENT) - PIECE)
                await self.check(reader, offset, PIECE)
                # What a reader makes of it takes longer than a request over loopback.
                await deferLater(reactor, 0.05)

        await gatherResults([Deferred.fromCoroutine(lane(number)) for number in range(LANES)])
        return time.monotonic() - began

    async def check(self, reader: Any, offset: int, length: int) -> None:
        got: list[bytes] = []
        await reader.read(offset, length, got.append)
        self.assertEqual(CONTENT[offset : offset + length], b"".join(got))
        self.reads += 1


class SignedURLTests(EnduranceTests):
    async def start(self, name: str) -> Any:
        """A registry whose blobs are at a CDN; the reader of one."""
        registry = self.enterContext(DockerRegistry())
        push(self.layout, self.image, registry.url, "team/app:1")
        self.urls = self.enterContext(SignedURLs(name))
        blobs = self.layout.directory / "blobs" / "sha256"
        self.cdn = self.enterContext(Nginx(self.urls.directives(blobs)))
        self.urls.cdn = self.cdn.url
        front = self.enterContext(self.urls.front(registry.url))
        return await self.open(front.authority)

    def used(self) -> int:
        """How many of the URLs that were given out brought something."""
        return sum(
            any(query in access and '" 206 ' in access for access in self.cdn.accesses)
            for query in self.urls.given
        )

    async def test_urls_that_say_when_they_end_are_renewed_before_and_once(self) -> None:
        reader = await self.start("Expires")
        took = await self.read_on(reader, 4)
        self.assertGreater(len(self.urls.given), 2)
        self.assertEqual(len(self.urls.given), self.used(), "none was asked for in vain")
        self.assertLessEqual(len(self.urls.given), took / 0.75 + 2)
        self.assertGreater(self.reads, 10 * len(self.urls.given))
        self.assertFalse([access for access in self.cdn.accesses if '" 403 ' in access])

    async def test_urls_that_do_not_are_renewed_when_they_are_refused_and_once(self) -> None:
        reader = await self.start("Until")
        took = await self.read_on(reader, 4)
        self.assertTrue([access for access in self.cdn.accesses if '" 403 ' in access])
        self.assertEqual(len(self.urls.given), self.used())
        self.assertLessEqual(len(self.urls.given), took + 2)


class TokenTests(EnduranceTests):
    async def test_one_token_is_fetched_for_each_that_expires(self) -> None:
        tokens = self.enterContext(TokenServer(lifetime=2))
        registry = self.enterContext(DockerRegistry(auth=tokens.registry_auth))
        headers = tokens.authorization("team/app")
        push(self.layout, self.image, registry.url, "team/app:1", headers=headers)
        reader = await self.open(registry.authority)
        took = await self.read_on(reader, 5)
        self.assertGreater(tokens.granted, 2)
        self.assertLessEqual(tokens.granted, took / 1.5 + 2)
        self.assertGreater(self.reads, 10 * tokens.granted)


class FaultTests(EnduranceTests):
    """One request in five meets a fault: an error, a delay, a stall, a reset, another range or length."""

    async def random_ranges(self, seed: int) -> None:
        registry = self.enterContext(DockerRegistry())
        push(self.layout, self.image, registry.url, "team/app:1")
        with FaultRegistry(registry.url) as proxy:
            reader = await self.open(proxy.authority, stall_timeout=1.0)
            faults = [fault.fields() for fault in REGISTRY_FAULTS]
            proxy.set("team/app", *faults, rate=0.2, seed=seed)
            reads = await read_ranges(reader, CONTENT, RANGES, seed, lanes=LANES)
            self.assertEqual(([], 0, RANGES), (reads.errors, reads.wrong, len(reads.seconds)))
            self.assertGreater(proxy.counts("team/app").hits, RANGES / 8)

    async def test_every_byte_is_right_and_none_is_missing(self) -> None:
        await self.random_ranges(1)

    async def test_whatever_the_order_of_the_faults(self) -> None:
        await self.random_ranges(2)


class OutageTests(EnduranceTests):
    async def test_all_reads_go_on_within_a_second_of_a_registrys_return(self) -> None:
        registry = self.enterContext(DockerRegistry())
        push(self.layout, self.image, registry.url, "team/app:1")
        reader = await self.open(registry.authority)
        await self.check(reader, 0, 10)
        registry.stop()
        before = registry.log.count("GET /v2/")
        reading = gatherResults(
            [Deferred.fromCoroutine(self.check(reader, number * PIECE, PIECE)) for number in range(LANES)]
        )
        await deferLater(reactor, OUTAGE)
        registry.start()
        back = time.monotonic()
        await reading
        self.assertLess(time.monotonic() - back, 1.0)
        self.assertLessEqual(registry.log.count("GET /v2/") - before, 2 * LANES)

    async def test_a_blob_that_was_deleted_fails_at_once_with_the_cure(self) -> None:
        registry = self.enterContext(DockerRegistry())
        push(self.layout, self.image, registry.url, "team/app:1")
        reader = await self.open(registry.authority)
        url = f"{registry.url}/v2/team/app/blobs/{reader.digest}"
        await deferToThread(delete, url)
        began = time.monotonic()
        error = await self.assertFailure(reader.read(0, 10, lambda data: None), BlobUnreadable)
        self.assertLess(time.monotonic() - began, 1.0)
        self.assertIn("push the image again", str(error))


def delete(url: str) -> None:
    urllib.request.urlopen(urllib.request.Request(url, method="DELETE")).close()
