"""Files of which a part is not in memory: a hole that nobody has read yet is the part that is not."""

from __future__ import annotations

import errno
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from twisted.internet.defer import CancelledError, Deferred
from twisted.trial.unittest import SynchronousTestCase, TestCase

from erofs_twisted.errors import ReadError
from erofs_twisted.interfaces import FileSpan
from erofs_twisted.nbd import pages as module
from erofs_twisted.nbd import residency
from erofs_twisted.nbd.pages import THREADS_PER_DISK, DiskReaders, FilePages, Files
from erofs_twisted.nbd.residency import PAGE, Residency
from tests.unit.threadless import HeldPool, ThreadlessReactor

CONTENT = bytes(range(256)) * 256
SIZE = 1 << 20
MISSING = SIZE // 2
"""From here on nothing is in memory, and all is zeros."""


def half_in_memory(test: SynchronousTestCase) -> int:
    """A descriptor of a file that starts with `CONTENT` and has `SIZE` bytes."""
    descriptor, path = tempfile.mkstemp()
    test.addCleanup(os.close, descriptor)
    os.unlink(path)
    os.write(descriptor, CONTENT)
    os.truncate(descriptor, SIZE)
    return descriptor


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


class ResidencyTests(SynchronousTestCase):
    def setUp(self) -> None:
        self.fd = half_in_memory(self)
        self.inode = os.fstat(self.fd).st_ino
        self.residency = Residency(self.fd)
        self.addCleanup(self.residency.close)

    def test_what_was_written_is_in_memory_and_a_hole_is_not(self) -> None:
        for offset, length in ((0, 1), (PAGE - 1, 2), (5, len(CONTENT) - 5), (0, len(CONTENT))):
            self.assertTrue(self.residency.covers(offset, length), (offset, length))
        for offset, length in ((MISSING, 1), (MISSING, 4096), (SIZE - 1, 1), (0, SIZE)):
            self.assertFalse(self.residency.covers(offset, length), (offset, length))

    def test_one_page_that_is_missing_is_enough(self) -> None:
        os.pwrite(self.fd, b"x", MISSING + 2 * PAGE)
        os.pwrite(self.fd, b"x", MISSING)
        self.assertTrue(self.residency.covers(MISSING + 10, 20))
        self.assertFalse(self.residency.covers(MISSING, 3 * PAGE))
        os.pwrite(self.fd, b"x", MISSING + PAGE)
        self.assertTrue(self.residency.covers(MISSING, 3 * PAGE))

    def test_a_file_that_grows_is_looked_at_in_full(self) -> None:
        self.assertFalse(self.residency.covers(SIZE, 100))
        os.pwrite(self.fd, CONTENT, SIZE)
        self.assertTrue(self.residency.covers(SIZE, len(CONTENT)))
        self.assertFalse(self.residency.covers(SIZE, len(CONTENT) + 1))

    def test_reads_that_follow_each_other_are_looked_at_together(self) -> None:
        looked: list[int] = []
        mincore = residency._mincore

        def count(address: int, length: int, vector: int) -> int:
            looked.append(length)
            return mincore(address, length, vector)

        self.patch(residency, "_mincore", count)
        self.assertTrue(self.residency.covers(0, PAGE))
        for page in range(1, len(CONTENT) // PAGE):
            self.assertTrue(self.residency.covers(page * PAGE, PAGE))
        self.assertFalse(self.residency.covers(len(CONTENT), PAGE), "there is a hole")
        self.assertLessEqual(len(looked), 3)

    def test_what_was_seen_is_not_believed_for_long(self) -> None:
        self.patch(residency, "KNOWN_SECONDS", -1.0)
        self.assertTrue(self.residency.covers(0, PAGE))
        self.assertTrue(self.residency.covers(PAGE, PAGE))
        os.posix_fadvise(self.fd, 0, 0, os.POSIX_FADV_DONTNEED)
        os.ftruncate(self.fd, 0)
        self.assertFalse(self.residency.covers(2 * PAGE, PAGE))

    def test_an_empty_file_has_nothing(self) -> None:
        os.ftruncate(self.fd, 0)
        empty = Residency(self.fd)
        self.assertFalse(empty.covers(0, 1))
        empty.close()

    def test_what_cannot_be_mapped_is_refused(self) -> None:
        read_end, write_end = os.pipe()
        self.addCleanup(os.close, read_end)
        self.addCleanup(os.close, write_end)
        os.write(write_end, b"x")
        self.patch(os, "fstat", lambda fd: os.stat_result([0] * 6 + [1] + [0] * 3))
        self.assertRaises(OSError, Residency, read_end)

    def test_a_system_call_that_is_not_allowed_is_noticed_at_once(self) -> None:
        before = Path("/proc/self/maps").read_text().count(f" {self.inode} ")
        self.patch(residency, "_mincore", lambda *_: -1)
        self.assertRaises(OSError, Residency, self.fd)
        self.assertEqual(before, Path("/proc/self/maps").read_text().count(f" {self.inode} "))

    def test_it_holds_the_file_until_it_is_closed_whatever_becomes_of_the_descriptor(self) -> None:
        other = os.dup(self.fd)
        held = Residency(other)
        os.close(other)
        self.assertTrue(held.covers(0, len(CONTENT)))
        held.close()
        held.close()


class Threads(SynchronousTestCase):
    """With threads that run when a test says so."""

    def setUp(self) -> None:
        self.pools: list[HeldPool] = []
        self.readers = DiskReaders(ThreadlessReactor(), self.make_pool)
        self.fd = half_in_memory(self)

    def make_pool(self) -> HeldPool:
        self.pools.append(HeldPool())
        return self.pools[-1]

    @property
    def held(self) -> int:
        return len(self.pools[0].work)

    def run_threads(self) -> None:
        self.pools[0].run()

    def read(self, offset: int = 0, length: int = 100, *, keep: bool = True) -> Deferred[bytearray | None]:
        return self.readers.read(FileSpan(self.fd, offset, length), keep=keep)


class DiskReadersTests(Threads):
    def test_no_thread_is_started_before_there_is_something_to_read(self) -> None:
        self.assertEqual([], self.pools)
        self.read()
        self.read()
        self.assertEqual(1, len(self.pools))

    def test_bytes_are_given_only_to_those_who_keep_them(self) -> None:
        kept, brought = self.read(7, 1000), self.read(7, 1000, keep=False)
        self.run_threads()
        self.assertEqual(CONTENT[7:1007], self.successResultOf(kept))
        self.assertIsNone(self.successResultOf(brought))

    def test_long_spans_are_read_in_pieces(self) -> None:
        self.patch(module, "PIECE", 1000)
        for keep in (True, False):
            done = self.read(5, len(CONTENT) - 5, keep=keep)
            self.run_threads()
            self.assertEqual(CONTENT[5:] if keep else None, self.successResultOf(done))

    def test_a_read_that_the_kernel_cuts_short_is_continued(self) -> None:
        whole = os.preadv
        self.patch(os, "preadv", lambda fd, buffers, at: whole(fd, [buffers[0][:300]], at))
        done = self.read(5, 1000)
        self.run_threads()
        self.assertEqual(CONTENT[5:1005], self.successResultOf(done))

    def test_what_the_disk_refuses_is_an_error_that_names_the_file(self) -> None:
        def preadv(*_: object) -> int:
            raise OSError(errno.EIO, os.strerror(errno.EIO))

        name = os.readlink(f"/proc/self/fd/{self.fd}")
        self.patch(os, "preadv", preadv)
        done = self.read()
        self.run_threads()
        self.assertEqual(
            f"cannot read {name}: Input/output error", str(self.failureResultOf(done, ReadError).value)
        )

    def test_where_the_kernel_has_no_memory_it_is_tried_again_for_a_while(self) -> None:
        pauses: list[float] = []
        self.patch(time, "sleep", pauses.append)
        preadv, failures = os.preadv, 0

        def scarce(*arguments: Any) -> int:
            nonlocal failures
            failures -= 1
            if failures >= 0:
                raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))
            return preadv(*arguments)

        self.patch(os, "preadv", scarce)
        for failures, found in ((2, CONTENT[7:1007]), (100, None)):  # noqa: B007
            done = self.read(7, 1000)
            self.run_threads()
            if found is None:
                self.failureResultOf(done, ReadError)
            else:
                self.assertEqual(found, self.successResultOf(done))
        self.assertEqual([*module.SCARCE[:2], *module.SCARCE], pauses)

    def test_a_file_that_ends_too_early_is_an_error(self) -> None:
        done = self.read(SIZE - 10, 20)
        self.run_threads()
        self.assertIn(f"has 10 of 20 bytes at {SIZE - 10}", str(self.failureResultOf(done, ReadError).value))

    def test_a_descriptor_that_is_not_open_is_an_error(self) -> None:
        closed = os.dup(self.fd)
        os.close(closed)
        self.failureResultOf(self.readers.read(FileSpan(closed, 0, 1), keep=True), ReadError)

    def test_a_disk_has_only_so_many_threads_and_the_others_go_on(self) -> None:
        slow = [self.read(each) for each in range(THREADS_PER_DISK + 2)]
        self.assertEqual(THREADS_PER_DISK, self.held)
        other = os.memfd_create("other")
        self.addCleanup(os.close, other)
        os.write(other, CONTENT)
        self.readers.read(FileSpan(other, 0, 1), keep=True)
        self.assertEqual(THREADS_PER_DISK + 1, self.held)
        self.pools[0].work.pop(0)()
        self.assertEqual([True, False], [slow[0].called, slow[1].called])
        self.assertEqual(THREADS_PER_DISK + 1, self.held)
        self.run_threads()
        self.assertEqual(
            [CONTENT[at : at + 100] for at in range(len(slow))], [self.successResultOf(each) for each in slow]
        )

    def test_what_is_cancelled_before_its_turn_is_not_read(self) -> None:
        under_way = [self.read() for _ in range(THREADS_PER_DISK)]
        waiting, last = self.read(), self.read()
        waiting.cancel()
        self.failureResultOf(waiting, CancelledError)
        asked: list[int] = []
        whole = os.preadv
        self.patch(os, "preadv", lambda fd, *more: asked.append(fd) or whole(fd, *more))
        self.run_threads()
        self.assertEqual(len(under_way) + 1, len(asked))
        self.successResultOf(last)

    def test_a_thread_that_a_disk_holds_counts_until_it_is_back_though_nobody_waits_for_it(self) -> None:
        for _ in range(THREADS_PER_DISK):
            cancelled = self.read()
            cancelled.cancel()
            self.failureResultOf(cancelled, CancelledError)
        late = self.read()
        self.assertEqual(THREADS_PER_DISK, self.held)
        self.run_threads()
        self.assertEqual(CONTENT[:100], self.successResultOf(late))

    def test_a_thread_reads_its_file_though_the_descriptors_number_is_anothers_by_then(self) -> None:
        number = os.dup(self.fd)
        done = self.readers.read(FileSpan(number, 0, 100), keep=True)
        other = os.memfd_create("other")
        os.write(other, b"x" * 1000)
        os.dup2(other, number)
        os.close(other)
        self.addCleanup(os.close, number)
        self.run_threads()
        self.assertEqual(CONTENT[:100], self.successResultOf(done))

    def test_no_descriptor_is_left_open(self) -> None:
        before = descriptors()
        for offset in (0, SIZE):
            done = self.read(offset)
            self.run_threads()
            done.addErrback(lambda failure: failure.trap(ReadError))
        cancelled = self.read()
        cancelled.cancel()
        self.failureResultOf(cancelled, CancelledError)
        self.run_threads()
        self.assertEqual(before, descriptors())


class FilePagesTests(Threads):
    def setUp(self) -> None:
        super().setUp()
        self.files = Files(self.readers)
        self.addCleanup(self.files.close)
        self.pages = self.files[self.fd]

    def refuse_nowait(self, number: int) -> list[int]:
        """Have RWF_NOWAIT refused; returns a list that grows by each attempt."""
        attempts: list[int] = []
        whole = os.preadv

        def preadv(fd: int, buffers: Any, at: int, flags: int = 0) -> int:
            if flags:
                attempts.append(flags)
                raise OSError(number, os.strerror(number))
            return whole(fd, buffers, at)

        self.patch(os, "preadv", preadv)
        return attempts

    def test_a_file_is_met_once(self) -> None:
        self.assertIs(self.pages, self.files[self.fd])

    def test_bytes_in_memory_are_seen_at_once_and_others_not(self) -> None:
        self.assertEqual(CONTENT[3:1003], self.pages.peek(3, 1000))
        self.assertIsNone(self.pages.peek(SIZE - 10, 20))
        self.refuse_nowait(errno.EAGAIN)
        self.assertIsNone(self.pages.peek(3, 1000))
        self.assertTrue(self.pages.has(3, 1000))
        self.assertFalse(self.pages.has(MISSING, 1))

    def test_where_a_file_system_cannot_say_the_kernels_page_table_can(self) -> None:
        attempts = self.refuse_nowait(errno.EOPNOTSUPP)
        for _ in range(3):
            self.assertEqual(CONTENT[3:1003], self.pages.peek(3, 1000))
            self.assertIsNone(self.pages.peek(MISSING, 1))
        self.assertEqual(1, len(attempts))

    def test_an_error_at_first_sight_is_left_to_a_thread(self) -> None:
        self.refuse_nowait(errno.EIO)
        self.assertIsNone(self.pages.peek(3, 1000))

    def test_a_disk_that_is_being_read_is_not_told_to_read_even_more(self) -> None:
        attempts = self.refuse_nowait(errno.EAGAIN)
        self.pages.bring(FileSpan(self.fd, MISSING, 1), keep=False)
        self.assertIsNone(self.pages.peek(MISSING, 1))
        self.assertEqual(CONTENT[:10], self.pages.peek(0, 10))
        self.assertEqual([], attempts)
        self.run_threads()
        self.assertIsNone(self.pages.peek(0, 10))
        self.assertEqual(1, len(attempts))

    def test_what_is_brought_becomes_bytes_or_stays_a_span(self) -> None:
        span = FileSpan(self.fd, MISSING, 1000)
        kept, brought = self.pages.bring(span, keep=True), self.pages.bring(span, keep=False)
        self.run_threads()
        self.assertEqual(bytes(1000), self.successResultOf(kept))
        self.assertEqual(span, self.successResultOf(brought))

    def test_of_a_file_that_cannot_be_looked_at_everything_is_read_by_threads(self) -> None:
        def cannot(fd: int) -> None:
            raise OSError(errno.ENODEV, os.strerror(errno.ENODEV))

        self.patch(module, "Residency", cannot)
        self.refuse_nowait(errno.EOPNOTSUPP)
        pages = FilePages(self.fd, self.readers)
        self.assertFalse(pages.has(0, 10))
        self.assertIsNone(pages.peek(0, 10))
        brought = pages.bring(FileSpan(self.fd, 0, 10), keep=False)
        self.run_threads()
        self.assertEqual(CONTENT[:10], self.successResultOf(brought))
        pages.close()

    def test_what_has_left_memory_is_brought_again_and_the_rest_is_let_be(self) -> None:
        self.assertIsNone(self.files.bring_again(FileSpan(self.fd, 0, 10)))
        gone = FileSpan(self.fd, MISSING, 10)
        brought = self.files.bring_again(gone)
        assert brought is not None
        self.run_threads()
        self.assertEqual(gone, self.successResultOf(brought))

    def test_loading_leaves_bytes_as_they_are(self) -> None:
        short, long = FileSpan(self.fd, 3, 10), FileSpan(self.fd, 0, 11)
        loaded = Deferred.fromCoroutine(self.files.load([b"<", short, long, b">"], 10))
        self.run_threads()
        self.assertEqual([b"<", CONTENT[3:13], long, b">"], self.successResultOf(loaded))


class StopTests(TestCase):
    def test_stopping_without_threads_is_no_work(self) -> None:
        self.successResultOf(Deferred.fromCoroutine(DiskReaders(None).stop()))

    def test_stopping_ends_the_threads_and_later_readers_get_others(self) -> None:
        stopped: list[Callable[[], None]] = []

        class Pool(HeldPool):
            async def stop(self) -> None:  # type: ignore[override]
                stopped.append(self.run)

        fd = half_in_memory(self)
        pools: list[Pool] = []
        readers = DiskReaders(ThreadlessReactor(), lambda: pools.append(Pool()) or pools[-1])
        for count in (1, 2):
            done = readers.read(FileSpan(fd, 0, 1), keep=True)
            pools[-1].run()
            self.successResultOf(done)
            self.successResultOf(Deferred.fromCoroutine(readers.stop()))
            self.assertEqual((count, count), (len(stopped), len(pools)))
