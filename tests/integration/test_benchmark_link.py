"""The registry that the benchmarks shape links with: its bytes, its counts, and its sense of time."""

from __future__ import annotations

import shutil
import tempfile
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from twisted.trial.unittest import SynchronousTestCase

from benchmarks.registries import UNSHAPED, Link, Shaped

SIZE = 1_000_000
BLOB = "/v2/a/blobs/sha256:00"


class ShapedLinkTests(SynchronousTestCase):
    def setUp(self) -> None:
        root = Path(tempfile.mkdtemp(prefix="link-"))
        self.addCleanup(shutil.rmtree, root)
        self.blob = bytes(range(250)) * (SIZE // 250)
        (root / "v2/a/blobs").mkdir(parents=True)
        (root / BLOB.lstrip("/")).write_bytes(self.blob)
        self.registry = Shaped(root=root)
        self.registry.__enter__()
        self.addCleanup(self.registry.__exit__, None, None, None)

    def get(self, path: str = BLOB, **headers: str) -> bytes:
        request = urllib.request.Request(self.registry.url + path, headers=headers)
        with urllib.request.urlopen(request, timeout=30) as answer:
            return bytes(answer.read())

    def test_a_range_is_those_bytes_and_no_others(self) -> None:
        self.assertEqual(self.blob[1000:1501], self.get(Range="bytes=1000-1500"))

    def test_what_is_not_there_is_not_found(self) -> None:
        error = self.assertRaises(urllib.error.HTTPError, self.get, "/v2/a/blobs/../../../etc/passwd")
        self.assertEqual(404, error.code)
        error.close()

    def test_requests_and_bytes_of_blobs_are_counted_until_they_are_asked_for(self) -> None:
        self.get()
        self.get(Range="bytes=0-9")
        counted = self.registry.set(UNSHAPED)
        self.assertEqual((2, SIZE + 10), (counted.blob_requests, counted.bytes))
        self.assertEqual(0, self.registry.set(UNSHAPED).requests)

    def test_the_first_byte_of_an_answer_comes_after_the_delay(self) -> None:
        self.registry.set(Link(0.2, 0.0, "slow"))
        began = time.monotonic()
        self.get(Range="bytes=0-0")
        self.assertGreaterEqual(time.monotonic() - began, 0.2)

    def test_all_connections_share_the_rate(self) -> None:
        self.registry.set(Link(0.0, 4 * SIZE, "narrow"))
        began = time.monotonic()
        with ThreadPoolExecutor(4) as threads:
            read = list(threads.map(lambda _: self.get(), range(4)))
        took = time.monotonic() - began
        self.assertEqual([self.blob] * 4, read)
        # The bucket holds a little when it starts.
        self.assertGreaterEqual(took, 0.98)
