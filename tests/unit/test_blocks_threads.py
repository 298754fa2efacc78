"""The cache on a real reactor and real threads."""

from __future__ import annotations

import os

from twisted.internet import reactor
from twisted.internet.defer import Deferred, ensureDeferred
from twisted.python.threadpool import ThreadPool
from twisted.trial.unittest import TestCase

from erofs_twisted.blocks.cache import CacheDirectory
from erofs_twisted.blocks.source import BlobSource
from erofs_twisted.interfaces import FileSpan
from tests.unit.blobs import ScriptedOrigin, blob, digest_of

DATA = blob(300_000)


class ThreadTests(TestCase):
    def setUp(self) -> None:
        pool = ThreadPool(0, 2, name="cache")
        pool.start()
        self.addCleanup(pool.stop)
        self.directory = CacheDirectory(reactor, pool, self.mktemp())

    def test_a_blob_is_fetched_verified_kept_and_read_by_the_next(self) -> Deferred[None]:
        async def live_twice() -> None:
            origin = ScriptedOrigin(DATA)
            cached = await self.directory.open(digest_of(DATA), len(DATA))
            source = BlobSource(origin, cached, reactor)  # type: ignore[arg-type]
            filled = source.prefetch(0, len(DATA))
            while origin.live:
                origin.live[0].finish()
            await filled
            await cached.verify()
            await source.close()

            nobody = ScriptedOrigin(DATA)
            cached = await self.directory.open(digest_of(DATA), len(DATA))
            source = BlobSource(nobody, cached, reactor)  # type: ignore[arg-type]
            segments = source.read(70_000, 200_000)
            assert isinstance(segments, list)
            (span,) = segments
            assert isinstance(span, FileSpan)
            self.assertEqual(DATA[70_000:270_000], os.pread(span.fd, span.length, span.offset))
            self.assertEqual([], nobody.transfers)
            await source.close()

        return ensureDeferred(live_twice())
