"""An image in an OCI layout on disk (OCI image specification, "Image Layout")."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

import attrs
from twisted.internet.defer import Deferred, fail, succeed
from twisted.internet.threads import deferToThreadPool
from twisted.python.threadpool import ThreadPool
from zope.interface import implementer

from erofs_twisted.interfaces import Delivery, IBlobReader, IImageStore
from erofs_twisted.registry.digest import Digest
from erofs_twisted.registry.errors import BlobUnreadable, InvalidManifest, NotInRegistry, RegistryError
from erofs_twisted.registry.manifest import (
    MAX_MANIFEST,
    OCI_INDEX,
    Descriptor,
    Index,
    ResolvedImage,
    load_object,
    parse_manifest,
)
from erofs_twisted.registry.platform import Platform
from erofs_twisted.registry.reference import LayoutReference
from erofs_twisted.registry.resolution import Document, check_content, resolve_image
from erofs_twisted.registry.selection import choose_manifest

if TYPE_CHECKING:
    from erofs_twisted.registry.probe import Probe
    from erofs_twisted.registry.push import Artifact

TAG_ANNOTATION = "org.opencontainers.image.ref.name"
PIECE = 1024 * 1024
"""Bytes that one visit to a thread reads: long enough to be worth the visit, short enough to cancel."""

Result = TypeVar("Result")


@implementer(IImageStore)
@attrs.frozen(eq=False)
class LayoutStore:
    """The image ``reference``; files are read in the threads of ``pool``, which must run."""

    _reactor: Any
    _reference: LayoutReference
    _pool: ThreadPool

    def resolve(self, platform: Platform) -> Deferred[ResolvedImage]:
        """As `IImageStore.resolve`; fails with a `RegistryError`."""
        return Deferred.fromCoroutine(self._resolve(platform))

    def blob(self, descriptor: Descriptor) -> FileBlobReader:
        """As `IImageStore.blob`."""
        return FileBlobReader(self._reactor, self._pool, self._path(descriptor.digest), descriptor)

    def referrers(self, subject: Digest, artifact_type: str) -> Deferred[tuple[Descriptor, ...]]:
        """As `IImageStore.referrers`: all of that type that are in the layout's index."""

        def choose(index: Index) -> tuple[Descriptor, ...]:
            return tuple(entry for entry in index.manifests if entry.artifact_type == artifact_type)

        return self._in_thread(self._read_index).addCallback(choose)

    def fetch(self, descriptor: Descriptor) -> Deferred[bytes]:
        """As `IImageStore.fetch`; fails with a `RegistryError`."""
        return Deferred.fromCoroutine(self._fetch(descriptor)).addCallback(lambda document: document.data)

    def probe(self, descriptor: Descriptor) -> Deferred[Probe | None]:
        """As `IImageStore.probe`."""
        return succeed(None)

    def push_referrer(self, image: ResolvedImage, artifact: Artifact) -> Deferred[Digest]:
        """As `IImageStore.push_referrer`; fails with `RegistryError`."""
        return fail(
            RegistryError(f"{self._reference} is a layout on disk, which is only read; push to a registry")
        )

    def close(self) -> Deferred[None]:
        """As `IImageStore.close`: no file stays open between reads."""
        return succeed(None)

    async def _resolve(self, platform: Platform) -> ResolvedImage:
        index = await self._in_thread(self._read_index)
        entry = self._choose(index, platform)
        return await resolve_image(self._reference, platform, await self._fetch(entry), self._fetch)

    async def _fetch(self, descriptor: Descriptor) -> Document:
        data = await self._in_thread(read_small_file, self._path(descriptor.digest))
        check_content(self._reference, data, descriptor.digest, descriptor.size)
        return Document(descriptor.digest, descriptor.media_type, data)

    def _in_thread(self, function: Callable[..., Result], *arguments: object) -> Deferred[Result]:
        return deferToThreadPool(self._reactor, self._pool, function, *arguments)

    def _path(self, digest: Digest) -> str:
        return os.path.join(self._reference.directory, "blobs", digest.algorithm, digest.encoded)

    def _read_index(self) -> Index:
        directory = self._reference.directory
        try:
            layout = load_object(read_small_file(os.path.join(directory, "oci-layout")))
            if not str(layout.get("imageLayoutVersion")).startswith("1."):
                raise InvalidManifest(f"its version is {layout.get('imageLayoutVersion')!r:.40}, not 1")
            index = parse_manifest(read_small_file(os.path.join(directory, "index.json")), OCI_INDEX)
        except InvalidManifest as error:
            raise InvalidManifest(f"{directory} is not a layout that can be used: {error}") from error
        except NotInRegistry as error:
            raise NotInRegistry(f"{directory} is not an OCI layout: {error}") from error
        assert isinstance(index, Index)
        return index

    def _choose(self, index: Index, platform: Platform) -> Descriptor:
        """The entry with the tag, or the only one; of several for the same tag the platform's."""
        wanted = self._reference.tag
        tags = [entry.annotations.get(TAG_ANNOTATION) for entry in index.manifests]
        entries = [
            entry
            for entry, tag in zip(index.manifests, tags, strict=True)
            if (not entry.artifact_type if wanted is None else tag == wanted)
        ]
        known = ", ".join(dict.fromkeys(tag for tag in tags if tag)) or "none"
        if not entries:
            raise NotInRegistry(f"{self._reference}: there is no such image; its tags: {known}")
        if len(entries) == 1:
            return entries[0]
        if wanted is None and len(set(tags)) > 1:
            raise NotInRegistry(
                f"{self._reference} holds several images; name one as oci:DIR:TAG; its tags: {known}"
            )
        return choose_manifest(attrs.evolve(index, manifests=tuple(entries)), platform)


@implementer(IBlobReader)
@attrs.frozen(eq=False)
class FileBlobReader:
    """The blob in the file at ``path``, which is opened anew for each piece: so nothing is left to close."""

    _reactor: Any
    _pool: ThreadPool
    _path: str
    _descriptor: Descriptor

    @property
    def digest(self) -> str:
        return self._descriptor.digest

    @property
    def size(self) -> int:
        return self._descriptor.size

    def read(self, offset: int, length: int, deliver: Delivery) -> Deferred[None]:
        """As `IBlobReader.read`; fails with `BlobUnreadable`."""
        if not 0 <= offset <= offset + length <= self.size:
            raise ValueError(f"[{offset}, {offset + length}) is not within the blob's {self.size} bytes")
        return Deferred.fromCoroutine(self._read(offset, offset + length, deliver))

    async def _read(self, position: int, end: int, deliver: Delivery) -> None:
        while position < end:
            piece = min(PIECE, end - position)
            deliver(await deferToThreadPool(self._reactor, self._pool, self._read_piece, position, piece))
            position += piece

    def _read_piece(self, offset: int, length: int) -> bytes:
        try:
            fd = open_regular_file(self._path)
            try:
                size = os.fstat(fd).st_size
                if size != self.size:
                    raise BlobUnreadable(f"{self._path} has {size} bytes, the manifest says {self.size}")
                data = os.pread(fd, length, offset)
            finally:
                os.close(fd)
        except (OSError, NotInRegistry) as error:
            raise BlobUnreadable(f"{self._path} cannot be read: {error}") from error
        if len(data) != length:
            raise BlobUnreadable(f"{self._path} ended while it was read")
        return data


def read_small_file(path: str) -> bytes:
    """All of a file that holds a manifest. Raises `NotInRegistry`, `InvalidManifest`, `RegistryError`."""
    try:
        with open(open_regular_file(path), "rb") as file:
            data = file.read(MAX_MANIFEST + 1)
    except OSError as error:
        raise RegistryError(f"{path} cannot be read: {error.strerror}") from error
    if len(data) > MAX_MANIFEST:
        raise InvalidManifest(f"{path} has more than the {MAX_MANIFEST} bytes that are allowed")
    return data


def open_regular_file(path: str) -> int:
    """A descriptor of a file that cannot block. Raises `NotInRegistry`, OSError."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise NotInRegistry(f"there is no {path}") from error
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise NotInRegistry(f"{path} is not a file")
    return fd
