"""Recording what is read, keeping it, finding it again, and publishing it."""

from __future__ import annotations

import json
import os
import stat
from datetime import datetime
from pathlib import Path
from typing import Any

import attrs
from twisted.internet.defer import CancelledError, Deferred, fail, succeed
from twisted.trial.unittest import SynchronousTestCase
from zope.interface import implementer
from zope.interface.verify import verifyObject

from erofs_twisted.blocks import tracefile
from erofs_twisted.blocks.trace import GRAIN, MAX_ENCODED, MEDIA_TYPE, Recorder, Trace
from erofs_twisted.blocks.tracefile import TraceFiles
from erofs_twisted.interfaces import IExport, IImageStore, Segment
from erofs_twisted.registry.digest import Digest
from erofs_twisted.registry.errors import NotInRegistry, TransferFailed
from erofs_twisted.registry.manifest import OCI_MANIFEST, Descriptor, Manifest, ResolvedImage
from erofs_twisted.registry.probe import Probe
from erofs_twisted.registry.push import Artifact
from erofs_twisted.registry.reference import parse_reference
from erofs_twisted.tracing import (
    CREATED_ANNOTATION,
    LAYER_ANNOTATION,
    SAVE_SECONDS,
    Recording,
    TracingExport,
    find_trace,
    publish_trace,
)
from tests.unit.threadless import HeldPool, ThreadlessReactor

SIZE = 1_000_001
LAYER = Descriptor("application/vnd.erofs", Digest.of(b"layer"), SIZE)
CONFIG = Descriptor("application/vnd.oci.image.config.v1+json", Digest.of(b"{}"), 2)
IMAGE = ResolvedImage(
    parse_reference("r.example/a:1"), Digest.of(b"manifest"), Manifest(OCI_MANIFEST, CONFIG, (LAYER,))
)
TRACE = Trace(LAYER.digest, SIZE, ((65536, 131072), (0, 65536)))
OTHER = Trace(LAYER.digest, SIZE, ((0, 65536),))


@implementer(IExport)
@attrs.define
class Export:
    """Notes what it is asked for."""

    name: str = "an image"
    description: str = "for tests"
    size: int = 1_003_520
    asked: list[tuple[str, int, int]] = attrs.field(factory=list)

    def read(self, offset: int, length: int) -> list[Segment] | Deferred[list[Segment]]:
        self.asked.append(("read", offset, length))
        return [bytes(length)]

    def prefetch(self, offset: int, length: int) -> Deferred[None]:
        self.asked.append(("prefetch", offset, length))
        return succeed(None)

    def extents(self, offset: int, length: int) -> list[tuple[int, bool]]:
        self.asked.append(("extents", offset, length))
        return [(length, False)]


class TracingExportTests(SynchronousTestCase):
    def setUp(self) -> None:
        self.below = Export()
        self.export = TracingExport(self.below, Recorder(LAYER.digest, SIZE))

    def ranges(self) -> tuple[tuple[int, int], ...]:
        return self.export.recorder.trace().ranges

    def test_it_is_the_export_below(self) -> None:
        self.assertTrue(verifyObject(IExport, self.export))
        self.assertEqual(
            (self.below.name, self.below.description, self.below.size),
            (self.export.name, self.export.description, self.export.size),
        )
        self.assertEqual([bytes(10)], self.export.read(5, 10))
        self.assertEqual([(7, False)], self.export.extents(3, 7))
        self.successResultOf(self.export.prefetch(1, 2))
        self.assertEqual([("read", 5, 10), ("extents", 3, 7), ("prefetch", 1, 2)], self.below.asked)

    def test_reads_are_recorded_and_nothing_else(self) -> None:
        self.export.prefetch(0, GRAIN)
        self.export.extents(0, GRAIN)
        self.export.read(GRAIN, 1)
        self.export.read(0, 1)
        self.assertEqual(((GRAIN, 2 * GRAIN), (0, GRAIN)), self.ranges())

    def test_the_zeros_behind_the_blob_are_no_part_of_it(self) -> None:
        self.export.read(1_000_448, 3072)
        self.assertEqual((), self.ranges())
        self.export.read(999_424, 4096)
        self.assertEqual(((999_424 - 999_424 % GRAIN, SIZE),), self.ranges())


class FileTests(SynchronousTestCase):
    def setUp(self) -> None:
        self.directory = self.mktemp()
        self.files = TraceFiles(self.directory)
        self.path = Path(self.files.path(LAYER.digest))

    def test_a_trace_is_kept_under_the_digest_of_its_blob_and_for_its_user_alone(self) -> None:
        self.files.save(TRACE)
        self.assertEqual(Path(self.directory) / "traces" / "sha256" / LAYER.digest.encoded, self.path)
        self.assertEqual(0o600, stat.S_IMODE(self.path.stat().st_mode))
        self.assertEqual(0o700, stat.S_IMODE(self.path.parent.stat().st_mode))
        self.assertEqual(TRACE, self.files.load(LAYER.digest, SIZE))

    def test_a_new_one_takes_the_place_of_the_old_and_leaves_nothing_else(self) -> None:
        self.files.save(TRACE)
        self.files.save(OTHER, durable=False)
        self.assertEqual(OTHER, self.files.load(LAYER.digest, SIZE))
        self.assertEqual([self.path.name], os.listdir(self.path.parent))

    def test_a_save_that_fails_leaves_the_old_one(self) -> None:
        self.files.save(TRACE)

        def break_off(descriptor: int) -> None:
            raise OSError(28, "No space left on device")

        self.patch(tracefile.os, "fsync", break_off)
        self.assertRaises(OSError, self.files.save, OTHER)
        self.assertEqual(TRACE, self.files.load(LAYER.digest, SIZE))
        self.assertEqual([self.path.name], os.listdir(self.path.parent))

    def test_there_may_be_none(self) -> None:
        self.assertIsNone(self.files.load(LAYER.digest, SIZE))
        self.assertRaises(OSError, self.files.saved_at, LAYER.digest)

    def test_a_damaged_one_is_none(self) -> None:
        self.files.save(TRACE)
        good = self.path.read_bytes()
        other_blob = attrs.evolve(TRACE, digest=Digest.of(b"other")).encode()
        longer = attrs.evolve(TRACE, size=SIZE + 1).encode()
        for content in (b"", good[:-1], good + b"x", other_blob, longer, b" " * (MAX_ENCODED + 1)):
            self.path.write_bytes(content)
            self.assertIsNone(self.files.load(LAYER.digest, SIZE))

    def test_what_is_no_file_is_none(self) -> None:
        self.path.mkdir(parents=True)
        self.assertIsNone(self.files.load(LAYER.digest, SIZE))
        self.path.rmdir()
        os.mkfifo(self.path)
        self.assertIsNone(self.files.load(LAYER.digest, SIZE))


class RecordingTests(SynchronousTestCase):
    def setUp(self) -> None:
        self.reactor = ThreadlessReactor()
        self.pool = HeldPool(held=False)
        self.files = TraceFiles(self.mktemp())
        self.recording = Recording(self.reactor, self.pool, self.files, LAYER.digest, SIZE)
        self.export = self.recording.of(Export())
        self.recorder = self.export.recorder

    def kept(self) -> Trace | None:
        return self.files.load(LAYER.digest, SIZE)

    def close(self) -> None:
        self.successResultOf(Deferred.fromCoroutine(self.recording.close()))
        self.assertEqual([], self.reactor.getDelayedCalls())

    def test_what_was_read_is_written_down_every_few_seconds(self) -> None:
        for chunk in (3, 1):
            self.export.read(chunk * 65536, 1)
            self.reactor.advance(SAVE_SECONDS)
            self.assertEqual(self.recorder.trace(), self.kept())
        self.close()

    def test_nothing_is_written_while_nothing_is_new(self) -> None:
        self.export.read(0, 1)
        self.reactor.advance(SAVE_SECONDS)
        os.unlink(self.files.path(LAYER.digest))
        self.export.read(5, 1)
        self.reactor.advance(SAVE_SECONDS)
        self.close()
        self.assertIsNone(self.kept())

    def test_the_end_is_written_down(self) -> None:
        self.export.read(0, 1)
        self.close()
        self.assertEqual(self.recorder.trace(), self.kept())

    def test_a_mount_of_which_nothing_was_read_leaves_an_older_trace(self) -> None:
        self.files.save(TRACE)
        self.close()
        self.assertEqual(TRACE, self.kept())

    def test_a_slow_disk_is_written_to_once_at_a_time_and_not_behind_the_end(self) -> None:
        self.pool.held = True
        self.export.read(0, 1)
        self.reactor.advance(SAVE_SECONDS)
        self.export.read(200_000, 1)
        self.reactor.advance(SAVE_SECONDS)
        self.assertEqual(1, len(self.pool.work))
        closed = Deferred.fromCoroutine(self.recording.close())
        self.assertNoResult(closed)
        self.pool.run()
        self.successResultOf(closed)
        self.assertEqual(self.recorder.trace(), self.kept())

    def test_a_place_that_cannot_be_written_to_fails_nothing(self) -> None:
        Path(self.files.cache_dir).write_text("no directory")
        self.export.read(0, 1)
        self.reactor.advance(SAVE_SECONDS)
        self.close()
        self.assertIsNone(self.kept())


@implementer(IImageStore)
class Store:
    """Has what was pushed to it, and counts what is asked of it."""

    def __init__(self) -> None:
        self.contents: dict[str, bytes] = {}
        self.listed: list[Descriptor] = []
        self.error: Exception | None = None
        self.asked = 0

    def resolve(self, platform: object) -> Deferred[ResolvedImage]:
        return succeed(IMAGE)

    def blob(self, descriptor: Descriptor) -> Any:
        raise AssertionError("a trace is no blob to be read by ranges")

    def close(self) -> Deferred[None]:
        return succeed(None)

    def referrers(self, subject: Digest, artifact_type: str) -> Deferred[tuple[Descriptor, ...]]:
        self.asked += 1
        assert (subject, artifact_type) == (IMAGE.digest, MEDIA_TYPE)
        return fail(self.error) if self.error else succeed(tuple(self.listed))

    def fetch(self, descriptor: Descriptor) -> Deferred[bytes]:
        self.asked += 1
        content = self.contents.get(descriptor.digest)
        return fail(NotInRegistry("no such thing")) if content is None else succeed(content)

    def probe(self, descriptor: Descriptor) -> Deferred[Probe | None]:
        raise NotImplementedError

    def push_referrer(self, image: ResolvedImage, artifact: Artifact) -> Deferred[Digest]:
        subject = Descriptor(OCI_MANIFEST, image.digest, 8)
        return succeed(self.add(artifact.manifest(subject), artifact))

    def add(self, manifest: bytes, artifact: Artifact, **changes: Any) -> Digest:
        for content in (manifest, artifact.content):
            self.contents[Digest.of(content)] = content
        entry = Descriptor(
            OCI_MANIFEST,
            Digest.of(manifest),
            len(manifest),
            annotations=dict(artifact.annotations),
            artifact_type=artifact.media_type,
        )
        self.listed.append(attrs.evolve(entry, **changes))
        return entry.digest


class FindTests(SynchronousTestCase):
    def setUp(self) -> None:
        self.store = Store()
        self.directory = self.mktemp()
        self.files = TraceFiles(self.directory)

    def find(self, layer: Descriptor = LAYER) -> Trace | None:
        found = find_trace(self.store, self.directory, IMAGE, layer)
        return self.successResultOf(Deferred.fromCoroutine(found))

    def publish(self, trace: Trace, when: str = "2026-01-01T00:00:00+00:00") -> Digest:
        published = publish_trace(self.store, IMAGE, trace, datetime.fromisoformat(when))
        return self.successResultOf(Deferred.fromCoroutine(published))

    def test_the_fake_store_is_a_store(self) -> None:
        self.assertTrue(verifyObject(IImageStore, self.store))

    def test_what_is_in_the_cache_asks_nobody(self) -> None:
        self.files.save(TRACE)
        self.publish(OTHER)
        self.assertEqual(TRACE, self.find())
        self.assertEqual(0, self.store.asked)

    def test_what_was_published_is_found_and_kept(self) -> None:
        self.publish(TRACE)
        self.assertEqual(TRACE, self.find())
        self.assertEqual(TRACE, self.files.load(LAYER.digest, SIZE))
        before = self.store.asked
        self.assertEqual(TRACE, self.find())
        self.assertEqual(before, self.store.asked)

    def test_what_is_published_says_of_what_and_when(self) -> None:
        digest = self.publish(TRACE)
        manifest = json.loads(self.store.contents[digest])
        expected = {CREATED_ANNOTATION: "2026-01-01T00:00:00Z", LAYER_ANNOTATION: LAYER.digest}
        self.assertEqual(expected, manifest["annotations"])
        self.assertEqual(MEDIA_TYPE, manifest["artifactType"])

    def test_the_newest_is_taken_whatever_the_order_of_the_list(self) -> None:
        self.publish(OTHER, "2026-01-02T00:00:00+00:00")
        self.publish(TRACE, "2026-01-02T01:00:00+00:00")
        self.publish(OTHER, "2026-01-02T02:30:00+02:00")
        self.assertEqual(TRACE, self.find())

    def test_without_annotations_the_last_of_the_list_is_taken(self) -> None:
        for trace in (OTHER, TRACE):
            self.publish(trace)
            self.store.listed[-1] = attrs.evolve(self.store.listed[-1], annotations={})
        self.assertEqual(TRACE, self.find())

    def test_those_of_other_layers_are_passed_over(self) -> None:
        self.publish(TRACE)
        self.publish(attrs.evolve(TRACE, digest=Digest.of(b"other")), "2026-02-01T00:00:00+00:00")
        asked = self.store.asked
        self.assertEqual(TRACE, self.find())
        self.assertEqual(3, self.store.asked - asked, "a list, a manifest, a trace")

    def test_a_trace_of_another_layer_without_annotations_is_no_trace_of_this(self) -> None:
        self.publish(attrs.evolve(TRACE, digest=Digest.of(b"other")))
        self.store.listed[0] = attrs.evolve(self.store.listed[0], annotations={})
        self.assertIsNone(self.find())

    def test_damaged_ones_are_passed_over_and_not_for_ever(self) -> None:
        good = Artifact(MEDIA_TYPE, TRACE.encode())
        subject = Descriptor(OCI_MANIFEST, IMAGE.digest, 8)
        self.publish(TRACE, "2020-01-01T00:00:00+00:00")
        bad: list[tuple[bytes, Artifact]] = [
            (b"not a manifest", good),
            (good.manifest(attrs.evolve(subject, digest=Digest.of(b"another image"))), good),
            (Artifact(MEDIA_TYPE, b"no trace").manifest(subject), Artifact(MEDIA_TYPE, b"no trace")),
        ]
        for manifest, artifact in bad:
            self.store.add(manifest, artifact)
            new = {CREATED_ANNOTATION: "2026-01-01T00:00:00Z"}
            self.store.listed[-1] = attrs.evolve(self.store.listed[-1], annotations=new)
        self.assertEqual(TRACE, self.find())
        os.unlink(self.files.path(LAYER.digest))
        self.store.listed.append(attrs.evolve(self.store.listed[-1], digest=Digest.of(b"missing")))
        self.assertIsNone(self.find())

    def test_a_huge_one_is_not_fetched(self) -> None:
        self.publish(TRACE)
        self.store.listed[0] = attrs.evolve(self.store.listed[0], size=1 << 30)
        self.assertIsNone(self.find())
        self.assertEqual(1, self.store.asked)

    def test_no_trace_is_none(self) -> None:
        self.assertIsNone(self.find())

    def test_trouble_with_the_registry_is_no_trace(self) -> None:
        self.store.error = TransferFailed("the registry is away", temporary=True)
        self.assertIsNone(self.find())

    def test_a_cache_that_cannot_be_written_to_still_finds(self) -> None:
        Path(self.directory).write_text("no directory")
        self.publish(TRACE)
        self.assertEqual(TRACE, self.find())

    def test_to_cancel_a_search_ends_it(self) -> None:
        waiting: Deferred[Any] = Deferred()
        self.patch(self.store, "referrers", lambda subject, artifact_type: waiting)
        search = Deferred.fromCoroutine(find_trace(self.store, self.directory, IMAGE, LAYER))
        search.cancel()
        self.failureResultOf(search, CancelledError)
