"""Pushing to one repository: blobs and manifests (OCI distribution specification, "Push").

A blob goes up in one piece, POST and then one PUT, as containerd and oras-go do it. That is the form that the
specification calls monolithic, and that today's registries take. Docker, skopeo and go-containerregistry send
one PATCH without a Content-Range, which the specification doesn't have, as they compress while they send and
know no digest before the end. Here the digest is known. PATCH by PATCH, as the specification has it, is what
Google's Artifact Registry refuses.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Coroutine, Mapping
from typing import Any, TypeVar

import attrs
from twisted.internet.task import deferLater
from twisted.logger import Logger
from twisted.web.iweb import IResponse

from erofs_twisted.registry.answers import status_error
from erofs_twisted.registry.body import discard
from erofs_twisted.registry.content import Content, FileContent, digest_of, sender
from erofs_twisted.registry.credentials import LOG_IN
from erofs_twisted.registry.digest import Digest
from erofs_twisted.registry.errors import (
    AccessDenied,
    DigestMismatch,
    InvalidDigest,
    InvalidManifest,
    RegistryError,
)
from erofs_twisted.registry.manifest import MAX_MANIFEST
from erofs_twisted.registry.retry import Backoff
from erofs_twisted.registry.session import Answer, Session
from erofs_twisted.registry.urls import redacted, with_parameters

ATTEMPTS = 5
"""For each blob and each manifest, from its beginning."""
PATIENCE = 60.0
"""Seconds for each request; for a blob, since the last piece that was taken."""
PAUSE = 60.0
"""Seconds, at most, that a registry is left alone before the next attempt, if that is what it asks for."""
MISSING = frozenset({404, 410})
CREATED = frozenset({200, 201, 202, 204})
CONDITION_NOT_MET = 412

Result = TypeVar("Result")


@attrs.frozen
class Repository:
    """The repository at ``base`` (``https://HOST/v2/NAME``), over a session whose tokens reach as far as
    ``repository:NAME:pull,push``. Close it.

    What fails for a while is done again from its beginning, with pauses; each method raises `RegistryError`
    after that.
    """

    session: Session
    base: str
    _backoff: Backoff = attrs.field(factory=lambda: Backoff(random=random.random))
    _log = Logger()

    def close(self) -> None:
        """Forget the tokens."""
        self.session.close()

    async def has_blob(self, digest: Digest) -> bool:
        """Is the blob there?"""
        return await self.persist(lambda: self._has_blob(digest))

    async def push_blob(self, content: Content, mount_from: str | None = None) -> Digest:
        """Push a blob, unless it is there; its digest.

        From the repository ``mount_from`` (``team/base``) of the same registry it is taken over without
        being sent, if it is there and this user may read it. A file that is not what its digest says is a
        `DigestMismatch`.
        """
        digest = digest_of(content)
        await self.persist(lambda: self._push_blob(digest, content, mount_from))
        return digest

    async def push_manifest(self, media_type: str, data: bytes, tag: str | None = None) -> Digest:
        """Push a manifest or an index, whose parts are there, under ``tag`` if there is one; its digest."""
        digest = Digest.of(data)
        await self.persist(lambda: self.put_manifest(tag or digest, media_type, data))
        return digest

    async def put_manifest(
        self, name: str, media_type: str, data: bytes, condition: Mapping[str, str] | None = None
    ) -> Answer:
        """What comes of one attempt to put a manifest under ``name``, a tag or its digest: it was done, or a
        ``condition`` (``If-Match``) was not met. The answer's body is gone."""
        if len(data) > MAX_MANIFEST:
            raise InvalidManifest(
                f"a manifest of {len(data)} bytes is too large: registries take {MAX_MANIFEST}"
            )
        headers = {"Content-Type": media_type, **(condition or {})}
        answer = await self.session.request("PUT", f"{self.base}/manifests/{name}", headers, PATIENCE, data)
        if condition and answer.response.code == CONDITION_NOT_MET:
            await self._discard(answer)
        else:
            await self._check_created(answer, Digest.of(data))
        return answer

    async def persist(self, work: Callable[[], Coroutine[Any, Any, Result]]) -> Result:
        """Do what may fail for a while, again and again, but not for ever."""
        attempt = 1
        while True:
            try:
                return await work()
            except RegistryError as error:
                if not error.temporary or attempt == ATTEMPTS:
                    raise
                delay = self._backoff.delay(attempt, 2 * PAUSE, error.retry_after)
                self._log.info("{reason}; trying again in {delay:.1f} s", reason=str(error), delay=delay)
            await deferLater(self.session.transport.clock, delay)
            attempt += 1

    async def refusal(self, answer: Answer) -> RegistryError:
        """What an answer that isn't the one wanted means, with the cure if there is one. Uses up its body."""
        error = await status_error(answer.response, answer.url, self.session.transport.clock, PATIENCE)
        if not isinstance(error, AccessDenied):
            return error
        if self.session.has_credentials:
            return AccessDenied(f"{error} (this user may not push to the repository)")
        return AccessDenied(f"{error} (to push takes a user: {LOG_IN})")

    async def _has_blob(self, digest: Digest) -> bool:
        url = f"{self.base}/blobs/{digest}"
        answer = await self.session.request("HEAD", url, {}, PATIENCE)
        if answer.response.code in (405, 501) or (answer.redirected and answer.response.code != 200):
            # Not every registry knows HEAD, and a URL that is signed for GET is no good for it.
            await self._discard(answer)
            answer = await self.session.get(url, {"Range": "bytes=0-0"}, PATIENCE)
        code = answer.response.code
        if code not in MISSING | {200, 206, 416}:
            raise await self.refusal(answer)
        await self._discard(answer)
        return code not in MISSING

    async def _push_blob(self, digest: Digest, content: Content, mount_from: str | None) -> None:
        if await self._has_blob(digest):
            return
        begun = None if mount_from is None else await self._mount(digest, mount_from)
        if begun is None:
            begun = await self.session.request("POST", f"{self.base}/blobs/uploads/", {}, PATIENCE)
        if begun.response.code == 201 and mount_from is not None:
            await self._check_created(begun, digest)
            return
        if begun.response.code != 202:
            raise await self.refusal(begun)
        await self._discard(begun)
        # It says where to go on: at a path, or at another host, where no authorization goes.
        url = with_parameters(self.session.location(begun.response, begun.url), [("digest", digest)])
        body = sender(content, self.session.transport.clock, PATIENCE)
        headers = {"Content-Type": "application/octet-stream"}
        answer = await self.session.request("PUT", url, headers, PATIENCE, body)
        try:
            await self._check_created(answer, digest)
        except RegistryError as error:
            if answer.response.code == 400 and "DIGEST_INVALID" in str(error):
                raise DigestMismatch(f"{_named(content, digest)}: {error}") from error
            raise

    async def _mount(self, digest: Digest, source: str) -> Answer | None:
        """The answer to an attempt at taking the blob over, 201, or 202 where an upload is to follow; None
        where the registry will have none of it."""
        session = self.session.apart(f"repository:{source}:pull")
        url = with_parameters(f"{self.base}/blobs/uploads/", [("mount", digest), ("from", source)])
        try:
            answer = await session.request("POST", url, {}, PATIENCE)
            if answer.response.code in (201, 202):
                return answer
            error = await self.refusal(answer)
        except RegistryError as refused:
            error = refused
        finally:
            session.close()
        if error.temporary:
            raise error
        self._log.info("nothing can be taken over from {source}: {reason}", source=source, reason=str(error))
        return None

    async def _check_created(self, answer: Answer, digest: Digest) -> None:
        """The registry has it, and calls it by the same name."""
        if answer.response.code not in CREATED:
            raise await self.refusal(answer)
        await self._discard(answer)
        named = _announced(answer.response)
        if named is not None and named.algorithm == digest.algorithm and named != digest:
            raise DigestMismatch(
                f"{redacted(answer.url)}: the registry got {named} where {digest} was pushed"
            )

    async def _discard(self, answer: Answer) -> None:
        await discard(answer.response, self.session.transport.clock, PATIENCE)


def _named(content: Content, digest: Digest) -> str:
    if isinstance(content, FileContent):
        return f"{content.name} is no longer what the digest {digest} was taken of; take it again"
    return f"{digest} did not arrive as it was sent"


def _announced(response: IResponse) -> Digest | None:
    """The digest by which the registry calls what it got; it need not say."""
    try:
        return Digest.parse(response.headers.getRawHeaders("Docker-Content-Digest", [""])[0])
    except InvalidDigest:
        return None
