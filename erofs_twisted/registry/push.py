"""Pushing an artifact that refers to an image (OCI distribution specification, "Push")."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import attrs

from erofs_twisted.registry.answers import status_error
from erofs_twisted.registry.body import discard, read_body
from erofs_twisted.registry.credentials import LOG_IN
from erofs_twisted.registry.digest import Digest
from erofs_twisted.registry.errors import AccessDenied, InvalidManifest, RegistryError, TransferFailed
from erofs_twisted.registry.manifest import (
    MAX_MANIFEST,
    OCI_INDEX,
    OCI_MANIFEST,
    Descriptor,
    Index,
    load_object,
    parse_manifest,
)
from erofs_twisted.registry.referrers import MISSING, fallback_tag
from erofs_twisted.registry.session import Answer, Session
from erofs_twisted.registry.urls import redacted, with_parameters

PATIENCE = 60.0
"""Seconds for each request: a registry may have to copy what it was sent."""
EMPTY = b"{}"
EMPTY_TYPE = "application/vnd.oci.empty.v1+json"
"""The configuration of what has none (OCI image specification, "Guidance for an Empty Descriptor")."""
DONE = frozenset({200, 201, 202, 204})
CONDITION_NOT_MET = 412
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


async def push_referrer(session: Session, base: str, subject: Descriptor, artifact: Artifact) -> Digest:
    """Push ``artifact`` to the repository at ``base``, where ``subject`` is; the digest of its manifest.

    Where the registry doesn't keep the list of referrers, it is kept here. What is there already is not made
    twice. Raises `RegistryError`.
    """
    for content in (EMPTY, artifact.content):
        await push_blob(session, base, content)
    manifest = artifact.manifest(subject)
    digest = Digest.of(manifest)
    answer = await _put(session, f"{base}/manifests/{digest}", OCI_MANIFEST, manifest)
    if not answer.response.headers.hasHeader("OCI-Subject"):
        entry = _describe(OCI_MANIFEST, manifest)
        entry |= {"artifactType": artifact.media_type, "annotations": dict(artifact.annotations)}
        await _enlist(session, f"{base}/manifests/{fallback_tag(subject.digest)}", entry)
    return digest


async def push_blob(session: Session, base: str, content: bytes) -> Digest:
    """Push a blob, in one piece. Raises `RegistryError`."""
    digest = Digest.of(content)
    begun = await _ask(session, "POST", f"{base}/blobs/uploads/", {}, b"")
    if begun.response.code != 202:
        raise await _refusal(session, begun)
    await discard(begun.response, session.transport.clock, PATIENCE)
    url = with_parameters(session.location(begun.response, begun.url), [("digest", digest)])
    await _put(session, url, "application/octet-stream", content)
    return digest


async def _enlist(session: Session, url: str, entry: Mapping[str, Any]) -> None:
    """Add ``entry`` to the index at ``url``, or make that."""
    for _ in range(COLLISIONS):
        index, condition = await _read_list(session, url)
        if any(listed.get("digest") == entry["digest"] for listed in index["manifests"]):
            return
        index["manifests"].append(entry)
        data = json.dumps(index, indent=2).encode()
        if len(data) > MAX_MANIFEST:
            raise InvalidManifest(f"{redacted(url)}: this list of referrers is full; delete some of them")
        answer = await _put(session, url, OCI_INDEX, data, condition)
        if answer.response.code != CONDITION_NOT_MET:
            return
    raise TransferFailed(f"{redacted(url)}: others change it all the time", temporary=True)


async def _read_list(session: Session, url: str) -> tuple[dict[str, Any], Mapping[str, str]]:
    """The index as it is, and the header by which it is replaced only if nobody did so before."""
    answer = await _ask(session, "GET", url, {"Accept": OCI_INDEX}, b"")
    if answer.response.code in MISSING:
        await discard(answer.response, session.transport.clock, PATIENCE)
        fresh = {"schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": []}
        return fresh, {"If-None-Match": "*"}
    if answer.response.code != 200:
        raise await _refusal(session, answer)
    headers = answer.response.headers
    data = await read_body(answer.response, MAX_MANIFEST, session.transport.clock, PATIENCE)
    if not isinstance(parse_manifest(data, headers.getRawHeaders("Content-Type", [""])[0]), Index):
        raise InvalidManifest(
            f"{redacted(url)} is not a list of referrers; delete that tag, or push to a registry that has "
            "the referrers API"
        )
    etag = headers.getRawHeaders("ETag", [""])[0]
    strong = etag and not etag.startswith("W/")
    return dict(load_object(data)), {"If-Match": etag} if strong else {}


async def _put(
    session: Session,
    url: str,
    content_type: str,
    content: bytes,
    condition: Mapping[str, str] | None = None,
) -> Answer:
    """What comes of a PUT: it was done, or a ``condition`` was not met."""
    answer = await _ask(session, "PUT", url, {"Content-Type": content_type, **(condition or {})}, content)
    if answer.response.code not in DONE and not (condition and answer.response.code == CONDITION_NOT_MET):
        raise await _refusal(session, answer)
    await discard(answer.response, session.transport.clock, PATIENCE)
    return answer


async def _ask(session: Session, method: str, url: str, headers: Mapping[str, str], body: bytes) -> Answer:
    return await session.request(method, url, headers, PATIENCE, body)


async def _refusal(session: Session, answer: Answer) -> RegistryError:
    error = await status_error(answer.response, answer.url, session.transport.clock, PATIENCE)
    if not isinstance(error, AccessDenied):
        return error
    if session.has_credentials:
        return AccessDenied(f"{error} (this user may not push to the repository)")
    return AccessDenied(f"{error} (to push takes a user: {LOG_IN})")


def _describe(media_type: str, content: bytes) -> dict[str, Any]:
    return {"mediaType": media_type, "digest": Digest.of(content), "size": len(content)}
