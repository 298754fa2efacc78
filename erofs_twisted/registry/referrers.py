"""What refers to a manifest (OCI distribution specification, "Listing Referrers").

A registry without that API has the same list as an index under a tag made of the digest ("Unavailable
Referrers API").
"""

from __future__ import annotations

import re

from twisted.web.iweb import IResponse

from erofs_twisted.registry.body import discard, read_body
from erofs_twisted.registry.digest import Digest
from erofs_twisted.registry.errors import InvalidHeader, InvalidManifest
from erofs_twisted.registry.manifest import MAX_MANIFEST, OCI_INDEX, Descriptor, Index, parse_manifest
from erofs_twisted.registry.session import Answer, Session
from erofs_twisted.registry.urls import redacted, resolve_location, with_parameters

PATIENCE = 15.0
"""Seconds for each request."""
MAX_PAGES = 4
MISSING = frozenset({404, 410})
UNAVAILABLE = MISSING | {400, 405, 406, 501}
"""How registries say that they have no such API; the specification knows only 404."""

_NEXT = re.compile(r'<([^>]*)>\s*;(?:[^,]*;)?\s*rel="?next"?')


def fallback_tag(subject: Digest) -> str:
    """The tag of a manifest's referrers, in a registry that has no other list of them."""
    return f"{subject.algorithm[:32]}-{subject.encoded[:64]}"


async def list_referrers(
    session: Session, base: str, subject: Digest, artifact_type: str
) -> tuple[Descriptor, ...]:
    """The manifests of ``artifact_type`` in the repository at ``base`` that refer to ``subject``.

    In the registry's order; that they do is its word, and not checked. Raises `RegistryError`.
    """
    url = with_parameters(f"{base}/referrers/{subject}", [("artifactType", artifact_type)])
    listed: list[Descriptor] = []
    for page in range(MAX_PAGES):
        answer = await session.get(url, {"Accept": OCI_INDEX}, PATIENCE)
        if page == 0 and answer.response.code in UNAVAILABLE:
            await discard(answer.response, session.transport.clock, PATIENCE)
            return _of_type(await _tagged(session, base, subject), artifact_type)
        if answer.response.code != 200:
            raise await session.refusal(answer, PATIENCE)
        try:
            listed += (await _index(session, answer)).manifests
        except InvalidManifest:
            # A page of a website, or what else is served by those who don't know the API.
            return _of_type(await _tagged(session, base, subject), artifact_type)
        following = _next_page(answer.response, answer.url)
        if following is None:
            break
        url = following
    return _of_type(listed, artifact_type)


async def _tagged(session: Session, base: str, subject: Digest) -> tuple[Descriptor, ...]:
    answer = await session.get(f"{base}/manifests/{fallback_tag(subject)}", {"Accept": OCI_INDEX}, PATIENCE)
    if answer.response.code in MISSING:
        await discard(answer.response, session.transport.clock, PATIENCE)
        return ()
    if answer.response.code != 200:
        raise await session.refusal(answer, PATIENCE)
    return (await _index(session, answer)).manifests


async def _index(session: Session, answer: Answer) -> Index:
    data = await read_body(answer.response, MAX_MANIFEST, session.transport.clock, PATIENCE)
    index = parse_manifest(data, answer.response.headers.getRawHeaders("Content-Type", [""])[0])
    if not isinstance(index, Index):
        raise InvalidManifest(f"{redacted(answer.url)} is an image, where an index of referrers should be")
    return index


def _of_type(listed: tuple[Descriptor, ...] | list[Descriptor], artifact_type: str) -> tuple[Descriptor, ...]:
    """A registry need not filter, nor say whether it did."""
    return tuple(entry for entry in listed if entry.artifact_type == artifact_type)


def _next_page(response: IResponse, url: str) -> str | None:
    """Where a list goes on (RFC 8288); None at its end."""
    match = _NEXT.search(", ".join(response.headers.getRawHeaders("Link", [])))
    if match is None:
        return None
    try:
        return resolve_location(url, match[1])
    except InvalidHeader:
        return None
