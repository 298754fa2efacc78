"""Calls in threads, mounts that the kernel refuses, and the pool of threads for them."""

from __future__ import annotations

import errno
import os
import threading

from twisted.internet import reactor
from twisted.internet.defer import CancelledError, Deferred
from twisted.logger import globalLogPublisher
from twisted.trial.unittest import SynchronousTestCase, TestCase

from erofs_twisted.pool import SystemCallPool
from erofs_twisted.syscalls import in_thread, in_thread_to_its_end, mount, umount
from tests.unit.threadless import HeldPool, ThreadlessReactor


class ToItsEndTests(SynchronousTestCase):
    def setUp(self) -> None:
        self.pool = HeldPool()

    def begin(self, outcome: object) -> Deferred[tuple[object, bool]]:
        def call() -> object:
            if isinstance(outcome, Exception):
                raise outcome
            return outcome

        return Deferred.fromCoroutine(in_thread_to_its_end(ThreadlessReactor(), self.pool, call))

    def test_it_returns_what_the_call_returns(self) -> None:
        work = self.begin(5)
        self.assertNoResult(work)
        self.pool.run()
        self.assertEqual((5, False), self.successResultOf(work))

    def test_it_raises_what_the_call_raises(self) -> None:
        work = self.begin(OSError(5, "no"))
        self.pool.run()
        self.failureResultOf(work, OSError)

    def test_cancelled_it_waits_for_the_call_all_the_same(self) -> None:
        work = self.begin(5)
        work.cancel()
        work.cancel()
        self.assertNoResult(work)
        self.pool.run()
        self.assertEqual((5, True), self.successResultOf(work))

    def test_cancelled_it_raises_what_the_call_raises(self) -> None:
        work = self.begin(OSError(5, "no"))
        work.cancel()
        self.pool.run()
        self.failureResultOf(work, OSError)

    def test_a_call_that_needs_no_undoing_is_left_when_cancelled(self) -> None:
        work = Deferred.fromCoroutine(in_thread(ThreadlessReactor(), self.pool, lambda: 5))
        work.cancel()
        self.failureResultOf(work, CancelledError)
        self.pool.run()


class RefusedMountTests(SynchronousTestCase):
    def test_a_mount_that_is_refused_has_the_kernels_errno(self) -> None:
        error = self.assertRaises(OSError, mount, "none", "/no/such/directory", "tmpfs", 0, "")
        expected = errno.ENOENT if os.geteuid() == 0 else errno.EPERM
        self.assertEqual((expected, "/no/such/directory"), (error.errno, error.filename))

    def test_an_unmount_that_is_refused_has_the_kernels_errno(self) -> None:
        error = self.assertRaises(OSError, umount, "/no/such/directory")
        expected = errno.ENOENT if os.geteuid() == 0 else errno.EPERM
        self.assertEqual((expected, "/no/such/directory"), (error.errno, error.filename))


class SystemCallPoolTests(TestCase):
    timeout = 30

    async def test_it_is_started_and_stops_when_its_work_is_done(self) -> None:
        pool = SystemCallPool(reactor)
        thread = await in_thread(reactor, pool, threading.current_thread)
        self.assertTrue(thread.daemon)
        self.assertIsNot(threading.main_thread(), thread)
        await pool.stop()
        self.assertFalse(thread.is_alive())

    async def test_a_call_that_never_ends_does_not_hold_up_its_end(self) -> None:
        pool = SystemCallPool(reactor, patience=0.01)
        release, begun = threading.Event(), threading.Event()
        self.addCleanup(release.set)

        def never_ends() -> None:
            begun.set()
            release.wait()

        pool.callInThread(never_ends)
        begun.wait()
        events: list[dict[str, object]] = []
        globalLogPublisher.addObserver(events.append)
        self.addCleanup(globalLogPublisher.removeObserver, events.append)
        await pool.stop()
        self.assertIn("system calls that do not end", str([event.get("log_format") for event in events]))

    async def test_a_call_that_waits_does_not_hold_up_another(self) -> None:
        pool = SystemCallPool(reactor)
        self.addCleanup(pool.stop)
        release = threading.Event()
        pool.callInThread(release.wait)
        self.assertEqual(5, await in_thread(reactor, pool, lambda: 5))
        release.set()
