"""What an image brings near by itself: a trace, or else its metadata, and then all the rest."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from twisted.internet.defer import Deferred, succeed
from twisted.internet.task import Clock
from twisted.trial.unittest import SynchronousTestCase

from erofs_twisted.blocks.trace import Trace
from erofs_twisted.errors import ReadError
from erofs_twisted.prefetch import warmup

TRACE = Trace("sha256:" + "0" * 64, 1 << 20, ((4096, 8192), (0, 4096)))


class WarmUpTests(SynchronousTestCase):
    def setUp(self) -> None:
        self.done: list[str] = []
        self.metadata: Deferred[int] = Deferred()
        self.patch(warmup, "prefetch_metadata", self.prefetch_metadata)
        self.source: Any = SimpleNamespace(bytes_missing=1 << 20, prefetch_ranges=self.prefetch_ranges)
        self.warm_up = warmup.WarmUp(Clock(), self.source)
        self.fill: Any = SimpleNamespace(when_idle=self.when_idle)

    def prefetch_metadata(self, *_: object) -> Deferred[int]:
        self.done.append("metadata")
        return self.metadata

    def prefetch_ranges(self, ranges: object) -> Deferred[None]:
        self.done.append(f"trace {ranges}")
        self.traced: Deferred[None] = Deferred()
        return self.traced

    async def when_idle(self) -> None:
        self.done.append("fill")

    def begin(self, fill: bool = True) -> None:
        self.warm_up.begin(None, self.fill if fill else None)  # type: ignore[arg-type]

    def test_the_metadata_holds_up_the_rest(self) -> None:
        self.begin()
        self.assertEqual((["metadata", "fill"], True), (self.done, self.fill.is_held()))
        self.metadata.callback(0)
        self.assertFalse(self.fill.is_held())

    def test_without_a_fill_that_is_all(self) -> None:
        self.begin(fill=False)
        self.metadata.callback(0)
        self.assertEqual(["metadata"], self.done)

    def test_a_trace_stands_for_the_metadata(self) -> None:
        self.warm_up.follow(succeed(TRACE))
        self.begin()
        self.assertEqual([f"trace {TRACE.ranges}", "fill"], self.done)

    def test_a_trace_holds_up_the_rest_too(self) -> None:
        self.warm_up.follow(succeed(TRACE))
        self.begin()
        self.assertTrue(self.fill.is_held())
        self.traced.callback(None)
        self.assertFalse(self.fill.is_held())

    def test_a_trace_that_is_found_late_is_fetched_beside_the_metadata(self) -> None:
        search: Deferred[Trace | None] = Deferred()
        self.warm_up.follow(search)
        self.begin()
        search.callback(TRACE)
        self.assertEqual(["metadata", "fill", f"trace {TRACE.ranges}"], self.done)

    def test_no_trace_is_no_matter(self) -> None:
        self.warm_up.follow(succeed(None))
        self.begin()
        self.assertEqual(["metadata", "fill"], self.done)

    def test_a_complete_image_is_left_alone(self) -> None:
        self.source.bytes_missing = 0
        self.begin()
        self.assertEqual([], self.done)

    def test_what_cannot_be_had_is_no_failure(self) -> None:
        self.begin()
        self.metadata.errback(ReadError("the registry is down"))
        self.assertFalse(self.fill.is_held())

    def test_a_bug_reaches_the_log(self) -> None:
        self.begin()
        self.metadata.errback(ZeroDivisionError())
        self.assertEqual(1, len(self.flushLoggedErrors(ZeroDivisionError)))

    def test_its_end_cancels_what_runs(self) -> None:
        ended: list[str] = []
        search: Deferred[Trace | None] = Deferred(lambda _: ended.append("search"))
        self.metadata = Deferred(lambda _: ended.append("metadata"))
        self.warm_up.follow(search)
        self.begin()
        self.warm_up.stop()
        self.assertEqual(["search", "metadata"], ended)
        self.warm_up.stop()
