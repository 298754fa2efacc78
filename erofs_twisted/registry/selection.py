"""Which manifest of an index is the one for a platform."""

from __future__ import annotations

from collections.abc import Iterable

from erofs_twisted.registry.errors import PlatformMissing
from erofs_twisted.registry.manifest import INDEX_TYPES, MANIFEST_TYPES, Descriptor, Index
from erofs_twisted.registry.platform import Platform

EROFS_FEATURE = "erofs"
"""Under ``os.features``: this manifest's layers are EROFS images, beside one whose layers are tarballs."""


def choose_manifest(index: Index, platform: Platform) -> Descriptor:
    """The manifest, or the index within the index, that serves ``platform`` best.

    By the platform's own fall-backs; among equals one whose layers are EROFS, else the first. A single entry
    without a platform stands for every platform. Raises `PlatformMissing`.
    """
    candidates = images(index)
    named = [entry for entry in candidates if entry.platform is not None]
    for wanted in platform.fallbacks():
        matching = [entry for entry in named if entry.platform == wanted]
        if matching:
            return next((entry for entry in matching if EROFS_FEATURE in entry.os_features), matching[0])
    unnamed = [entry for entry in candidates if entry.platform is None]
    if len(unnamed) == 1 and not named:
        return unnamed[0]
    raise PlatformMissing(_why_missing(platform, named, unnamed))


def images(index: Index) -> list[Descriptor]:
    """The entries that are images or indexes of images: no attestations, no artifacts of other types."""
    known = MANIFEST_TYPES | INDEX_TYPES
    return [entry for entry in index.manifests if entry.media_type in known and not entry.is_attestation]


def platforms(index: Index) -> tuple[Platform, ...]:
    """What the index has images for, each once, in its order."""
    return tuple(dict.fromkeys(entry.platform for entry in images(index) if entry.platform is not None))


def _why_missing(platform: Platform, named: Iterable[Descriptor], unnamed: list[Descriptor]) -> str:
    there = dict.fromkeys(str(entry.platform) for entry in named)
    if there:
        return f"there is no image for {platform}; --platform takes one of: {', '.join(there)}"
    if unnamed:
        return (
            f"there are {len(unnamed)} images and none says its platform; name one by its digest: "
            + ", ".join(entry.digest for entry in unnamed)
        )
    return f"there is no image for {platform}, nor for any other platform"
