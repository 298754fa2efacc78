"""From the document that a reference names to the one manifest for a platform."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

import attrs

from erofs_twisted.registry.digest import Digest
from erofs_twisted.registry.errors import DigestMismatch, InvalidManifest, PlatformMissing
from erofs_twisted.registry.manifest import Descriptor, Index, Manifest, ResolvedImage, parse_manifest
from erofs_twisted.registry.platform import Platform
from erofs_twisted.registry.reference import ImageReference, LayoutReference
from erofs_twisted.registry.selection import choose_manifest, platforms

MAX_DEPTH = 4
"""Indexes within indexes; nobody nests more than two."""


@attrs.frozen
class Document:
    """A manifest or an index as it came, its digest already compared with what it was asked for by."""

    digest: Digest
    media_type: str
    data: bytes


async def resolve_image(
    reference: ImageReference | LayoutReference,
    platform: Platform,
    document: Document,
    fetch: Callable[[Descriptor], Awaitable[Document]],
) -> ResolvedImage:
    """Follow indexes from ``document`` down to the manifest for ``platform``.

    ``fetch`` gets what an index names, and answers for its digest and size. Raises `InvalidManifest`,
    `PlatformMissing`, and what ``fetch`` raises.
    """
    top = document
    chosen: Platform | None = None
    offered: tuple[Platform, ...] = ()
    for _ in range(MAX_DEPTH):
        parsed = _parse(reference, document)
        if isinstance(parsed, Manifest):
            index_digest = None if document is top else top.digest
            return ResolvedImage(reference, document.digest, parsed, index_digest, chosen, offered)
        offered += tuple(new for new in platforms(parsed) if new not in offered)
        try:
            entry = choose_manifest(parsed, platform)
        except PlatformMissing as error:
            raise PlatformMissing(f"{reference}: {error}") from error
        chosen = entry.platform or chosen
        document = await fetch(entry)
    raise InvalidManifest(f"{reference}: more than {MAX_DEPTH} indexes within each other")


def check_content(name: object, data: bytes, digest: Digest, size: int | None) -> None:
    """Are these the bytes that a descriptor names? Raises `DigestMismatch`."""
    if size is not None and len(data) != size:
        raise DigestMismatch(f"{name}: {digest} has {len(data)} bytes, its descriptor says {size}")
    if not digest.matches(data):
        found = Digest.of(data, digest.algorithm)
        raise DigestMismatch(f"{name}: what came has the digest {found}, not {digest}")


def _parse(reference: object, document: Document) -> Manifest | Index:
    try:
        return parse_manifest(document.data, document.media_type)
    except InvalidManifest as error:
        raise InvalidManifest(
            f"{reference}: the manifest {document.digest} cannot be used: {error}"
        ) from error
