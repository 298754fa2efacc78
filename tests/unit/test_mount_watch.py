"""A mount that goes is noticed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from twisted.internet.defer import CancelledError
from twisted.internet.testing import MemoryReactor
from twisted.trial.unittest import SynchronousTestCase

from erofs_twisted.mount.mountinfo import Mount
from erofs_twisted.mount.watch import MountTable, MountWatch


def erofs(mount_id: int, path: str, parent_id: int = 1) -> Mount:
    return Mount(mount_id, parent_id, "43:0", "/", path, "erofs", "/dev/nbd0")


class FakeTable:
    def __init__(self, changed: Callable[[], None]) -> None:
        self.changed = changed
        self.now = [erofs(7, "/mnt")]
        self.closed = False

    def mounts(self) -> list[Mount]:
        return self.now

    def close(self) -> None:
        self.closed = True


class MountWatchTests(SynchronousTestCase):
    def setUp(self) -> None:
        self.reactor = MemoryReactor()
        self.watch = MountWatch(self.reactor, self.open)
        self.tables: list[FakeTable] = []

    def open(self, changed: Callable[[], None]) -> FakeTable:
        self.tables.append(FakeTable(changed))
        return self.tables[-1]

    def becomes(self, *mounts: Mount) -> None:
        self.tables[-1].now = list(mounts)
        self.tables[-1].changed()

    def test_a_mount_that_stays_is_not_gone(self) -> None:
        gone = self.watch.gone("/mnt")
        self.becomes(erofs(7, "/mnt"), erofs(8, "/other"))
        self.assertNoResult(gone)

    def test_a_mount_that_is_unmounted_is_gone(self) -> None:
        gone = self.watch.gone("/mnt")
        self.becomes()
        self.assertIsNone(self.successResultOf(gone))

    def test_another_mount_in_its_place_does_not_stand_for_it(self) -> None:
        gone = self.watch.gone("/mnt")
        self.becomes(erofs(9, "/mnt"))
        self.successResultOf(gone)

    def test_another_mount_with_its_number_does_not_stand_for_it(self) -> None:
        gone = self.watch.gone("/mnt")
        self.becomes(erofs(7, "/other"))
        self.successResultOf(gone)

    def test_a_mount_that_another_covers_is_not_gone(self) -> None:
        gone = self.watch.gone("/mnt")
        self.becomes(erofs(7, "/mnt"), erofs(9, "/mnt", parent_id=7))
        self.assertNoResult(gone)

    def test_where_nothing_is_mounted_it_is_gone_at_once(self) -> None:
        self.successResultOf(self.watch.gone("/elsewhere"))

    def test_each_waits_for_its_own_mount(self) -> None:
        first = self.watch.gone("/mnt")
        self.becomes(erofs(7, "/mnt"), erofs(8, "/second"))
        second = self.watch.gone("/second")
        self.becomes(erofs(7, "/mnt"))
        self.successResultOf(second)
        self.assertNoResult(first)

    def test_one_table_serves_all_and_is_closed_after_the_last(self) -> None:
        first, second = self.watch.gone("/mnt"), self.watch.gone("/mnt")
        self.assertEqual(self.tables, self.reactor.getReaders())
        self.becomes()
        self.successResultOf(first)
        self.successResultOf(second)
        self.assertEqual([True], [table.closed for table in self.tables])
        self.assertEqual([], self.reactor.getReaders())

    def test_to_cancel_the_last_closes_the_table(self) -> None:
        gone = self.watch.gone("/mnt")
        gone.cancel()
        self.failureResultOf(gone, CancelledError)
        self.assertTrue(self.tables[-1].closed)
        self.assertEqual([], self.reactor.getReaders())

    def test_close_ends_the_watch(self) -> None:
        gone = self.watch.gone("/mnt")
        self.watch.close()
        self.watch.close()
        self.assertNoResult(gone)
        self.assertTrue(self.tables[-1].closed)

    def test_a_watch_may_begin_again(self) -> None:
        self.watch.gone("/mnt")
        self.watch.close()
        gone = self.watch.gone("/mnt")
        self.becomes()
        self.successResultOf(gone)


class MountTableTests(SynchronousTestCase):
    def test_it_knows_what_is_mounted_and_nothing_has_changed(self) -> None:
        changes: list[None] = []
        table = MountTable(lambda: changes.append(None))
        self.addCleanup(table.close)
        for _ in range(2):
            self.assertIn("/proc", [mount.path for mount in table.mounts()])
        self.assertEqual([], changes)

    def test_an_event_is_passed_on(self) -> None:
        changes: list[None] = []
        table = MountTable(lambda: changes.append(None))
        self.addCleanup(table.close)
        table.doRead()
        self.assertEqual([None], changes)

    def test_close_leaves_no_descriptor(self) -> None:
        before = len(list(Path("/proc/self/fd").iterdir()))
        MountTable(lambda: None).close()
        self.assertEqual(before, len(list(Path("/proc/self/fd").iterdir())))
