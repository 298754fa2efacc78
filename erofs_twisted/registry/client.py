"""An image in a registry (OCI distribution specification, "Pull")."""

from __future__ import annotations

import random
from collections.abc import Callable, Coroutine
from typing import TYPE_CHECKING, Any, TypeVar

import attrs
from twisted.internet.defer import Deferred
from twisted.internet.task import deferLater
from twisted.logger import Logger
from zope.interface import implementer

from erofs_twisted.interfaces import IImageStore
from erofs_twisted.registry.auth import Authorizer
from erofs_twisted.registry.blob import BlobReader
from erofs_twisted.registry.body import discard, read_body
from erofs_twisted.registry.digest import Digest
from erofs_twisted.registry.documents import DocumentFiles
from erofs_twisted.registry.errors import InvalidDigest, InvalidManifest, RegistryError, TransferFailed
from erofs_twisted.registry.keychain import Given, IKeychain
from erofs_twisted.registry.manifest import (
    ACCEPT,
    INDEX_TYPES,
    MANIFEST_TYPES,
    MAX_MANIFEST,
    Descriptor,
    ResolvedImage,
)
from erofs_twisted.registry.platform import Platform
from erofs_twisted.registry.reference import ImageReference
from erofs_twisted.registry.resolution import Document, check_content, resolve_image
from erofs_twisted.registry.retry import Backoff
from erofs_twisted.registry.session import Answer, Session
from erofs_twisted.registry.transport import Transport
from erofs_twisted.registry.urls import Origin, redacted

if TYPE_CHECKING:
    from erofs_twisted.registry.push import Artifact
    from erofs_twisted.registry.repository import Repository

ATTEMPTS = 4
"""Requests for a manifest before it is given up: at a start, somebody waits."""
PATIENCE = 15.0
"""Seconds for each of them."""

Result = TypeVar("Result")


@implementer(IImageStore)
@attrs.define(eq=False)
class RegistryStore:
    """The image ``reference``, over ``transport``.

    A registry on a loopback host is spoken to without TLS, unless it turns out to want it. What is found in
    ``documents`` is not asked for.
    """

    _reference: ImageReference
    _transport: Transport
    _keychain: IKeychain = attrs.field(factory=Given)
    _plain_http: bool = False
    _io_timeout: float = 120.0
    _documents: DocumentFiles | None = None
    _backoff: Backoff = attrs.field(factory=lambda: Backoff(random=random.random))
    _authorizer: Authorizer = attrs.field(init=False)
    _session: Session = attrs.field(init=False)
    _base: str = attrs.field(init=False)
    _log = Logger()

    def __attrs_post_init__(self) -> None:
        is_plain = self._plain_http or self._reference.is_loopback
        self._speak("http" if is_plain else "https")

    def resolve(self, platform: Platform) -> Deferred[ResolvedImage]:
        """As `IImageStore.resolve`; fails with a `RegistryError`."""
        return Deferred.fromCoroutine(self._resolve(platform))

    def blob(self, descriptor: Descriptor) -> BlobReader:
        """As `IImageStore.blob`."""

        def with_tls() -> tuple[Session, str]:
            if self._session.origin.scheme == "http":
                self._speak("https")
            return self._session, f"{self._base}/blobs/{descriptor.digest}"

        guessed = self._session.origin.scheme == "http" and not self._plain_http
        return BlobReader(
            self._session,
            f"{self._base}/blobs/{descriptor.digest}",
            descriptor,
            self._io_timeout,
            self._backoff,
            with_tls if guessed else None,
        )

    def referrers(self, subject: Digest, artifact_type: str) -> Deferred[tuple[Descriptor, ...]]:
        """As `IImageStore.referrers`; fails with a `RegistryError`."""
        return Deferred.fromCoroutine(self._referrers(subject, artifact_type))

    def fetch(self, descriptor: Descriptor) -> Deferred[bytes]:
        """As `IImageStore.fetch`; fails with a `RegistryError`."""
        return Deferred.fromCoroutine(self._fetch_small(descriptor))

    def push_referrer(self, image: ResolvedImage, artifact: Artifact) -> Deferred[Digest]:
        """As `IImageStore.push_referrer`; fails with a `RegistryError`."""
        return Deferred.fromCoroutine(self._push_referrer(image, artifact))

    def repository(self) -> Deferred[Repository]:
        """Where the image is or is to be, to push to it; close that. Fails with a `RegistryError`."""
        return Deferred.fromCoroutine(self._repository())

    def close(self) -> Deferred[None]:
        """As `IImageStore.close`. Reads that are under way are their callers' to cancel."""
        self._authorizer.close()
        return Deferred.fromCoroutine(self._transport.close())

    def _speak(self, scheme: str) -> None:
        root = f"{scheme}://{self._reference.api_authority}"
        self._base = f"{root}/v2/{self._reference.repository}"
        origin = Origin.of(root)
        scope = f"repository:{self._reference.repository}:pull"
        self._authorizer = Authorizer(self._transport, origin, scope, self._keychain)
        self._session = Session(self._transport, origin, self._authorizer, self._plain_http)

    async def _resolve(self, platform: Platform) -> ResolvedImage:
        document = await self._fetch_named()
        return await resolve_image(self._reference, platform, document, self._fetch_described)

    async def _fetch_named(self) -> Document:
        """The document that the reference names."""
        digest = self._reference.digest
        if digest is not None and (kept := await self._kept(digest)) is not None:
            return kept
        data, answer = await self._fetch(self._reference.selector)
        if digest is None:
            digest = _announced_digest(answer) or Digest.of(data)
        check_content(self._reference, data, digest, None)
        media_type = answer.response.headers.getRawHeaders("Content-Type", [""])[0]
        return await self._keep(Document(digest, media_type, data))

    async def _fetch_described(self, descriptor: Descriptor) -> Document:
        """What an index describes; the index was verified, so its word counts, not the header's."""
        if descriptor.size > MAX_MANIFEST:
            raise InvalidManifest(
                f"{self._reference}: a manifest of {descriptor.size} bytes, {MAX_MANIFEST} are allowed"
            )
        kept = await self._kept(descriptor.digest)
        data = kept.data if kept is not None else (await self._fetch(descriptor.digest))[0]
        check_content(self._reference, data, descriptor.digest, descriptor.size)
        document = Document(descriptor.digest, descriptor.media_type, data)
        return document if kept is not None else await self._keep(document)

    async def _kept(self, digest: Digest) -> Document | None:
        return None if self._documents is None else await self._documents.get(digest)

    async def _keep(self, document: Document) -> Document:
        if self._documents is not None:
            await self._documents.put(document)
        return document

    async def _fetch(self, selector: str) -> tuple[bytes, Answer]:
        return await self._persist(lambda: self._fetch_once(selector))

    async def _referrers(self, subject: Digest, artifact_type: str) -> tuple[Descriptor, ...]:
        from erofs_twisted.registry.referrers import list_referrers

        session = self._session.apart()
        try:
            return await list_referrers(session, self._base, subject, artifact_type)
        finally:
            session.close()

    async def _fetch_small(self, descriptor: Descriptor) -> bytes:
        if descriptor.size > MAX_MANIFEST:
            raise TransferFailed(f"{descriptor.digest} has {descriptor.size} bytes, more than {MAX_MANIFEST}")
        if descriptor.media_type in MANIFEST_TYPES | INDEX_TYPES:
            return (await self._fetch_described(descriptor)).data
        session = self._session.apart()
        try:
            answer = await session.get(f"{self._base}/blobs/{descriptor.digest}", {}, PATIENCE)
            if answer.response.code != 200:
                raise await session.refusal(answer, PATIENCE)
            data = await read_body(answer.response, descriptor.size, self._transport.clock, PATIENCE)
        finally:
            session.close()
        check_content(self._reference, data, descriptor.digest, descriptor.size)
        return data

    async def _push_referrer(self, image: ResolvedImage, artifact: Artifact) -> Digest:
        from erofs_twisted.registry.push import push_referrer

        data, _ = await self._fetch(image.digest)
        check_content(self._reference, data, image.digest, None)
        subject = Descriptor(image.manifest.media_type, image.digest, len(data))
        repository = await self._repository()
        try:
            return await push_referrer(repository, subject, artifact)
        finally:
            repository.close()

    async def _repository(self) -> Repository:
        from erofs_twisted.registry.repository import Repository

        if self._session.origin.scheme == "http" and not self._plain_http:
            await self._persist(self._find_scheme)
        session = self._session.apart(f"repository:{self._reference.repository}:pull,push")
        return Repository(session, self._base, self._backoff)

    async def _find_scheme(self) -> None:
        """On a loopback host: does it want TLS?"""
        root = self._base.removesuffix(self._reference.repository)
        answer = await self._transport.get(root, {}, PATIENCE)
        await discard(answer, self._transport.clock, PATIENCE)
        if answer.code == 400:
            self._speak("https")

    async def _persist(self, work: Callable[[], Coroutine[Any, Any, Result]]) -> Result:
        """Do what may fail for a while, again and again, but not for ever."""
        attempt = 0
        while True:
            try:
                return await work()
            except RegistryError as error:
                attempt += 1
                if not error.temporary or attempt == ATTEMPTS:
                    raise type(error)(f"{self._reference}: {error}", temporary=error.temporary) from error
                delay = self._backoff.delay(attempt, PATIENCE, error.retry_after)
                self._log.info("{reason}; trying again in {delay:.1f} s", reason=str(error), delay=delay)
                await deferLater(self._transport.clock, delay)

    async def _fetch_once(self, selector: str) -> tuple[bytes, Answer]:
        answer = await self._session.get(f"{self._base}/manifests/{selector}", {"Accept": ACCEPT}, PATIENCE)
        if answer.response.code == 400 and self._session.origin.scheme == "http" and not self._plain_http:
            # On a loopback host; Go's servers and nginx answer so where they want TLS.
            await discard(answer.response, self._transport.clock, PATIENCE)
            self._speak("https")
            return await self._fetch_once(selector)
        if answer.response.code != 200:
            raise await self._session.refusal(answer, PATIENCE)
        try:
            data = await read_body(answer.response, MAX_MANIFEST, self._transport.clock, PATIENCE)
        except TransferFailed as error:
            text = f"{redacted(answer.url)}: {error}"
            raise TransferFailed(text, temporary=error.temporary) from error
        return data, answer


def _announced_digest(answer: Answer) -> Digest | None:
    """What the registry says that a tag's manifest has for a digest; it need not say."""
    try:
        return Digest.parse(answer.response.headers.getRawHeaders("Docker-Content-Digest", [""])[0])
    except InvalidDigest:
        return None
