"""From an image to what a device serves: choose the layer, check that it is EROFS, make an export of it."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

import attrs
from twisted.internet.defer import Deferred, succeed
from twisted.logger import Logger
from twisted.python.threadpool import ThreadPool
from zope.interface import implementer

from erofs_twisted.blocks.cache import CacheDirectory
from erofs_twisted.blocks.queue import FetchQueue
from erofs_twisted.blocks.source import BlobSource
from erofs_twisted.blocks.tracefile import TraceFiles
from erofs_twisted.erofs.superblock import Superblock
from erofs_twisted.errors import MountError
from erofs_twisted.interfaces import FileSpan, IExport, IImageStore, Segment, Tell, silent
from erofs_twisted.options import ImageConfig
from erofs_twisted.pool import SystemCallPool
from erofs_twisted.prefetch.fill import Fill
from erofs_twisted.prefetch.warmup import WarmUp
from erofs_twisted.registry.manifest import Descriptor, ResolvedImage
from erofs_twisted.registry.reference import LayoutReference
from erofs_twisted.registry.store import open_store
from erofs_twisted.tracing import Recording, find_trace

EROFS_MEDIA_TYPES = frozenset(
    {
        "application/vnd.erofs",  # erofs-utils
        "application/vnd.erofs.layer.v1",  # containerd 2.x
    }
)
_log = Logger()

BLOCK = 4096
"""A device is a whole number of these: the nbd driver would lose a tail that is shorter."""


class LayerError(MountError):
    """The image has no layer that can be mounted as asked."""


def is_erofs(descriptor: Descriptor) -> bool:
    """Is a layer an EROFS image as it lies in the registry, so that ranges of it are blocks?"""
    return descriptor.media_type in EROFS_MEDIA_TYPES


def choose_layer(image: ResolvedImage, index: int | None) -> Descriptor:
    """The one layer to mount: layer ``index``, or the only one. Raises `LayerError`."""
    layers = image.layers
    if not layers:
        raise LayerError(f"{image.reference}: the manifest {image.digest} has no layers")
    if index is None and len(layers) > 1:
        raise LayerError(
            f"{image.reference} has {len(layers)} layers; --layer N mounts one of them:\n"
            + describe_layers(layers)
        )
    if index is not None and index >= len(layers):
        raise LayerError(
            f"--layer {index}: {image.reference} has only these layers:\n{describe_layers(layers)}"
        )
    layer = layers[index or 0]
    if not is_erofs(layer):
        raise LayerError(f"layer {index or 0} of {image.reference} {_why_not_erofs(layer)}")
    return layer


def describe_layers(layers: Sequence[Descriptor]) -> str:
    """A line a layer: index, media type, size in bytes, digest."""
    return "\n".join(
        f"  {index}  {layer.media_type}  {layer.size} bytes  {layer.digest}"
        for index, layer in enumerate(layers)
    )


def _why_not_erofs(layer: Descriptor) -> str:
    plain, plus, suffix = layer.media_type.partition("+")
    if plus and plain in EROFS_MEDIA_TYPES:
        return (
            f"is {layer.media_type}: an EROFS image compressed as a whole with {suffix} cannot be read by "
            f"ranges; push it as {plain} (mkfs.erofs -z compresses inside the image)"
        )
    return (
        f"has the media type {layer.media_type}, which is not EROFS; "
        f"mountable are {' and '.join(sorted(EROFS_MEDIA_TYPES))}"
    )


@implementer(IExport)
@attrs.define
class BlobExport:
    """One blob as a device: its bytes, then zeros up to a whole block."""

    name: str
    description: str
    source: BlobSource
    size: int = attrs.field(init=False)

    def __attrs_post_init__(self) -> None:
        self.size = -(-self.source.size // BLOCK) * BLOCK

    def read(self, offset: int, length: int) -> list[Segment] | Deferred[list[Segment]]:
        beyond = offset + length - self.source.size
        if beyond <= 0:
            return self.source.read(offset, length)
        if beyond >= length:
            return [bytes(length)]
        head = self.source.read(offset, length - beyond)
        if isinstance(head, Deferred):
            return head.addCallback(lambda segments: [*segments, bytes(beyond)])
        return [*head, bytes(beyond)]

    def prefetch(self, offset: int, length: int) -> Deferred[None]:
        inside = min(length, self.source.size - offset)
        return self.source.prefetch(offset, inside) if inside > 0 else succeed(None)

    def extents(self, offset: int, length: int) -> list[tuple[int, bool]]:
        beyond = min(max(offset + length - self.source.size, 0), length)
        return [(part, hole) for part, hole in ((length - beyond, False), (beyond, True)) if part]


@attrs.define
class OpenImage:
    """An image whose layer can be served: `export` reads through the cache from its store.

    Its first bytes are on their way: `check` says if they are those of an EROFS image.
    """

    resolved: ResolvedImage
    layer: Descriptor
    export: IExport
    _source: BlobSource
    _store: IImageStore
    _warm_up: WarmUp
    _fill: Fill
    _fill_mode: str
    _recording: Recording | None
    _beginning: Deferred[list[Segment]] = attrs.field(init=False)
    _source_closed: Deferred[None] | None = attrs.field(default=None, init=False)

    def __attrs_post_init__(self) -> None:
        beginning = self._source.read(0, min(self._source.size, BLOCK)) if self._source.size else []
        self._beginning = beginning if isinstance(beginning, Deferred) else succeed(beginning)

    async def check(self) -> None:
        """Is it an image that can be mounted? With ``--fill full``, is every byte of it right? Call it once.

        Raises `SuperblockError`, or `ReadError` for what cannot be had.
        """
        superblock = Superblock.parse(joined(await self._beginning), self._source.size)
        if self._fill_mode == "full":
            await self._fill.now()
        self._warm_up.begin(superblock, self._fill if self._fill_mode == "auto" else None)

    @property
    def missing(self) -> int:
        """Bytes that are not in the cache."""
        return self._source.bytes_missing

    async def fetch_all(self) -> None:
        """Fetch what is missing, now, and compare all of it with its digest. Raises `ReadError`."""
        await self._fill.now()

    def abandon(self) -> Deferred[None]:
        """Fail the reads that wait, and all that come: the first part of `close`."""
        if self._source_closed is None:
            self._warm_up.stop()
            _ = self._beginning.addErrback(lambda _: [])
            self._source_closed = self._source.close()
        return self._source_closed

    async def close(self) -> None:
        """End the fetches under way, flush the cache, let go of the registry. Call it once."""
        await self.abandon()
        if self._recording is not None:
            await self._recording.close()
        await self._store.close()


def teller(config: ImageConfig) -> Tell:
    """Where the steps of a client are told."""
    return _tell if config.verbose else silent


def _tell(line: str) -> None:
    _log.debug("{line}", line=line)


def store_of(reactor: Any, pool: ThreadPool, config: ImageConfig) -> IImageStore:
    """Where an image lies, with what we are given to get at it."""
    return open_store(
        reactor,
        config.reference,
        config.registry,
        pool=pool,
        cache_dir=str(config.cache_dir),
        tell=teller(config),
    )


@asynccontextmanager
async def resolved_in_store(
    reactor: Any, config: ImageConfig
) -> AsyncIterator[tuple[IImageStore, ResolvedImage]]:
    """An image's store, for a while and with threads of its own, and what the store says of the image.

    Raises what the store raises.
    """
    pool = SystemCallPool(reactor)
    try:
        store = store_of(reactor, pool, config)
        try:
            yield store, await store.resolve(config.platform)
        finally:
            await store.close()
    finally:
        await pool.stop()


@attrs.define(eq=False)
class FoundImage:
    """An image of which it is known which layer is to be mounted. `open` it or not, then `close` it."""

    resolved: ResolvedImage
    layer: Descriptor
    _store: IImageStore
    _reactor: Any
    _pool: ThreadPool
    _config: ImageConfig
    _is_open: bool = attrs.field(init=False, default=False)

    async def open(self) -> OpenImage:
        """The layer, through the cache. Call it once. Raises `CacheError`."""
        reactor, pool, config, store = self._reactor, self._pool, self._config, self._store
        resolved, layer = self.resolved, self.layer
        directory = CacheDirectory(reactor, pool, str(config.cache_dir), limit=config.cache_size)
        cached = await directory.open(layer.digest, layer.size)
        queue = FetchQueue(reactor, tell=teller(config))
        source = BlobSource(store.blob(layer), cached, reactor, queue=queue)
        missing = source.bytes_missing
        export: IExport = BlobExport(
            name=str(config.reference), description=f"{layer.media_type} {layer.digest}", source=source
        )
        recording = None
        if config.trace == "record":
            recording = Recording(reactor, pool, TraceFiles(str(config.cache_dir)), layer.digest, layer.size)
            export = recording.of(export)
        warm_up = WarmUp(reactor, source)
        fill = Fill(reactor, source, queue, directory.room, config.fill_rate)
        image = OpenImage(resolved, layer, export, source, store, warm_up, fill, fill_mode(config), recording)
        if config.trace != "off" and missing:
            # A mount that finds something in the cache asks the registry for no trace: what is there was one.
            search = find_trace(store, str(config.cache_dir), resolved, layer, ask=missing == layer.size)
            warm_up.follow(search)
        self._is_open = True
        return image

    async def close(self) -> None:
        """Let go of the registry, unless what was opened needs it."""
        if not self._is_open:
            await self._store.close()


async def find_image(reactor: Any, pool: ThreadPool, config: ImageConfig) -> FoundImage:
    """Resolve an image, and choose its layer.

    Raises `LayerError`, or what the registry's client raises; then nothing is left open.
    """
    store = store_of(reactor, pool, config)
    try:
        resolved = await store.resolve(config.platform)
        layer = choose_layer(resolved, config.layer)
    except BaseException:
        await store.close()
        raise
    return FoundImage(resolved, layer, store, reactor, pool, config)


async def open_image(reactor: Any, pool: ThreadPool, config: ImageConfig) -> OpenImage:
    """Resolve an image, choose its layer, and open that in the cache.

    Raises `LayerError`, `CacheError`, or what the registry's client raises; then nothing is left open.
    """
    found = await find_image(reactor, pool, config)
    try:
        return await found.open()
    finally:
        await found.close()


def fill_mode(config: ImageConfig) -> str:
    """When to fetch the rest of an image: of one that lies on a disk here, a copy is of no use."""
    if config.fill == "auto" and isinstance(config.reference, LayoutReference):
        return "off"
    return config.fill


def joined(segments: Sequence[Segment]) -> bytes:
    """What a read gave, in memory."""
    return b"".join(
        os.pread(segment.fd, segment.length, segment.offset) if isinstance(segment, FileSpan) else segment
        for segment in segments
    )
