"""What refers to a manifest (OCI distribution specification, "Listing Referrers").

A registry without that API has the same list as an index under a tag made of the digest ("Unavailable
Referrers API").
"""

from __future__ import annotations

from collections.abc import Callable

from erofs_twisted.registry.body import discard, read_body
from erofs_twisted.registry.digest import Digest
from erofs_twisted.registry.errors import InvalidManifest, TransferFailed
from erofs_twisted.registry.link import next_target
from erofs_twisted.registry.manifest import MAX_MANIFEST, OCI_INDEX, Descriptor, Index, parse_manifest
from erofs_twisted.registry.session import Answer, Session
from erofs_twisted.registry.urls import redacted, with_parameters

PATIENCE = 15.0
"""Seconds for each request."""
MAX_PAGES = 64
"""Registries give 50 to 1,000 entries a page, and an image that is signed each night has hundreds."""
MAX_LIST = 16 * 1024 * 1024
"""Bytes of all pages: about 40,000 entries."""
MISSING = frozenset({404, 410})
UNAVAILABLE = MISSING | {400, 405, 406, 501}
"""How registries say that they have no such API; the specification knows only 404."""


def fallback_tag(subject: Digest) -> str:
    """The tag of a manifest's referrers, in a registry that has no other list of them."""
    return f"{subject.algorithm[:32]}-{subject.encoded[:64]}"


async def list_referrers(
    session: Session, url_of: Callable[[str], str], subject: Digest, artifact_type: str
) -> tuple[Descriptor, ...]:
    """The manifests of ``artifact_type`` that refer to ``subject``, in the repository whose paths ``url_of``
    makes URLs.

    In the registry's order; that they do is its word, and not checked. All of them, or an error: a list that
    breaks off, or that has more than `MAX_PAGES` pages or `MAX_LIST` bytes, is none. Raises `RegistryError`.
    """
    url = with_parameters(url_of(f"referrers/{subject}"), [("artifactType", artifact_type)])
    answer = await session.get(url, {"Accept": OCI_INDEX}, PATIENCE)
    if answer.response.code in UNAVAILABLE:
        await discard(answer.response, session.transport.clock, PATIENCE)
        return _of_type(await _tagged(session, url_of, subject), artifact_type)
    try:
        index, left = await _index(session, answer, MAX_LIST)
    except InvalidManifest:
        # A page of a website, or what else is served by those who don't know the API.
        return _of_type(await _tagged(session, url_of, subject), artifact_type)
    listed = _of_type(index.manifests, artifact_type)
    pages = 1
    while (target := next_target(answer.response.headers.getRawHeaders("Link", []))) is not None:
        if pages == MAX_PAGES:
            raise TransferFailed(f"{redacted(url)}: this list of referrers has more than {MAX_PAGES} pages")
        # Another host's page is asked for without credentials, as everything from there is.
        answer = await session.get(session.resolve(answer.url, target), {"Accept": OCI_INDEX}, PATIENCE)
        index, left = await _index(session, answer, left)
        listed += _of_type(index.manifests, artifact_type)
        pages += 1
    return listed


async def _tagged(session: Session, url_of: Callable[[str], str], subject: Digest) -> tuple[Descriptor, ...]:
    url = url_of(f"manifests/{fallback_tag(subject)}")
    answer = await session.get(url, {"Accept": OCI_INDEX}, PATIENCE)
    if answer.response.code in MISSING:
        await discard(answer.response, session.transport.clock, PATIENCE)
        return ()
    index, _ = await _index(session, answer, MAX_LIST)
    return index.manifests


async def _index(session: Session, answer: Answer, left: int) -> tuple[Index, int]:
    """A page, and how many of the ``left`` bytes are left for others."""
    if answer.response.code != 200:
        raise await session.refusal(answer, PATIENCE)
    data = await read_body(answer.response, min(MAX_MANIFEST, left), session.transport.clock, PATIENCE)
    index = parse_manifest(data, answer.response.headers.getRawHeaders("Content-Type", [""])[0])
    if not isinstance(index, Index):
        raise InvalidManifest(f"{redacted(answer.url)} is an image, where an index of referrers should be")
    return index, left - len(data)


def _of_type(listed: tuple[Descriptor, ...], artifact_type: str) -> tuple[Descriptor, ...]:
    """A registry need not filter, nor say whether it did."""
    return tuple(entry for entry in listed if entry.artifact_type == artifact_type)
