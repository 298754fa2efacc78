"""Manifests and indexes, OCI's and Docker's, read from JSON that anyone may have written."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

import attrs

from erofs_twisted.registry.digest import Digest
from erofs_twisted.registry.errors import InvalidDigest, InvalidManifest
from erofs_twisted.registry.platform import Platform
from erofs_twisted.registry.reference import ImageReference, LayoutReference

OCI_MANIFEST = "application/vnd.oci.image.manifest.v1+json"
OCI_INDEX = "application/vnd.oci.image.index.v1+json"
DOCKER_MANIFEST = "application/vnd.docker.distribution.manifest.v2+json"
DOCKER_INDEX = "application/vnd.docker.distribution.manifest.list.v2+json"
MANIFEST_TYPES = frozenset({OCI_MANIFEST, DOCKER_MANIFEST})
INDEX_TYPES = frozenset({OCI_INDEX, DOCKER_INDEX})
ACCEPT = ", ".join((OCI_MANIFEST, OCI_INDEX, DOCKER_MANIFEST, DOCKER_INDEX))
SCHEMA1_TYPES = frozenset(
    {
        "application/vnd.docker.distribution.manifest.v1+json",
        "application/vnd.docker.distribution.manifest.v1+prettyjws",
    }
)
UNSPECIFIC_TYPES = frozenset({"", "application/json", "application/octet-stream", "text/plain"})
"""What servers say that know no better; then the document speaks for itself."""

MAX_MANIFEST = 4 * 1024 * 1024
"""Bytes: what the distribution specification has registries accept."""

MAX_SIZE = 2**63 - 1
REFERENCE_TYPE = "vnd.docker.reference.type"
_MEDIA_TYPE = re.compile(r"[A-Za-z0-9][A-Za-z0-9!#$&^_.+-]{0,126}/[A-Za-z0-9][A-Za-z0-9!#$&^_.+-]{0,126}")
_PLATFORM_PART = re.compile(r"[A-Za-z0-9_.-]+")


@attrs.frozen
class Descriptor:
    """What a piece of content is, and how to name it (OCI image specification, "Content Descriptors").

    ``platform``, ``os_features`` and ``artifact_type`` are there in an index only.
    """

    media_type: str
    digest: Digest
    size: int
    annotations: Mapping[str, str] = attrs.field(factory=dict)
    platform: Platform | None = None
    os_features: frozenset[str] = frozenset()
    artifact_type: str = ""

    @property
    def is_attestation(self) -> bool:
        """Is this what BuildKit says about an image, which stands beside the images in an index?"""
        platform = self.platform
        unknown = platform is not None and "unknown" in (platform.os, platform.architecture)
        return unknown or REFERENCE_TYPE in self.annotations


@attrs.frozen
class Manifest:
    """One image: its configuration, and its layers, the lowest first.

    Or an artifact: what it is says ``artifact_type``, and what it belongs to ``subject``, if anything.
    """

    media_type: str
    config: Descriptor
    layers: tuple[Descriptor, ...]
    annotations: Mapping[str, str] = attrs.field(factory=dict)
    artifact_type: str = ""
    subject: Descriptor | None = None


@attrs.frozen
class Index:
    """The same image for several platforms."""

    media_type: str
    manifests: tuple[Descriptor, ...]
    annotations: Mapping[str, str] = attrs.field(factory=dict)


@attrs.frozen
class ResolvedImage:
    """What a reference means today, for one platform.

    ``digest`` is the manifest's. Where an index led to it, ``index_digest`` is the outermost one's,
    ``platform`` what that said of this manifest, if anything, and ``platforms`` all that are on offer.
    """

    reference: ImageReference | LayoutReference
    digest: Digest
    manifest: Manifest
    index_digest: Digest | None = None
    platform: Platform | None = None
    platforms: tuple[Platform, ...] = ()

    @property
    def config(self) -> Descriptor:
        return self.manifest.config

    @property
    def layers(self) -> tuple[Descriptor, ...]:
        """The layers, the lowest first."""
        return self.manifest.layers

    @property
    def annotations(self) -> Mapping[str, str]:
        return self.manifest.annotations


def parse_manifest(data: bytes, media_type: str = "") -> Manifest | Index:
    """Read a manifest or an index. ``media_type`` is what its sender or its descriptor says it is.

    Raises `InvalidManifest`, also where the two disagree, or where a document could be read as either.
    """
    document = _Node(_load(data), "")
    declared = media_type.partition(";")[0].strip().lower()
    kind = _kind(document, declared)
    if kind in INDEX_TYPES:
        manifests = tuple(_descriptor(entry) for entry in document.children("manifests"))
        return Index(kind, manifests, document.annotations())
    layers = tuple(_descriptor(entry) for entry in document.children("layers"))
    config = _descriptor(document.child("config"))
    artifact_type = document.text("artifactType", default="")
    subject = _descriptor(document.child("subject")) if document.value.get("subject") is not None else None
    return Manifest(kind, config, layers, document.annotations(), artifact_type, subject)


def load_object(data: bytes) -> Mapping[str, Any]:
    """A JSON object, its values not checked. Raises `InvalidManifest`."""
    return _Node(_load(data), "").value


def _load(data: bytes) -> Any:
    if len(data) > MAX_MANIFEST:
        raise InvalidManifest(f"it has {len(data)} bytes, more than the {MAX_MANIFEST} that are allowed")
    try:
        return json.loads(data)
    except (ValueError, RecursionError) as error:
        raise InvalidManifest(f"it is not JSON: {error}") from error


def _kind(document: _Node, declared: str) -> str:
    """The media type that a document is read as."""
    version = document.value.get("schemaVersion")
    if declared in SCHEMA1_TYPES or (version == 1 and "fsLayers" in document.value):
        raise InvalidManifest(
            "it is a Docker schema 1 manifest, long given up; push the image again with a current tool"
        )
    if version != 2 or isinstance(version, bool):
        raise InvalidManifest(f"its schemaVersion is {version!r:.40}, not 2")
    own = document.text("mediaType", default="").lower()
    if own and declared not in UNSPECIFIC_TYPES and own != declared:
        raise InvalidManifest(f"it was sent as {declared:.100} but calls itself {own:.100}")
    kind = own or ("" if declared in UNSPECIFIC_TYPES else declared)
    is_index, is_manifest = "manifests" in document.value, "layers" in document.value
    if is_index and is_manifest:
        raise InvalidManifest("it has both layers and manifests, so it could be read in two ways")
    if not kind:
        kind = OCI_INDEX if is_index else OCI_MANIFEST
    if kind not in MANIFEST_TYPES | INDEX_TYPES:
        raise InvalidManifest(f"its media type is {kind:.100}, which is neither an image nor an index")
    return kind


def _descriptor(node: _Node) -> Descriptor:
    media_type = node.text("mediaType")
    if not _MEDIA_TYPE.fullmatch(media_type):
        raise InvalidManifest(f"{node.path}.mediaType is {media_type!r:.100}, which is not a media type")
    try:
        digest = Digest.parse(node.text("digest"))
    except InvalidDigest as error:
        raise InvalidManifest(f"{node.path}.digest: {error}") from error
    platform, features = _platform(node)
    artifact_type = node.text("artifactType", default="")
    return Descriptor(
        media_type, digest, node.size("size"), node.annotations(), platform, features, artifact_type
    )


def _platform(node: _Node) -> tuple[Platform | None, frozenset[str]]:
    if node.value.get("platform") is None:
        return None, frozenset()
    platform = node.child("platform")
    parts = [platform.text("os"), platform.text("architecture"), platform.text("variant", default="")]
    if not all(_PLATFORM_PART.fullmatch(part) for part in parts if part):
        shown = "/".join(filter(None, parts))
        raise InvalidManifest(f"{platform.path} is {shown!r:.100}, which is not a platform")
    features = platform.value.get("os.features") or []
    if not isinstance(features, list) or not all(isinstance(feature, str) for feature in features):
        raise InvalidManifest(f"{platform.path}['os.features'] is not a list of strings")
    # An empty os or architecture is what some tools write beside artifacts: no platform at all.
    named = Platform.normalised(*parts) if parts[0] and parts[1] else None
    return named, frozenset(features)


class _Node:
    """An object of a JSON document and the path that leads to it, for errors."""

    def __init__(self, value: Any, path: str) -> None:
        if not isinstance(value, dict):
            raise InvalidManifest(f"{path or 'it'} is not a JSON object")
        self.value: dict[str, Any] = value
        self.path = path

    def _name(self, key: str) -> str:
        return f"{self.path}.{key}" if self.path else key

    def child(self, key: str) -> _Node:
        return _Node(self.value.get(key), self._name(key))

    def children(self, key: str) -> list[_Node]:
        value = self.value.get(key)
        if not isinstance(value, list):
            raise InvalidManifest(f"{self._name(key)} is not a list")
        return [_Node(entry, f"{self._name(key)}[{index}]") for index, entry in enumerate(value)]

    def text(self, key: str, default: str | None = None) -> str:
        value = self.value.get(key)
        if value is None and default is not None:
            return default
        if not isinstance(value, str):
            raise InvalidManifest(f"{self._name(key)} is not a string")
        return value

    def size(self, key: str) -> int:
        value = self.value.get(key)
        if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= MAX_SIZE:
            raise InvalidManifest(f"{self._name(key)} is {value!r:.40}, not a number of bytes")
        return value

    def annotations(self) -> dict[str, str]:
        value = self.value.get("annotations")
        if value is None:
            return {}
        if not isinstance(value, dict) or not all(isinstance(text, str) for text in value.values()):
            raise InvalidManifest(f"{self._name('annotations')} is not an object of strings")
        return value
