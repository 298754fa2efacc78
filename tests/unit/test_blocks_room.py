"""How much the cache takes of the disk, and what has to go for it."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import attrs
from twisted.logger import LogLevel, globalLogPublisher
from twisted.trial.unittest import SynchronousTestCase

from erofs_twisted.blocks import blobfile, cachefiles
from erofs_twisted.blocks.cache import LOOK_SECONDS, SCARCE_SECONDS, CacheDirectory
from erofs_twisted.blocks.cached import CachedBlob
from erofs_twisted.blocks.cachefiles import RESERVE_MOST, CacheError, Entry
from tests.unit.blobs import ThreadlessPool, ThreadlessReactor, blob, digest_of

CHUNK = 4096
COUNT = 16
BLOB = COUNT * CHUNK
TAKEN = BLOB + 8192
"""What a whole blob's file takes, with its header and its marks."""


@attrs.define
class FakeDisk:
    """The module os, with a file system of a size of its own."""

    root: str
    size: int = 1 << 40
    free: int = 1 << 40
    """Before anything is stored below ``root``."""
    unlink: Callable[[str], None] = os.unlink

    def __getattr__(self, name: str) -> Any:
        return getattr(os, name)

    def statvfs(self, _: str) -> Any:
        disk = self
        used = sum(path.stat().st_blocks * 512 for path in Path(self.root).rglob("*") if path.is_file())

        class Numbers:
            f_frsize = 1
            f_blocks = disk.size
            f_bavail = disk.free - used

        return Numbers


class FullDisk:
    """The module os on a disk with room for so many chunks more, and for others when a file is unlinked."""

    def __init__(self, room: int = 0, gained: int = 0, create: bool = True) -> None:
        self.room = room
        self.gained = gained
        self.create = create

    def __getattr__(self, name: str) -> Any:
        return getattr(os, name)

    def pwritev(self, fd: int, pieces: Any, offset: int) -> int:
        if sum(map(len, pieces)) == CHUNK:
            if self.room <= 0:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            self.room -= 1
        return os.pwritev(fd, pieces, offset)

    def posix_fallocate(self, fd: int, offset: int, length: int) -> None:
        if not self.create:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        os.posix_fallocate(fd, offset, length)

    def unlink(self, path: str) -> None:
        os.unlink(path)
        self.room += self.gained
        self.create = self.create or bool(self.gained)


class RoomCase(SynchronousTestCase):
    def setUp(self) -> None:
        self.path = self.mktemp()
        self.reactor = ThreadlessReactor()
        self.events: list[dict[str, Any]] = []
        globalLogPublisher.addObserver(self.events.append)
        self.addCleanup(globalLogPublisher.removeObserver, self.events.append)
        self.disk = FakeDisk(self.path)
        self.patch(cachefiles, "os", self.disk)

    def directory(self, limit: int | None) -> CacheDirectory:
        return CacheDirectory(self.reactor, ThreadlessPool(), self.path, CHUNK, limit)  # type: ignore[arg-type]

    def open(self, seed: int, directory: CacheDirectory | None = None) -> CachedBlob:
        opened = (directory or self.directory(None)).open(digest_of(blob(BLOB, seed)), BLOB)
        return self.successResultOf(opened)

    def fill(self, cached: CachedBlob, seed: int, count: int = COUNT) -> int:
        """Store chunks; how many were kept."""
        data = blob(BLOB, seed)
        return sum(cached.store(n, [data[n * CHUNK : (n + 1) * CHUNK]]) for n in range(count))

    def leave(self, *seeds: int, used: float = 1000.0) -> None:
        """Blobs that are whole and not in use, each used a minute after the one before."""
        for seed in seeds:
            cached = self.open(seed)
            self.fill(cached, seed)
            self.successResultOf(cached.close())
            os.utime(self.file(seed), (used, used))
            used += 60

    def file(self, seed: int) -> Path:
        algorithm, _, encoded = digest_of(blob(BLOB, seed)).partition(":")
        return Path(self.path, algorithm, encoded)

    def there(self, *seeds: int) -> list[int]:
        return [seed for seed in seeds if self.file(seed).exists()]

    def logged(self, level: Any) -> list[dict[str, Any]]:
        return [event for event in self.events if event["log_level"] is level]


class LimitTests(RoomCase):
    def test_the_least_recently_used_go_first_and_only_as_many_as_must(self) -> None:
        self.leave(1, 2, 3, 4)
        os.utime(self.file(1), (9999, 9999))
        limit = 5 * TAKEN
        cached = self.open(5, self.directory(limit))
        self.assertEqual(COUNT, self.fill(cached, 5))
        self.assertEqual([1, 3, 4], self.there(1, 2, 3, 4))

    def test_a_blob_in_use_stays_however_long_ago_it_was_opened(self) -> None:
        used = self.open(1)
        self.fill(used, 1)
        os.utime(self.file(1), (0, 0))
        self.leave(2)
        cached = self.open(3, self.directory(2 * TAKEN + 4 * CHUNK))
        self.fill(cached, 3)
        self.assertEqual([1], self.there(1, 2))

    def test_opening_and_closing_count_as_use(self) -> None:
        self.leave(1, 2)
        self.successResultOf(self.open(1).close())
        self.assertGreater(self.file(1).stat().st_mtime, self.file(2).stat().st_mtime)
        os.utime(self.file(1), (0, 0))
        self.open(1)
        self.assertGreater(self.file(1).stat().st_mtime, self.file(2).stat().st_mtime)

    def test_no_more_is_stored_than_the_limit_allows_and_the_log_says_so_once(self) -> None:
        limit = 8192 + 10 * CHUNK
        directory = self.directory(limit)
        cached = self.open(1, directory)
        kept = self.fill(cached, 1)
        self.assertEqual(10, kept)
        self.assertEqual(kept, COUNT - cached.chunks.missing)
        self.assertLessEqual(self.file(1).stat().st_blocks * 512, limit)
        self.fill(cached, 1)
        (warning,) = self.logged(LogLevel.warn)
        self.assertIn("is full", warning["log_format"])
        self.assertIn("--cache-size", warning["limit"])

    def test_many_chunks_at_once_are_kept_though_they_are_more_than_is_granted_at_a_time(self) -> None:
        limit = 8192 + 20 * CHUNK
        cached = self.open(1, self.directory(limit))
        self.assertTrue(cached.store(0, [blob(BLOB, 1)]))
        self.assertTrue(cached.chunks.complete)

    def test_many_chunks_at_once_for_which_there_is_no_room_are_not_kept_and_the_log_says_so(self) -> None:
        cached = self.open(1, self.directory(8192 + (COUNT - 1) * CHUNK))
        for _ in range(3):
            self.assertFalse(cached.store(0, [blob(BLOB, 1)]))
        self.assertEqual(COUNT, cached.chunks.missing)
        self.assertEqual(1, len(self.logged(LogLevel.warn)))

    def test_when_there_is_room_again_it_is_used_and_the_log_says_so(self) -> None:
        directory = self.directory(8192 * 2 + 20 * CHUNK)
        other, cached = self.open(1), self.open(2, directory)
        self.fill(other, 1)
        self.assertLess(self.fill(cached, 2), COUNT)
        self.successResultOf(other.close())
        self.assertLess(self.fill(cached, 2), COUNT)
        self.reactor.advance(LOOK_SECONDS)
        self.fill(cached, 2)
        self.assertEqual(COUNT, self.fill(cached, 2))
        self.assertEqual([], self.there(1))
        self.assertEqual(
            1, len([event for event in self.logged(LogLevel.info) if "room again" in event["log_format"]])
        )

    def test_a_limit_that_was_lowered_is_enforced_when_a_blob_is_opened(self) -> None:
        self.leave(1, 2, 3)
        self.open(3, self.directory(2 * TAKEN))
        self.assertEqual([2, 3], self.there(1, 2, 3))

    def test_a_warm_blob_pushes_nothing_out(self) -> None:
        self.leave(1, 2, 3)
        self.open(3, self.directory(3 * TAKEN))
        self.assertEqual([1, 2, 3], self.there(1, 2, 3))

    def test_files_that_are_no_blobs_are_left_alone_and_not_counted(self) -> None:
        self.leave(1)
        strangers = [self.file(1).with_name(name) for name in (".tmp123", "notes", "0" * 63)]
        strangers.append(Path(self.path, "manifests"))
        for stranger in strangers:
            stranger.write_bytes(bytes(BLOB))
            os.utime(stranger, (0, 0))
        cached = self.open(2, self.directory(2 * TAKEN))
        self.fill(cached, 2)
        self.assertEqual([True] * 4, [stranger.exists() for stranger in strangers])

    def test_what_cannot_be_looked_at_is_logged_and_nothing_more_is_kept(self) -> None:
        directory = self.directory(TAKEN)
        cached = self.open(1, directory)
        os.chmod(self.path, 0o777)
        self.assertLess(self.fill(cached, 1), COUNT)
        self.assertEqual(1, len(self.logged(LogLevel.error)))

    def test_where_there_was_no_memory_to_look_it_is_looked_again_soon(self) -> None:
        directory = self.directory(None)
        cached = self.open(1, directory)
        directory._left = 0
        with mock.patch.object(FakeDisk, "statvfs", side_effect=MemoryError):
            self.assertEqual(0, self.fill(cached, 1))
        self.assertEqual([], self.logged(LogLevel.warn))
        self.reactor.advance(SCARCE_SECONDS)
        self.assertEqual(COUNT, self.fill(cached, 1))


class ReserveTests(RoomCase):
    def test_a_part_of_the_file_system_stays_free(self) -> None:
        self.disk.size = 1 << 20
        self.disk.free = (1 << 20) // 20 + 8192 + 3 * CHUNK
        self.assertEqual(3, self.fill(self.open(1), 1))

    def test_of_a_large_file_system_it_is_a_fixed_size(self) -> None:
        self.disk.free = RESERVE_MOST + 5 * CHUNK
        self.assertEqual(5 * CHUNK, self.successResultOf(self.room()))

    def test_what_is_idle_goes_for_it(self) -> None:
        self.leave(1, 2)
        self.disk.free = RESERVE_MOST + TAKEN
        self.open(3)
        self.assertEqual([], self.there(1, 2))

    def room(self) -> Any:
        os.makedirs(self.path, 0o700)
        return self.directory(None).room()


class RoomTests(RoomCase):
    def test_room_is_the_limit_less_what_is_in_use(self) -> None:
        self.leave(1, 2)
        used = self.open(3)
        self.fill(used, 3)
        directory = self.directory(10 * TAKEN)
        self.assertEqual(9 * TAKEN, self.successResultOf(directory.room()))
        self.assertEqual([1, 2], self.there(1, 2))

    def test_room_is_never_less_than_nothing(self) -> None:
        self.fill(self.open(1), 1)
        self.assertEqual(0, self.successResultOf(self.directory(CHUNK).room()))

    def test_room_is_bounded_by_the_disk(self) -> None:
        self.fill(self.open(1), 1)
        self.disk.free = RESERVE_MOST + TAKEN + CHUNK
        self.assertEqual(CHUNK, self.successResultOf(self.directory(1 << 50).room()))


class FullDiskTests(RoomCase):
    def test_a_disk_without_space_makes_idle_blobs_go_and_then_takes_more(self) -> None:
        self.leave(1, 2)
        cached = self.open(3)
        system = FullDisk(room=2, gained=COUNT)
        self.patch(blobfile, "os", system)
        self.disk.unlink = system.unlink
        self.assertEqual(COUNT - 1, self.fill(cached, 3))
        self.assertEqual(COUNT, self.fill(cached, 3))
        self.assertNotEqual([1, 2], self.there(1, 2))

    def test_where_nothing_can_go_no_more_is_kept_and_it_is_not_tried_all_the_time(self) -> None:
        cached = self.open(1)
        system = FullDisk(room=2)
        self.patch(blobfile, "os", system)
        looks: list[int] = []
        self.patch(cachefiles.CacheFiles, "make_room", lambda *_, **__: looks.append(1) or 0)
        self.assertEqual(2, self.fill(cached, 1))
        self.assertEqual([1], looks)
        self.assertEqual(1, len(self.logged(LogLevel.error)))

    def test_a_new_file_makes_an_idle_one_go(self) -> None:
        self.leave(1)
        system = FullDisk(room=COUNT, gained=1, create=False)
        self.patch(blobfile, "os", system)
        self.disk.unlink = system.unlink
        cached = self.open(2)
        self.assertEqual([], self.there(1))
        self.assertEqual(COUNT, self.fill(cached, 2))

    def test_without_space_for_a_new_file_the_blob_is_served_without_the_cache(self) -> None:
        self.patch(blobfile, "os", FullDisk(create=False))
        cached = self.open(1)
        self.assertEqual(0, self.fill(cached, 1))
        self.assertEqual([], self.there(1))
        self.assertTrue(cached.claim(0, COUNT))
        self.assertFalse(cached.refresh(0, COUNT))
        self.assertEqual(1, len(self.logged(LogLevel.error)))
        self.reactor.advance(100)
        self.successResultOf(cached.close())


class EntriesTests(RoomCase):
    def test_entries_say_what_is_there_and_what_is_in_use(self) -> None:
        self.leave(1)
        self.fill(self.open(2), 2, 1)
        entries = {entry.digest: entry for entry in self.directory(None).files.entries()}
        idle, used = (entries[digest_of(blob(BLOB, seed))] for seed in (1, 2))
        self.assertEqual((False, True), (idle.in_use, used.in_use))
        self.assertEqual((TAKEN, CHUNK + 8192), (idle.allocated, used.allocated))
        self.assertEqual(1000, idle.last_used)

    def test_a_directory_that_others_may_write_to_has_none(self) -> None:
        os.mkdir(self.path, 0o777)
        os.chmod(self.path, 0o777)
        self.assertRaises(CacheError, self.directory(None).files.entries)

    def test_an_entry_in_use_is_not_evicted(self) -> None:
        cached = self.open(1)
        files = self.directory(None).files
        (entry,) = files.entries()
        self.assertIsInstance(entry, Entry)
        self.assertFalse(files.evict(entry))
        self.successResultOf(cached.close())
        self.assertTrue(files.evict(entry))
        self.assertFalse(files.evict(entry))
