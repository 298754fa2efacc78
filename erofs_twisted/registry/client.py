"""An image in a registry (OCI distribution specification, "Pull")."""

from __future__ import annotations

import random
from collections.abc import Callable, Coroutine, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import attrs
from twisted.internet.defer import Deferred
from twisted.internet.task import deferLater
from twisted.logger import Logger
from zope.interface import implementer

from erofs_twisted.interfaces import IImageStore
from erofs_twisted.registry.blob import ELSEWHERE_TIMEOUT, STALL_TIMEOUT, BlobReader
from erofs_twisted.registry.body import discard, read_body
from erofs_twisted.registry.digest import Digest
from erofs_twisted.registry.documents import DocumentFiles
from erofs_twisted.registry.errors import (
    InvalidDigest,
    InvalidManifest,
    NoHost,
    RegistryError,
    TransferFailed,
)
from erofs_twisted.registry.host import RegistryHost
from erofs_twisted.registry.hosts import Capability
from erofs_twisted.registry.manifest import (
    ACCEPT,
    INDEX_TYPES,
    MANIFEST_TYPES,
    MAX_MANIFEST,
    Descriptor,
    ResolvedImage,
    parse_manifest,
)
from erofs_twisted.registry.platform import Platform
from erofs_twisted.registry.reference import ImageReference
from erofs_twisted.registry.resolution import Document, check_content, resolve_image
from erofs_twisted.registry.retry import Backoff
from erofs_twisted.registry.session import Answer
from erofs_twisted.registry.urls import redacted

if TYPE_CHECKING:
    from erofs_twisted.registry.probe import Probe
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
    """The image ``reference`` at ``hosts``: the registry's mirrors, in the order in which they are asked, and
    the registry itself.

    What is found in ``documents`` is not asked for.
    """

    _reference: ImageReference
    _hosts: Sequence[RegistryHost]
    _io_timeout: float = 120.0
    _stall_timeout: float = STALL_TIMEOUT
    _documents: DocumentFiles | None = None
    _backoff: Backoff = attrs.field(factory=lambda: Backoff(random=random.random))
    _log = Logger()

    @property
    def _clock(self) -> Any:
        return self._hosts[0].transport.clock

    def resolve(self, platform: Platform) -> Deferred[ResolvedImage]:
        """As `IImageStore.resolve`; fails with a `RegistryError`."""
        return Deferred.fromCoroutine(self._resolve(platform))

    def blob(self, descriptor: Descriptor) -> BlobReader:
        """As `IImageStore.blob`."""
        hosts = self._that_can(Capability.PULL)
        return BlobReader(hosts, descriptor, self._io_timeout, self._backoff, self._stall_timeout)

    def referrers(self, subject: Digest, artifact_type: str) -> Deferred[tuple[Descriptor, ...]]:
        """As `IImageStore.referrers`; fails with a `RegistryError`."""
        return Deferred.fromCoroutine(self._referrers(subject, artifact_type))

    def fetch(self, descriptor: Descriptor) -> Deferred[bytes]:
        """As `IImageStore.fetch`; fails with a `RegistryError`."""
        return Deferred.fromCoroutine(self._fetch_small(descriptor))

    def probe(self, descriptor: Descriptor) -> Deferred[Probe | None]:
        """As `IImageStore.probe`, of the first server that has it; fails with a `RegistryError`."""
        return Deferred.fromCoroutine(self._probe(descriptor))

    def push_referrer(self, image: ResolvedImage, artifact: Artifact) -> Deferred[Digest]:
        """As `IImageStore.push_referrer`; fails with a `RegistryError`."""
        return Deferred.fromCoroutine(self._push_referrer(image, artifact))

    def repository(self) -> Deferred[Repository]:
        """Where the image is or is to be, to push to it; close that. Fails with a `RegistryError`."""
        return Deferred.fromCoroutine(self._repository())

    def close(self) -> Deferred[None]:
        """As `IImageStore.close`. Reads that are under way are their callers' to cancel."""
        return Deferred.fromCoroutine(self._close())

    async def _close(self) -> None:
        for host in self._hosts:
            await host.close()

    async def _resolve(self, platform: Platform) -> ResolvedImage:
        document = await self._fetch_named()
        return await resolve_image(self._reference, platform, document, self._fetch_described)

    async def _fetch_named(self) -> Document:
        """The document that the reference names."""
        digest = self._reference.digest
        if digest is not None and (kept := await self._kept(digest)) is not None:
            return kept
        return await self._keep(await self._fetch(self._reference.selector, digest))

    async def _fetch_described(self, descriptor: Descriptor) -> Document:
        """What an index describes; the index was verified, so its word counts, not the header's."""
        if descriptor.size > MAX_MANIFEST:
            raise InvalidManifest(
                f"{self._reference}: a manifest of {descriptor.size} bytes, {MAX_MANIFEST} are allowed"
            )
        kept = await self._kept(descriptor.digest)
        found = kept or await self._fetch(descriptor.digest, descriptor.digest, descriptor.size)
        check_content(self._reference, found.data, descriptor.digest, descriptor.size)
        document = attrs.evolve(found, media_type=descriptor.media_type)
        return document if kept is not None else await self._keep(document)

    async def _kept(self, digest: Digest) -> Document | None:
        return None if self._documents is None else await self._documents.get(digest)

    async def _keep(self, document: Document) -> Document:
        if self._documents is not None:
            await self._documents.put(document)
        return document

    async def _fetch(self, selector: str, digest: Digest | None, size: int | None = None) -> Document:
        capability = Capability.RESOLVE if digest is None else Capability.PULL
        return await self._persist(capability, lambda host: self._fetch_from(host, selector, digest, size))

    async def _referrers(self, subject: Digest, artifact_type: str) -> tuple[Descriptor, ...]:
        from erofs_twisted.registry.referrers import list_referrers

        found: tuple[Descriptor, ...] = ()
        hosts = self._that_can(Capability.REFERRERS)
        for host in hosts:
            session = host.session.apart()
            try:
                found = await list_referrers(session, host.url, subject, artifact_type)
            except RegistryError as error:
                if host is hosts[-1]:
                    raise
                self._pass_over(host, error)
            finally:
                session.close()
            if found:  # a mirror may have the image, and not what was added to it
                break
        return found

    async def _fetch_small(self, descriptor: Descriptor) -> bytes:
        if descriptor.size > MAX_MANIFEST:
            raise TransferFailed(f"{descriptor.digest} has {descriptor.size} bytes, more than {MAX_MANIFEST}")
        if descriptor.media_type in MANIFEST_TYPES | INDEX_TYPES:
            return (await self._fetch_described(descriptor)).data
        return await self._of_any(Capability.PULL, lambda host: self._fetch_blob(host, descriptor))

    async def _probe(self, descriptor: Descriptor) -> Probe:
        from erofs_twisted.registry.probe import probe_blob

        return await self._of_any(Capability.PULL, lambda host: probe_blob(host, descriptor))

    async def _fetch_blob(self, host: RegistryHost, descriptor: Descriptor) -> bytes:
        session, patience = host.session.apart(), _patience(host)
        try:
            answer = await session.get(host.url(f"blobs/{descriptor.digest}"), {}, patience)
            if answer.response.code != 200:
                raise await session.refusal(answer, patience)
            data = await read_body(answer.response, descriptor.size, self._clock, patience)
        finally:
            session.close()
        check_content(self._reference, data, descriptor.digest, descriptor.size)
        return data

    async def _push_referrer(self, image: ResolvedImage, artifact: Artifact) -> Digest:
        from erofs_twisted.registry.push import push_referrer

        data = (await self._fetch(image.digest, image.digest)).data
        subject = Descriptor(image.manifest.media_type, image.digest, len(data))
        repository = await self._repository()
        try:
            return await push_referrer(repository, subject, artifact)
        finally:
            repository.close()

    async def _repository(self) -> Repository:
        from erofs_twisted.registry.repository import Repository

        async def open_repository(host: RegistryHost) -> Repository:
            await host.find_scheme()
            return Repository(host.pusher(), host.base, self._backoff)

        return await self._persist(Capability.PUSH, open_repository)

    def _that_can(self, capability: Capability) -> list[RegistryHost]:
        hosts = [host for host in self._hosts if host.can(capability)]
        if not hosts:
            raise NoHost(
                f"{self._reference}: no server may be asked to {capability.value}; see the capabilities in "
                f"the hosts.toml of {self._reference.registry}"
            )
        return hosts

    async def _of_any(
        self, capability: Capability, work: Callable[[RegistryHost], Coroutine[Any, Any, Result]]
    ) -> Result:
        """What the first server that does it comes to. A push is for the first one only."""
        able = self._that_can(capability)
        hosts = able[:1] if capability is Capability.PUSH else sorted(able, key=RegistryHost.is_down)
        for host in hosts:
            try:
                result = await work(host)
            except RegistryError as error:
                host.failed(error, self._backoff)
                if host is hosts[-1]:
                    raise
                self._pass_over(host, error)
            else:
                host.answered()
                return result
        raise AssertionError

    def _pass_over(self, host: RegistryHost, error: RegistryError) -> None:
        self._log.info("{host}: {reason}; asking another server", host=host, reason=str(error))

    async def _persist(
        self, capability: Capability, work: Callable[[RegistryHost], Coroutine[Any, Any, Result]]
    ) -> Result:
        """`_of_any`, and what may fail for a while again and again, but not for ever."""
        attempt = 0
        while True:
            try:
                return await self._of_any(capability, work)
            except RegistryError as error:
                attempt += 1
                if not error.temporary or attempt == ATTEMPTS:
                    raise type(error)(f"{self._reference}: {error}", temporary=error.temporary) from error
                delay = self._backoff.delay(attempt, PATIENCE, error.retry_after)
                self._log.info("{reason}; trying again in {delay:.1f} s", reason=str(error), delay=delay)
                await deferLater(self._clock, delay)

    async def _fetch_from(
        self, host: RegistryHost, selector: str, digest: Digest | None, size: int | None
    ) -> Document:
        """The manifest or index from one server, compared with what is known of it."""
        url, patience = host.url(f"manifests/{selector}"), _patience(host)
        answer = await host.session.get(url, {"Accept": ACCEPT}, patience)
        if host.wants_tls(answer):
            await discard(answer.response, self._clock, patience)
            return await self._fetch_from(host, selector, digest, size)
        if answer.response.code != 200:
            raise await host.session.refusal(answer, patience)
        try:
            data = await read_body(answer.response, MAX_MANIFEST, self._clock, patience)
        except TransferFailed as error:
            text = f"{redacted(answer.url)}: {error}"
            raise TransferFailed(text, temporary=error.temporary) from error
        digest = digest or _announced_digest(answer) or Digest.of(data)
        check_content(redacted(answer.url), data, digest, size)
        media_type = answer.response.headers.getRawHeaders("Content-Type", [""])[0]
        if host.is_mirror:
            parse_manifest(data, media_type)  # so that a page of its website has another server asked
        return Document(digest, media_type, data)


def _patience(host: RegistryHost) -> float:
    return ELSEWHERE_TIMEOUT if host.is_mirror else PATIENCE


def _announced_digest(answer: Answer) -> Digest | None:
    """What the registry says that a tag's manifest has for a digest; it need not say."""
    try:
        return Digest.parse(answer.response.headers.getRawHeaders("Docker-Content-Digest", [""])[0])
    except InvalidDigest:
        return None
