"""Recording the first reads of an image, and finding and publishing what was recorded.

A trace travels as an OCI artifact of the type `MEDIA_TYPE` that refers to the image's manifest: its one layer
is the trace, its annotations say of which layer and when it was recorded.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from typing import Any

import attrs
from twisted.internet.defer import Deferred, DeferredLock
from twisted.logger import Logger
from twisted.python.threadpool import ThreadPool
from zope.interface import implementer

from erofs_twisted.blocks.trace import MAX_ENCODED, MEDIA_TYPE, InvalidTrace, Recorder, Trace
from erofs_twisted.blocks.tracefile import TraceFiles
from erofs_twisted.errors import ErofsTwistedError
from erofs_twisted.interfaces import IExport, IImageStore, Segment
from erofs_twisted.registry.digest import Digest
from erofs_twisted.registry.manifest import (
    MANIFEST_TYPES,
    Descriptor,
    Manifest,
    ResolvedImage,
    parse_manifest,
)
from erofs_twisted.syscalls import in_thread

SAVE_SECONDS = 3.0
"""How much of a recording a crash may cost."""
LAYER_ANNOTATION = "vnd.erofs-twisted.trace.layer"
CREATED_ANNOTATION = "org.opencontainers.image.created"
MAX_CANDIDATES = 4
"""Traces that are looked at: beyond these, an image has been given others to lead us astray."""
MAX_ARTIFACT_MANIFEST = 64 * 1024

_log = Logger()


@implementer(IExport)
@attrs.define
class TracingExport:
    """An export of a blob whose first reads are recorded, and which is else the one below it."""

    below: IExport
    recorder: Recorder
    name: str = attrs.field(init=False)
    description: str = attrs.field(init=False)
    size: int = attrs.field(init=False)

    def __attrs_post_init__(self) -> None:
        self.name, self.description, self.size = self.below.name, self.below.description, self.below.size

    def read(self, offset: int, length: int) -> list[Segment] | Deferred[list[Segment]]:
        # Behind the blob are the zeros that make it whole blocks.
        within = min(length, self.recorder.size - offset)
        if within > 0:
            self.recorder.read(offset, within)
        return self.below.read(offset, length)

    def prefetch(self, offset: int, length: int) -> Deferred[None]:
        return self.below.prefetch(offset, length)

    def extents(self, offset: int, length: int) -> list[tuple[int, bool]]:
        return self.below.extents(offset, length)


class Recording:
    """Writes down the first reads of a blob, now and then, and at the end."""

    def __init__(self, reactor: Any, pool: ThreadPool, files: TraceFiles, digest: str, size: int) -> None:
        self._reactor = reactor
        self._pool = pool
        self._files = files
        self._recorder = Recorder(digest, size)
        self._saved = self._recorder.version
        self._said = False
        self._saving = DeferredLock()
        self._timer = reactor.callLater(SAVE_SECONDS, self._tick)

    def of(self, export: IExport) -> TracingExport:
        """The export of the blob, to be read through this one."""
        return TracingExport(export, self._recorder)

    async def close(self) -> None:
        """Write down the end of it. Call it once."""
        self._timer.cancel()
        await self._save()
        trace = self._recorder.trace()
        _log.info(
            "recorded the first reads of {digest}: {length} bytes in {count} ranges",
            digest=trace.digest,
            length=trace.length,
            count=len(trace.ranges),
        )

    def _tick(self) -> None:
        self._timer = self._reactor.callLater(SAVE_SECONDS, self._tick)
        if not self._saving.locked:
            _ = Deferred.fromCoroutine(self._save()).addErrback(
                lambda failure: _log.failure("writing a trace broke", failure)
            )

    async def _save(self) -> None:
        async with self._saving:
            version = self._recorder.version
            if version == self._saved:
                return
            trace = self._recorder.trace()
            try:
                await in_thread(self._reactor, self._pool, self._files.save, trace)
            except OSError as error:
                if not self._said:
                    path = self._files.path(trace.digest)
                    _log.warn("the trace {path} cannot be kept: {reason}", path=path, reason=str(error))
                self._said = True
            else:
                self._saved = version


async def find_trace(
    store: IImageStore, cache_dir: str, resolved: ResolvedImage, layer: Descriptor, *, ask: bool = True
) -> Trace | None:
    """The trace of a layer: the one in the cache; else, if we are to ``ask``, the newest that refers to the
    image in ``store``, which is kept in the cache then. Where none can be had, that is said in the log, and
    no error."""
    files = TraceFiles(cache_dir)
    local = files.load(layer.digest, layer.size)
    if local is not None or not ask:
        return local
    try:
        trace = await _find_referrer(store, resolved, layer)
    except ErofsTwistedError as error:
        _log.info("no trace of {digest} can be had: {reason}", digest=layer.digest, reason=str(error))
        return None
    if trace is not None:
        try:
            files.save(trace, durable=False)
        except OSError as error:
            _log.info("the trace of {digest} is not kept: {reason}", digest=layer.digest, reason=str(error))
    return trace


async def publish_trace(
    store: IImageStore, resolved: ResolvedImage, trace: Trace, recorded_at: datetime
) -> Digest:
    """Push a trace as a referrer of the image; the digest of its manifest. Raises `RegistryError`.

    One that was pushed before is not pushed twice.
    """
    from erofs_twisted.registry.push import Artifact

    annotations = {
        LAYER_ANNOTATION: trace.digest,
        CREATED_ANNOTATION: recorded_at.isoformat().replace("+00:00", "Z"),
    }
    pushed: Digest = await store.push_referrer(resolved, Artifact(MEDIA_TYPE, trace.encode(), annotations))
    return pushed


async def _find_referrer(store: IImageStore, resolved: ResolvedImage, layer: Descriptor) -> Trace | None:
    listed = await store.referrers(resolved.digest, MEDIA_TYPE)
    for candidate in _newest_first(listed, layer)[:MAX_CANDIDATES]:
        try:
            trace = await _fetch(store, candidate, resolved, layer)
        except ErofsTwistedError as error:
            _log.info("the trace {digest} is not used: {reason}", digest=candidate.digest, reason=str(error))
            continue
        if trace is not None:
            return trace
    return None


def _newest_first(listed: Sequence[Descriptor], layer: Descriptor) -> list[Descriptor]:
    """Those that may be of the layer: of an image with several each may have its own. A registry need not
    pass the annotations on; then the order is the registry's, in which the last is the newest."""
    fitting = [
        entry
        for entry in reversed(listed)
        if entry.media_type in MANIFEST_TYPES
        and entry.annotations.get(LAYER_ANNOTATION, layer.digest) == layer.digest
    ]
    return sorted(fitting, key=_created, reverse=True)


def _created(entry: Descriptor) -> float:
    try:
        created = datetime.fromisoformat(entry.annotations.get(CREATED_ANNOTATION, ""))
        return created.timestamp() if created.tzinfo else 0.0
    except (ValueError, OverflowError):
        return 0.0


async def _fetch(
    store: IImageStore, artifact: Descriptor, resolved: ResolvedImage, layer: Descriptor
) -> Trace | None:
    """The trace in an artifact; None where it is of another layer. Raises `ErofsTwistedError`."""
    if artifact.size > MAX_ARTIFACT_MANIFEST:
        raise InvalidTrace(f"its manifest has {artifact.size} bytes")
    manifest = parse_manifest(await store.fetch(artifact), artifact.media_type)
    if not isinstance(manifest, Manifest) or manifest.subject is None or len(manifest.layers) != 1:
        raise InvalidTrace("it is not an artifact with a subject and one layer")
    if manifest.subject.digest != resolved.digest:
        raise InvalidTrace(f"it refers to another image, {manifest.subject.digest}")
    (content,) = manifest.layers
    if content.media_type != MEDIA_TYPE or content.size > MAX_ENCODED:
        raise InvalidTrace(f"its layer is {content.media_type}, {content.size} bytes")
    trace = Trace.decode(await store.fetch(content))
    return trace if (trace.digest, trace.size) == (layer.digest, layer.size) else None
