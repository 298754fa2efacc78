"""What systemd is told, and when it is told nothing."""

from __future__ import annotations

import os
import tempfile
from types import SimpleNamespace
from typing import Any

from twisted.internet.defer import Deferred
from twisted.internet.task import Clock
from twisted.trial.unittest import SynchronousTestCase

from erofs_twisted import watchdog
from erofs_twisted.errors import ReadError
from erofs_twisted.interfaces import FileSpan
from erofs_twisted.watchdog import Watchdog, interval


class IntervalTests(SynchronousTestCase):
    def test_there_are_three_looks_in_the_time_that_systemd_waits(self) -> None:
        self.assertEqual(20.0, interval({"WATCHDOG_USEC": "60000000"}))

    def test_where_nobody_waits_there_are_none(self) -> None:
        for environment in ({}, {"WATCHDOG_USEC": ""}, {"WATCHDOG_USEC": "x"}, {"WATCHDOG_USEC": "0"}):
            self.assertIsNone(interval(environment))


class WatchdogTests(SynchronousTestCase):
    def setUp(self) -> None:
        self.clock = Clock()
        self.said: list[str] = []
        self.served: list[Any] = []
        self.disk: Deferred[None] | None = None
        self.patch(watchdog, "in_thread", self.in_thread)
        self.watchdog: Any = Watchdog(self.clock, None, lambda: self.served, self.said.append)  # type: ignore[arg-type]

    async def in_thread(self, reactor: object, pool: object, call: Any, *arguments: Any) -> Any:
        if self.disk is not None:
            await self.disk
        return call(*arguments)

    def serve(self, answer: Any) -> None:
        def read(offset: int, length: int) -> Any:
            self.assertEqual((0, 4096), (offset, length))
            if isinstance(answer, Exception):
                raise answer
            return answer

        export = SimpleNamespace(size=1 << 20, read=read)
        self.served.append(
            SimpleNamespace(image=SimpleNamespace(export=export), device=SimpleNamespace(path="d"))
        )

    def looks(self, count: int) -> int:
        self.watchdog.start({"WATCHDOG_USEC": "60000000"})
        self.clock.pump([20.0] * (count - 1))
        self.watchdog.stop()
        self.assertEqual({"WATCHDOG=1"}, {*self.said} | {"WATCHDOG=1"})
        return len(self.said)

    def test_without_devices_a_reactor_that_runs_is_well(self) -> None:
        self.assertEqual(3, self.looks(3))

    def test_each_device_is_read_as_the_kernel_does(self) -> None:
        file = self.enterContext(tempfile.TemporaryFile())
        file.write(bytes(4096))
        file.flush()
        self.serve([FileSpan(file.fileno(), 0, 4096)])
        self.assertEqual(2, self.looks(2))

    def test_a_disk_that_hangs_is_told_by_silence(self) -> None:
        self.serve([b"superblock"])
        self.disk = Deferred()
        self.assertEqual(0, self.looks(5))

    def test_a_registry_that_is_away_is_no_reason_for_another_daemon(self) -> None:
        cancelled: list[object] = []
        self.serve(Deferred(cancelled.append))
        self.assertEqual(1, self.looks(1))
        self.assertEqual(1, len(cancelled), "nobody waits for it any more")

    def test_a_read_that_fails_is_said_and_goes_no_further(self) -> None:
        closed = os.open("/dev/null", os.O_RDONLY)
        os.close(closed)
        self.serve(ReadError("no luck"))
        self.serve([FileSpan(closed, 0, 4096)])
        self.assertEqual(1, self.looks(1))

    def test_a_bug_ends_it_and_is_said(self) -> None:
        self.serve(KeyError("a bug"))
        self.assertEqual(0, self.looks(3))
        self.assertEqual(1, len(self.flushLoggedErrors(KeyError)))

    def test_to_stop_what_has_not_begun_does_nothing(self) -> None:
        self.watchdog.stop()
