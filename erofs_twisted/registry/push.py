"""Pushing an artifact that refers to an image (OCI distribution specification, "Push")."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import attrs

from erofs_twisted.registry.body import discard, read_body
from erofs_twisted.registry.digest import Digest
from erofs_twisted.registry.errors import InvalidManifest, TransferFailed
from erofs_twisted.registry.manifest import (
    MAX_MANIFEST,
    OCI_INDEX,
    OCI_MANIFEST,
    Descriptor,
    Index,
    load_object,
    parse_manifest,
)
from erofs_twisted.registry.referrers import fallback_tag
from erofs_twisted.registry.repository import CONDITION_NOT_MET, MISSING, PATIENCE, Repository
from erofs_twisted.registry.urls import redacted

EMPTY = b"{}"
EMPTY_TYPE = "application/vnd.oci.empty.v1+json"
"""The configuration of what has none (OCI image specification, "Guidance for an Empty Descriptor")."""
COLLISIONS = 3
"""How often somebody else may change a list while it is changed here."""


@attrs.frozen
class Artifact:
    """One piece of content; ``media_type`` is its own, and the type of the artifact."""

    media_type: str
    content: bytes
    annotations: Mapping[str, str] = attrs.field(factory=dict)

    def manifest(self, subject: Descriptor) -> bytes:
        """The manifest that makes the content an artifact which refers to ``subject``."""
        fields = {
            "schemaVersion": 2,
            "mediaType": OCI_MANIFEST,
            "artifactType": self.media_type,
            "config": _describe(EMPTY_TYPE, EMPTY),
            "layers": [_describe(self.media_type, self.content)],
            "subject": {"mediaType": subject.media_type, "digest": subject.digest, "size": subject.size},
            "annotations": dict(self.annotations),
        }
        return json.dumps(fields, indent=2).encode()


async def push_referrer(repository: Repository, subject: Descriptor, artifact: Artifact) -> Digest:
    """Push ``artifact`` to the repository, where ``subject`` is; the digest of its manifest.

    Where the registry doesn't keep the list of referrers, it is kept here. What is there already is not made
    twice. Raises `RegistryError`.
    """
    for content in (EMPTY, artifact.content):
        await repository.push_blob(content)
    manifest = artifact.manifest(subject)
    digest = Digest.of(manifest)
    answer = await repository.persist(lambda: repository.put_manifest(digest, OCI_MANIFEST, manifest))
    if not answer.response.headers.hasHeader("OCI-Subject"):
        entry = _describe(OCI_MANIFEST, manifest)
        entry |= {"artifactType": artifact.media_type, "annotations": dict(artifact.annotations)}
        await repository.persist(lambda: _enlist(repository, fallback_tag(subject.digest), entry))
    return digest


async def _enlist(repository: Repository, tag: str, entry: Mapping[str, Any]) -> None:
    """Add ``entry`` to the index under ``tag``, or make that."""
    url = redacted(f"{repository.base}/manifests/{tag}")
    for _ in range(COLLISIONS):
        index, condition = await _read_list(repository, tag)
        if any(listed.get("digest") == entry["digest"] for listed in index["manifests"]):
            return
        index["manifests"].append(entry)
        data = json.dumps(index, indent=2).encode()
        if len(data) > MAX_MANIFEST:
            raise InvalidManifest(f"{url}: this list of referrers is full; delete some of them")
        answer = await repository.put_manifest(tag, OCI_INDEX, data, condition)
        if answer.response.code != CONDITION_NOT_MET:
            return
    raise TransferFailed(f"{url}: others change it all the time", temporary=True)


async def _read_list(repository: Repository, tag: str) -> tuple[dict[str, Any], Mapping[str, str]]:
    """The index as it is, and the header by which it is replaced only if nobody did so before."""
    clock, url = repository.session.transport.clock, f"{repository.base}/manifests/{tag}"
    answer = await repository.session.get(url, {"Accept": OCI_INDEX}, PATIENCE)
    if answer.response.code in MISSING:
        await discard(answer.response, clock, PATIENCE)
        fresh = {"schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": []}
        return fresh, {"If-None-Match": "*"}
    if answer.response.code != 200:
        raise await repository.refusal(answer)
    headers = answer.response.headers
    data = await read_body(answer.response, MAX_MANIFEST, clock, PATIENCE)
    if not isinstance(parse_manifest(data, headers.getRawHeaders("Content-Type", [""])[0]), Index):
        raise InvalidManifest(
            f"{redacted(url)} is not a list of referrers; delete that tag, or push to a registry that has "
            "the referrers API"
        )
    etag = headers.getRawHeaders("ETag", [""])[0]
    strong = etag and not etag.startswith("W/")
    return dict(load_object(data)), {"If-Match": etag} if strong else {}


def _describe(media_type: str, content: bytes) -> dict[str, Any]:
    return {"mediaType": media_type, "digest": Digest.of(content), "size": len(content)}
