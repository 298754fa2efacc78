"""What the kernel reads for ``find -ls`` of a real image is there once its metadata was fetched ahead."""

from __future__ import annotations

import atexit
import functools
import os
import shutil
import subprocess
import sysconfig
import tempfile
from collections.abc import Sequence
from pathlib import Path

from twisted.internet import reactor
from twisted.internet.defer import Deferred, ensureDeferred
from twisted.internet.task import Clock, deferLater
from twisted.python.threadpool import ThreadPool
from twisted.trial.unittest import SynchronousTestCase
from zope.interface import implementer

from erofs_twisted.blocks.cache import CacheDirectory
from erofs_twisted.blocks.chunks import chunk_size_for
from erofs_twisted.blocks.readahead import ByteRange
from erofs_twisted.blocks.source import BlobSource
from erofs_twisted.device.fuse import FuseConnector
from erofs_twisted.erofs.superblock import Superblock
from erofs_twisted.image import BlobExport
from erofs_twisted.interfaces import Delivery, IBlobReader
from erofs_twisted.prefetch.metadata import prefetch_metadata
from tests.devices import DeviceTestCase
from tests.images import build_erofs
from tests.unit.blobs import ScriptedOrigin, ThreadlessReactor, Transfer, digest_of, open_cached

ROUND_TRIP = 0.025
BANDWIDTH = 12.5e6
"""Bytes a second: 100 Mbit/s."""
PACKET = 64 * 1024
FIND = ("find", ".", "-type", "d", "-printf", "d %m %p\n", "-o", "-printf", "%y %m %s %n %l %p\n")
"""Reads every directory, every inode and every link."""


@functools.cache
def standard_library() -> Path:
    """A copy of Python's, which nobody else changes; once a process."""
    directory = Path(tempfile.mkdtemp(prefix="standard-library-"))
    atexit.register(shutil.rmtree, directory, ignore_errors=True)
    ignored = shutil.ignore_patterns("__pycache__", "site-packages", "dist-packages")
    shutil.copytree(sysconfig.get_path("stdlib"), directory / "tree", symlinks=True, ignore=ignored)
    return directory / "tree"


def attributes(tree: Path) -> dict[str, dict[str, bytes]]:
    """The extended attributes of every file, by its path."""
    return {
        str(path.relative_to(tree)): {name: os.getxattr(path, name) for name in os.listxattr(path)}
        for path in tree.rglob("*")
    }


@implementer(IBlobReader)
class LateOrigin:
    """The bytes of a file; each answer takes `ROUND_TRIP` to come."""

    def __init__(self, path: Path) -> None:
        self.data = path.read_bytes()
        self.digest = digest_of(self.data)
        self.size = len(self.data)
        self.asked: list[tuple[int, int]] = []

    def read(self, offset: int, length: int, deliver: Delivery) -> Deferred[None]:
        self.asked.append((offset, length))
        return ensureDeferred(self._answer(offset, length, deliver))

    async def _answer(self, offset: int, length: int, deliver: Delivery) -> None:
        await deferLater(reactor, ROUND_TRIP)
        deliver(self.data[offset : offset + length])


class LinkOrigin(ScriptedOrigin):
    """Behind a link of `ROUND_TRIP` and `BANDWIDTH`, by a clock that only tests advance."""

    def __init__(self, data: bytes, clock: Clock) -> None:
        super().__init__(data)
        self._clock = clock
        self._busy_until = 0.0

    def read(self, offset: int, length: int, deliver: Delivery) -> Deferred[None]:
        done = super().read(offset, length, deliver)
        transfer = self.transfers[-1]
        begins = max(self._clock.seconds() + ROUND_TRIP, self._busy_until)
        self._busy_until = begins + length / BANDWIDTH
        for part in range(0, length, PACKET):
            arrival = begins + min(part + PACKET, length) / BANDWIDTH
            self._clock.callLater(arrival - self._clock.seconds(), self._arrive, transfer)
        return done

    def _arrive(self, transfer: Transfer) -> None:
        left = transfer.length - transfer.position
        transfer.send(min(PACKET, left))
        if left <= PACKET:
            transfer.finish()


class SimulatedLinkTests(SynchronousTestCase):
    """How long it takes, apart from what this machine is like."""

    def test_it_takes_what_the_bytes_take_and_a_few_round_trips(self) -> None:
        for options in (
            (),
            ("-zlz4hc",),
            ("-zlz4hc", "-Eztailpacking,fragments,dedupe"),
            ("-Enoinline_data",),
        ):
            image = build_erofs(standard_library(), Path(self.mktemp()), *options).read_bytes()
            seconds, fetched, requests = self.prefetch(image)
            self.assertLessEqual(seconds, fetched / BANDWIDTH + 10 * ROUND_TRIP, options)
            self.assertLessEqual(fetched, len(image) // 3, options)
            self.assertLessEqual(requests, 300, options)

    def prefetch(self, image: bytes) -> tuple[float, int, int]:
        """Seconds, bytes and requests that it takes."""
        clock = ThreadlessReactor()
        origin = LinkOrigin(image, clock)
        cached = open_cached(self.mktemp(), image, reactor=clock, chunk_size=chunk_size_for(len(image)))
        source = BlobSource(origin, cached, clock)
        self.addCleanup(source.close)
        done = ensureDeferred(prefetch_metadata(source, Superblock.parse(image[:4096], len(image)), clock))
        while not done.called:
            clock.advance(min(call.getTime() for call in clock.getDelayedCalls()) - clock.seconds())
        self.successResultOf(done)
        return clock.seconds(), sum(length for _, length in origin.asked), len(origin.asked)


class NoReadahead:
    """Guesses nothing, so that what is asked for is what a read waits for."""

    def advise(self, offset: int, length: int, missing: bool) -> Sequence[ByteRange]:
        return ()


class PrefetchedMountTests(DeviceTestCase):
    def connector(self) -> FuseConnector:
        return FuseConnector(reactor, self.pool, str(self.directory / "run"))

    async def open(self, tree: Path, *options: str) -> Superblock:
        image = build_erofs(tree, self.directory / "other.erofs", *options)
        self.origin = LateOrigin(image)
        threads = ThreadPool(0, 4)
        threads.start()
        self.addCleanup(lambda: self.in_thread(threads.stop))
        cache = CacheDirectory(reactor, threads, str(self.directory / "cache"))
        cached = await cache.open(self.origin.digest, self.origin.size)
        self.source = BlobSource(self.origin, cached, reactor, NoReadahead())
        self.addCleanup(self.source.close)
        self.export = BlobExport("", "", self.source)
        return Superblock.parse(self.origin.data[:4096], self.origin.size)

    async def listing(self, root: Path) -> list[str]:
        done = await self.in_thread(
            lambda: subprocess.run(FIND, cwd=root, check=True, capture_output=True, text=True)
        )
        return sorted(done.stdout.splitlines())

    async def assert_find_asks_for_nothing(self, tree: Path, *options: str) -> None:
        superblock = await self.open(tree, *options)
        covered = await prefetch_metadata(self.source, superblock, reactor)
        self.assertLess(covered, self.origin.size // 2)
        await self.mount(await self.attach())
        asked = list(self.origin.asked)
        target = Path(self.mountpoint.path)
        self.assertEqual(await self.listing(tree), await self.listing(target))
        self.assertEqual(asked, self.origin.asked)

    async def test_of_a_plain_image(self) -> None:
        await self.assert_find_asks_for_nothing(standard_library())

    async def test_of_a_compressed_image(self) -> None:
        await self.assert_find_asks_for_nothing(standard_library(), "-zlz4hc")

    async def test_of_an_image_with_all_kinds_of_compression(self) -> None:
        await self.assert_find_asks_for_nothing(
            standard_library(), "-zlz4hc", "-C65536", "-Eztailpacking,fragments,dedupe"
        )

    async def test_of_an_image_of_chunks(self) -> None:
        await self.assert_find_asks_for_nothing(standard_library(), "--chunksize=65536")

    async def test_of_shared_and_inline_attributes(self) -> None:
        tree = self.directory / "attributes"
        for number in range(60):
            file = tree / f"directory-{number % 7}" / f"file-{number}"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(os.urandom(300_000))
            os.setxattr(file, "user.own", os.urandom(10 * number))
            os.setxattr(file, "user.shared", b"the same for many " * 5 + bytes([number % 10]))
        await self.assert_find_asks_for_nothing(tree, "-x2")
        asked = list(self.origin.asked)
        target = Path(self.mountpoint.path)
        self.assertEqual(await self.in_thread(attributes, tree), await self.in_thread(attributes, target))
        self.assertEqual(asked, self.origin.asked)
