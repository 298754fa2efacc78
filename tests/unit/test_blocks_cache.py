from __future__ import annotations

import errno
import fcntl
import os
import stat
from pathlib import Path
from typing import Any

from twisted.internet.defer import Deferred
from twisted.logger import LogLevel, globalLogPublisher
from twisted.trial.unittest import SynchronousTestCase

from erofs_twisted.blocks import blobfile, header
from erofs_twisted.blocks.blobfile import BlobFile
from erofs_twisted.blocks.cache import CacheDirectory
from erofs_twisted.blocks.cached import FLUSH_SECONDS, CachedBlob, CorruptBlob
from erofs_twisted.blocks.cachefiles import CacheError
from erofs_twisted.blocks.chunks import FRESH, PRESENT
from erofs_twisted.blocks.header import TRAILER_SIZE, VERSION
from erofs_twisted.errors import ReadError
from erofs_twisted.registry.errors import InvalidDigest
from tests.unit.blobs import ThreadlessPool, ThreadlessReactor, blob, digest_of, open_cached

CHUNK = 1024
DATA = blob(5 * CHUNK + 100)
COUNT = 6


class BrokenSystem:
    """The module os, of which some functions fail. With the code 0, Python itself has no memory for them."""

    def __init__(self, *broken: str, code: int = errno.ENOSPC) -> None:
        self.broken = broken
        self.code = code

    def __getattr__(self, name: str) -> Any:
        def fail(*_: Any, **__: Any) -> None:
            raise OSError(self.code, os.strerror(self.code)) if self.code else MemoryError

        return fail if name in self.broken else getattr(os, name)


class CacheCase(SynchronousTestCase):
    def setUp(self) -> None:
        self.path = self.mktemp()
        self.reactor = ThreadlessReactor()
        self.pool = ThreadlessPool()
        self.events: list[dict[str, Any]] = []
        globalLogPublisher.addObserver(self.events.append)
        self.addCleanup(globalLogPublisher.removeObserver, self.events.append)

    def open(self, data: bytes = DATA, **options: Any) -> CachedBlob:
        return open_cached(self.path, data, chunk_size=CHUNK, reactor=self.reactor, pool=self.pool, **options)

    def store(self, cached: CachedBlob, *chunks: int, data: bytes = DATA) -> None:
        for chunk in chunks:
            start = cached.chunking.start(chunk)
            self.assertTrue(cached.store(chunk, [data[start : cached.chunking.start(chunk + 1)]]))

    def present(self, cached: CachedBlob) -> list[int]:
        return [chunk for chunk in range(COUNT) if cached.chunks.present(chunk, chunk + 1)]

    def file(self) -> Path:
        return Path(self.path) / "sha256" / digest_of(DATA).partition(":")[2]

    def marks(self) -> bytes:
        """The chunks' marks in the file."""
        data = self.file().read_bytes()
        return data[len(data) - TRAILER_SIZE - COUNT : -TRAILER_SIZE]

    def logged(self, level: Any) -> list[str]:
        return [event["log_format"] for event in self.events if event["log_level"] is level]


class OpenTests(CacheCase):
    def failure(self, digest: str = digest_of(DATA), path: str | None = None) -> Deferred[CachedBlob]:
        directory = CacheDirectory(self.reactor, self.pool, path or self.path)  # type: ignore[arg-type]
        return directory.open(digest, len(DATA))

    def test_only_its_owner_may_see_the_cache(self) -> None:
        self.open()
        modes = [
            stat.S_IMODE(path.stat().st_mode) for path in (self.file(), self.file().parent, Path(self.path))
        ]
        self.assertEqual([0o600, 0o700, 0o700], modes)

    def test_a_new_blob_has_nothing_and_takes_no_room(self) -> None:
        self.assertEqual([], self.present(self.open()))
        data = blob(1)
        directory = CacheDirectory(self.reactor, self.pool, self.path)  # type: ignore[arg-type]
        cached = self.successResultOf(directory.open(digest_of(data), 1 << 40))
        self.assertLess(os.fstat(cached.fd).st_blocks * 512, cached.chunking.count + (1 << 16))

    def test_a_blob_in_use_is_locked_so_that_nobody_evicts_it(self) -> None:
        cached = self.open()
        with self.file().open() as other:
            self.assertRaises(BlockingIOError, fcntl.flock, other, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self.successResultOf(cached.close())
            fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)

    def test_a_directory_that_others_may_write_to_is_refused(self) -> None:
        os.mkdir(self.path)
        os.chmod(self.path, 0o777)
        message = str(self.failureResultOf(self.failure(), CacheError).value)
        self.assertIn("--cache-dir", message)

    def test_a_directory_that_cannot_be_made_is_an_error_that_says_the_cure(self) -> None:
        Path(self.path).write_text("a file")
        message = str(self.failureResultOf(self.failure(), CacheError).value)
        self.assertIn("choose another with --cache-dir", message)

    def test_a_digest_never_leaves_the_directory(self) -> None:
        for digest in ("sha256:../../etc/passwd", "md5:" + "0" * 32, "sha256", f"sha256:{'A' * 64}"):
            self.failureResultOf(self.failure(digest), InvalidDigest)

    def test_a_symbolic_link_in_a_blobs_place_is_not_followed(self) -> None:
        self.successResultOf(self.open().close())
        self.file().unlink()
        self.file().symlink_to("/etc/passwd")
        self.failureResultOf(self.failure(), CacheError)


class KeepTests(CacheCase):
    def test_what_is_stored_is_there_at_once(self) -> None:
        cached = self.open()
        self.store(cached, 1, 5)
        self.assertEqual([1, 5], self.present(cached))
        self.assertEqual(DATA[CHUNK : 2 * CHUNK], os.pread(cached.fd, CHUNK, CHUNK))

    def test_what_is_stored_is_there_after_a_close(self) -> None:
        cached = self.open()
        self.store(cached, 1, 2, 5)
        self.successResultOf(cached.close())
        self.assertEqual([1, 2, 5], self.present(self.open()))

    def test_a_chunk_is_marked_as_fresh_at_once_and_as_present_when_it_is_safe(self) -> None:
        self.store(self.open(), 3)
        self.assertEqual(bytes((0, 0, 0, FRESH, 0, 0)), self.marks())
        self.reactor.advance(FLUSH_SECONDS)
        self.assertEqual(bytes((0, 0, 0, PRESENT, 0, 0)), self.marks())

    def test_what_is_stored_while_a_flush_runs_is_flushed_by_the_next(self) -> None:
        cached = self.open()
        self.store(cached, 0)
        self.pool.held = []
        self.reactor.advance(FLUSH_SECONDS)
        self.store(cached, 1)
        self.pool.run()
        self.reactor.advance(FLUSH_SECONDS)
        self.assertEqual(bytes((PRESENT, PRESENT, 0, 0, 0, 0)), self.marks())

    def test_what_is_stored_while_the_disk_syncs_is_not_taken_for_safe(self) -> None:
        cached, store = self.open(), self.store

        class Meanwhile(BrokenSystem):
            def fdatasync(self, fd: int) -> None:
                os.fdatasync(fd)
                store(cached, 1)

        self.store(cached, 0)
        self.patch(blobfile, "os", Meanwhile())
        self.reactor.advance(FLUSH_SECONDS)
        self.assertEqual(bytes((PRESENT, FRESH, 0, 0, 0, 0)), self.marks())

    def test_marks_are_synced_in_their_turn_and_after_that_an_idle_blob_is_not(self) -> None:
        cached = self.open()
        self.store(cached, 0)
        self.reactor.advance(FLUSH_SECONDS)
        synced = list[int]()

        class Counted(BrokenSystem):
            def fdatasync(self, fd: int) -> None:
                synced.append(fd)

        self.patch(blobfile, "os", Counted())
        self.reactor.advance(FLUSH_SECONDS)
        self.assertEqual([cached.fd], synced)
        self.patch(blobfile, "os", BrokenSystem("fdatasync"))
        self.reactor.advance(FLUSH_SECONDS)
        self.assertEqual([], self.logged(LogLevel.error))

    def test_a_flush_that_takes_long_is_not_followed_by_all_that_were_due_meanwhile(self) -> None:
        cached = self.open()
        self.store(cached, 0)
        self.pool.held = []
        for _ in range(10):
            self.reactor.advance(FLUSH_SECONDS)
        self.assertEqual(1, len(self.pool.held))
        self.pool.run()
        self.assertEqual(PRESENT, self.marks()[0])

    def test_close_leaves_no_timer_and_no_open_file(self) -> None:
        cached = self.open()
        self.store(cached, 0)
        self.successResultOf(cached.close())
        self.assertEqual([], self.reactor.getDelayedCalls())
        self.assertRaises(OSError, os.fstat, cached.fd)

    def test_after_close_nothing_is_there_and_nothing_is_stored(self) -> None:
        cached = self.open()
        self.store(cached, 0)
        self.pool.held = []
        cached.close()
        self.assertEqual([], self.present(cached))
        self.assertFalse(cached.store(1, [DATA[CHUNK : 2 * CHUNK]]))
        self.pool.run()

    def test_a_chunk_in_thousands_of_pieces_is_stored(self) -> None:
        data = blob(8192)
        cached = open_cached(self.path, data, chunk_size=8192)
        self.assertTrue(cached.store(0, [data[n : n + 1] for n in range(8192)]))
        self.assertEqual(data, os.pread(cached.fd, 8192, 0))


class ShareTests(CacheCase):
    """Two processes, each with the file open by itself."""

    def test_each_sees_what_the_other_marked_when_it_flushes(self) -> None:
        ours, theirs = self.open(), self.open()
        self.store(ours, 0, 1)
        self.store(theirs, 1, 4)
        self.successResultOf(ours.flush())
        self.successResultOf(theirs.flush())
        self.assertEqual([0, 1, 4], self.present(theirs))
        self.store(ours, 2)
        self.successResultOf(ours.flush())
        self.assertEqual([0, 1, 2, 4], self.present(ours))

    def test_each_sees_at_once_what_the_other_stored_when_it_looks(self) -> None:
        ours, theirs = self.open(), self.open()
        self.store(theirs, 1, 3, 4)
        self.assertEqual([], self.present(ours))
        self.assertTrue(ours.refresh(0, 4))
        self.assertEqual([1, 3], self.present(ours))
        self.assertFalse(ours.refresh(0, 4))
        self.assertEqual(DATA[3 * CHUNK : 4 * CHUNK], os.pread(ours.fd, CHUNK, 3 * CHUNK))

    def test_what_a_process_left_when_it_was_killed_is_made_safe_by_the_next_flush_of_another(self) -> None:
        ours, theirs = self.open(), self.open()
        self.store(theirs, 2)
        os.close(theirs.fd)
        for look in (lambda: self.assertTrue(ours.refresh(0, COUNT)), lambda: None):
            look()
            self.reactor.advance(FLUSH_SECONDS)
            self.assertEqual(PRESENT, self.marks()[2])

    def test_a_claim_keeps_another_process_from_the_same_chunks_until_it_is_released(self) -> None:
        ours, theirs = self.open(), self.open()
        self.assertTrue(ours.claim(1, 4))
        self.assertFalse(theirs.claim(3, 5))
        self.assertTrue(theirs.claim(4, 6))
        ours.release(1, 4)
        self.assertTrue(theirs.claim(1, 4))

    def test_a_claim_excludes_no_other_of_the_same_process(self) -> None:
        ours = self.open()
        self.assertTrue(ours.claim(1, 4))
        self.assertTrue(ours.claim(0, 6))

    def test_the_claims_of_a_process_end_with_it(self) -> None:
        ours, theirs = self.open(), self.open()
        self.assertTrue(theirs.claim(0, 6))
        os.close(theirs.fd)
        self.assertTrue(ours.claim(0, 6))

    def test_where_the_file_system_has_no_locks_every_claim_is_granted(self) -> None:
        class NoLocks:
            def __getattr__(self, name: str) -> Any:
                return getattr(fcntl, name)

            def fcntl(self, *_: Any) -> None:
                raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

        ours, theirs = self.open(), self.open()
        self.patch(blobfile, "fcntl", NoLocks())
        self.assertTrue(ours.claim(0, 6))
        self.assertTrue(theirs.claim(0, 6))

    def test_a_chunk_that_another_process_stored_is_not_written_again(self) -> None:
        ours, theirs = self.open(), self.open()
        self.store(theirs, 0)
        self.assertTrue(ours.store(0, [b"x" * CHUNK]))
        self.assertEqual([0], self.present(ours))
        self.assertEqual(DATA[:CHUNK], os.pread(ours.fd, CHUNK, 0))

    def test_of_several_chunks_only_those_are_written_that_are_not_there(self) -> None:
        ours, theirs = self.open(), self.open()
        self.store(theirs, 1, 3)
        self.assertTrue(ours.store(0, [b"x" * 1500, b"x" * (5 * CHUNK - 1500)]))
        self.assertEqual([0, 1, 2, 3, 4], self.present(ours))
        expected = bytearray(b"x" * 5 * CHUNK)
        for start in (CHUNK, 3 * CHUNK):
            expected[start : start + CHUNK] = DATA[start : start + CHUNK]
        self.assertEqual(bytes(expected), self.file().read_bytes()[: 5 * CHUNK])

    def test_no_flush_takes_a_mark_of_the_other_back(self) -> None:
        ours, theirs = self.open(), self.open()
        self.store(ours, 0)
        self.store(theirs, 5)
        self.successResultOf(ours.close())
        self.successResultOf(theirs.close())
        self.assertEqual([0, 5], self.present(self.open()))

    def test_a_damaged_file_is_replaced_under_its_user_without_harm(self) -> None:
        ours = self.open()
        self.store(ours, 0)
        self.successResultOf(ours.flush())
        size = self.file().stat().st_size
        with self.file().open("r+b") as file:
            file.seek(size - COUNT - TRAILER_SIZE)
            file.write(b"\x7f")
        theirs = self.open()
        self.assertEqual([], self.present(theirs))
        self.assertEqual(DATA[:CHUNK], os.pread(ours.fd, CHUNK, 0))
        self.store(ours, 1)
        self.successResultOf(ours.close())
        self.assertEqual([], self.present(self.open()))


class DamageTests(CacheCase):
    def damage(self, offset: int, data: bytes) -> None:
        cached = self.open()
        self.store(cached, *range(COUNT - 1))
        self.successResultOf(cached.close())
        with self.file().open("r+b") as file:
            file.seek(offset, os.SEEK_END if offset < 0 else os.SEEK_SET)
            file.write(data)

    def assert_dropped(self) -> None:
        self.assertEqual([], self.present(self.open()))
        self.assertEqual(1, len(self.logged(LogLevel.warn)))
        self.assertTrue(all(byte == 0 for byte in self.file().read_bytes()[: len(DATA)]))

    def test_a_file_with_a_damaged_header_is_dropped(self) -> None:
        header = -(-len(DATA) // 4096) * 4096
        for offset in (0, 8, 10, 12, 16, 24, 90):
            self.damage(header + offset, b"\xff")
            self.events.clear()
            self.assert_dropped()

    def test_a_file_with_a_map_that_is_none_is_dropped(self) -> None:
        self.damage(-1 - TRAILER_SIZE, b"\x01")
        self.assert_dropped()

    def test_a_file_with_a_damaged_end_is_dropped(self) -> None:
        for offset in range(-TRAILER_SIZE, 0):
            if offset not in (-14, -13):
                self.damage(offset, b"\xff")
                self.events.clear()
                self.assert_dropped()

    def test_a_file_that_was_verified_but_is_not_complete_is_dropped(self) -> None:
        self.damage(-(-len(DATA) // 4096) * 4096 + 255, b"\xc5")
        self.assert_dropped()

    def test_a_file_of_another_size_is_dropped(self) -> None:
        self.damage(0, b"")
        os.truncate(self.file(), 100)
        self.assert_dropped()

    def test_a_file_with_other_chunks_is_dropped(self) -> None:
        self.damage(0, b"")
        open_cached(self.path, DATA, chunk_size=2 * CHUNK)
        self.assertEqual(1, len(self.logged(LogLevel.warn)))


class BootTests(CacheCase):
    """What an earlier boot left is believed only where it was marked as safe."""

    def reboot(self) -> None:
        self.patch(blobfile, "boot_id", lambda: b"another".ljust(36))

    def leave(self) -> None:
        """A process that was killed: chunk 0 was safe, 1 and 2 fresh."""
        cached = self.open()
        self.store(cached, 0)
        self.successResultOf(cached.flush())
        self.store(cached, 1, 2)
        os.close(cached.fd)

    def test_in_the_same_boot_what_is_fresh_is_there(self) -> None:
        self.leave()
        self.assertEqual([0, 1, 2], self.present(self.open()))

    def test_in_another_boot_what_was_fresh_is_not_there(self) -> None:
        self.leave()
        self.reboot()
        self.assertEqual([0], self.present(self.open()))
        self.assertEqual(bytes((PRESENT, 0, 0, 0, 0, 0)), self.marks())

    def test_what_is_fresh_is_forgotten_on_disk_before_the_file_passes_for_one_of_this_boot(self) -> None:
        self.leave()
        self.reboot()
        marks = self.marks

        class Watched(BrokenSystem):
            seen: list[tuple[bytes, bool]] = []

            def fdatasync(inner, fd: int) -> None:
                os.fdatasync(fd)
                inner.seen.append((marks(), b"another" in self.file().read_bytes()))

        self.patch(blobfile, "os", Watched())
        self.open()
        self.assertEqual([(bytes((PRESENT, 0, 0, 0, 0, 0)), new) for new in (False, True)], Watched.seen)

    def test_a_file_that_another_system_uses_is_refused(self) -> None:
        self.open()
        self.reboot()
        directory = CacheDirectory(self.reactor, self.pool, self.path, CHUNK)  # type: ignore[arg-type]
        opened = directory.open(digest_of(DATA), len(DATA))
        self.assertIn("--cache-dir", str(self.failureResultOf(opened, CacheError).value))


class VersionTests(CacheCase):
    def make(self, version: int) -> CachedBlob:
        self.patch(header, "VERSION", version)
        cached = self.open()
        self.store(cached, 0)
        self.successResultOf(cached.flush())
        self.patch(header, "VERSION", VERSION)
        return cached

    def test_a_file_of_a_newer_version_that_is_in_use_is_left_alone(self) -> None:
        self.make(VERSION + 1)
        before = self.file().read_bytes()
        directory = CacheDirectory(self.reactor, self.pool, self.path, CHUNK)  # type: ignore[arg-type]
        message = str(self.failureResultOf(directory.open(digest_of(DATA), len(DATA)), CacheError).value)
        self.assertIn("a newer erofs-twisted wrote it", message)
        self.assertIn("--cache-dir", message)
        self.assertEqual(before, self.file().read_bytes())

    def test_a_file_of_another_version_that_nobody_uses_is_made_anew_with_a_warning(self) -> None:
        for version in (VERSION - 1, VERSION + 1):
            self.successResultOf(self.make(version).close())
            self.events.clear()
            cached = self.open()
            self.assertEqual([], self.present(cached))
            self.assertEqual(1, len(self.logged(LogLevel.warn)))
            self.successResultOf(cached.close())

    def test_a_file_of_an_older_version_is_replaced_under_its_user(self) -> None:
        theirs = self.make(VERSION - 1)
        self.assertEqual([], self.present(self.open()))
        self.assertEqual(DATA[:CHUNK], os.pread(theirs.fd, CHUNK, 0))


class UsedFileTests(CacheCase):
    """What others do to a file while it is in use."""

    def test_a_file_that_is_cut_short_is_not_filled_up_with_zeros(self) -> None:
        cached = self.open()
        self.store(cached, 0, 1)
        os.truncate(self.file(), 100)
        self.assertFalse(cached.store(4, [DATA[4 * CHUNK : 5 * CHUNK]]))
        self.assertEqual([], self.present(cached))
        self.assertEqual(100, os.fstat(cached.fd).st_size)
        self.assertFalse(self.file().exists())
        self.assertEqual(1, len(self.logged(LogLevel.error)))
        self.successResultOf(cached.close())

    def test_a_file_that_is_cut_short_is_noticed_though_nothing_is_stored(self) -> None:
        cached = self.open()
        self.store(cached, *range(COUNT))
        os.truncate(self.file(), 100)
        self.reactor.advance(FLUSH_SECONDS)
        self.assertEqual([], self.present(cached))
        self.assertFalse(cached.chunks.complete)
        self.failureResultOf(cached.verify(), ReadError)

    def test_a_damaged_map_is_noticed(self) -> None:
        cached = self.open()
        self.store(cached, 0)
        with self.file().open("r+b") as file:
            file.seek(-TRAILER_SIZE - 1, os.SEEK_END)
            file.write(b"\x17")
        self.reactor.advance(FLUSH_SECONDS)
        self.assertEqual([], self.present(cached))
        self.assertFalse(cached.refresh(0, COUNT))
        self.assertTrue(cached.claim(0, COUNT))

    def test_a_blob_that_another_process_finds_corrupt_is_read_no_more(self) -> None:
        ours, theirs = self.open(), self.open()
        self.store(ours, *range(COUNT - 1))
        self.assertTrue(theirs.store(COUNT - 1, [b"x" * 100]))
        self.assertTrue(theirs.refresh(0, COUNT))
        self.assertIsInstance(theirs.error, CorruptBlob)
        self.assertIsNone(ours.error)
        self.reactor.advance(FLUSH_SECONDS)
        self.assertIsInstance(ours.error, CorruptBlob)
        self.assertEqual([], self.present(ours))


class DiskTests(CacheCase):
    def test_after_a_failed_sync_no_process_believes_what_was_fresh(self) -> None:
        ours, theirs = self.open(), self.open()
        self.store(theirs, 0)
        self.successResultOf(theirs.flush())
        self.store(theirs, 1)
        self.store(ours, 2)
        self.assertTrue(ours.refresh(0, COUNT))
        self.patch(blobfile, "os", BrokenSystem("fdatasync", code=errno.EIO))
        self.successResultOf(ours.flush())
        self.assertEqual(bytes((PRESENT, 0, 0, 0, 0, 0)), self.marks())
        self.assertEqual([0], self.present(ours))
        self.patch(blobfile, "os", os)
        self.successResultOf(theirs.flush())
        self.assertEqual([0], self.present(theirs))

    def test_a_file_in_which_nothing_can_be_taken_back_is_given_up(self) -> None:
        cached = self.open()
        self.store(cached, 0)
        self.patch(blobfile, "os", BrokenSystem("fdatasync", "pwritev", code=errno.EIO))
        self.successResultOf(cached.flush())
        self.assertEqual([], self.present(cached))
        self.assertFalse(self.file().exists())

    def test_a_full_disk_is_said_once_and_so_is_its_end(self) -> None:
        cached = self.open()
        self.patch(blobfile, "os", BrokenSystem("pwritev"))
        for chunk in range(3):
            self.assertFalse(cached.store(chunk, [b"x" * CHUNK]))
        self.assertEqual([], self.present(cached))
        self.assertEqual(1, len(self.logged(LogLevel.error)))
        self.patch(blobfile, "os", os)
        self.store(cached, 0, 1)
        self.assertEqual(1, len(self.logged(LogLevel.info)))

    def test_where_there_is_no_memory_for_a_while_nothing_is_kept_and_the_file_is_used_again(self) -> None:
        for code in (errno.ENOMEM, 0):
            cached = self.open()
            self.store(cached, 0)
            self.patch(blobfile, "os", BrokenSystem("pwritev", "pread", "preadv", "open", code=code))
            self.assertFalse(cached.store(1, [DATA[CHUNK : 2 * CHUNK]]))
            self.assertFalse(cached.refresh(0, COUNT))
            self.successResultOf(cached.flush())
            self.assertEqual([], self.present(cached), "it cannot be told what is safe")
            self.patch(blobfile, "os", os)
            self.successResultOf(cached.flush())
            self.assertEqual([0], self.present(cached))
            self.store(cached, 1)
            self.successResultOf(cached.close())
            self.assertEqual([], self.logged(LogLevel.critical))
            self.file().unlink()

    def test_where_there_is_no_memory_to_sync_what_was_fresh_is_fetched_again(self) -> None:
        for code in (errno.ENOMEM, 0):
            cached = self.open()
            self.store(cached, 0)
            self.patch(blobfile, "os", BrokenSystem("fdatasync", code=code))
            self.successResultOf(cached.flush())
            self.assertEqual([], self.present(cached))
            self.patch(blobfile, "os", os)
            self.store(cached, 0)
            self.successResultOf(cached.close())
            self.file().unlink()

    def test_a_short_write_goes_on_where_it_stopped(self) -> None:
        class ShortWrites(BrokenSystem):
            def pwritev(self, fd: int, pieces: list[bytes], offset: int) -> int:
                return os.pwrite(fd, b"".join(pieces)[:100], offset)

        cached = self.open()
        self.patch(blobfile, "os", ShortWrites())
        self.store(cached, 0)
        self.assertEqual(DATA[:CHUNK], os.pread(cached.fd, CHUNK, 0))

    def test_chunks_that_could_not_be_synced_are_there_no_more(self) -> None:
        cached = self.open()
        self.store(cached, 0)
        self.successResultOf(cached.flush())
        self.store(cached, 1, 2)
        self.patch(blobfile, "os", BrokenSystem("fdatasync", code=errno.EIO))
        self.successResultOf(cached.flush())
        self.assertEqual([0], self.present(cached))
        self.assertEqual(1, len(self.logged(LogLevel.error)))


class VerifyTests(CacheCase):
    def test_a_blob_is_hashed_as_soon_as_it_is_complete(self) -> None:
        self.store(self.open(), *range(COUNT))
        self.assertEqual(["the blob {digest} is complete, its digest is right"], self.logged(LogLevel.info))

    def test_verify_waits_for_the_verification_under_way(self) -> None:
        cached = self.open()
        self.pool.held = []
        self.store(cached, *range(COUNT))
        first, second = cached.verify(), cached.verify()
        self.assertNoResult(first)
        self.pool.run()
        self.successResultOf(first)
        self.successResultOf(second)
        self.assertEqual(1, len(self.logged(LogLevel.info)))

    def test_a_verified_blob_is_not_hashed_again_by_the_next_process(self) -> None:
        cached = self.open()
        self.store(cached, *range(COUNT))
        self.successResultOf(cached.close())
        self.events.clear()
        again = self.open()
        self.assertTrue(again.chunks.complete)
        self.successResultOf(again.verify())
        self.assertEqual([], self.logged(LogLevel.info))

    def test_a_complete_blob_that_nobody_verified_is_when_it_is_opened(self) -> None:
        cached = self.open()
        self.patch(blobfile, "os", BrokenSystem("preadv", code=errno.EIO))
        self.store(cached, *range(COUNT))
        self.successResultOf(cached.close())
        self.patch(blobfile, "os", os)
        self.events.clear()
        self.open()
        self.assertEqual(1, len(self.logged(LogLevel.info)))

    def test_without_memory_to_hash_it_who_waits_is_told_and_it_is_hashed_when_it_is_asked_for_again(
        self,
    ) -> None:
        for code in (errno.ENOMEM, 0):
            self.patch(blobfile, "os", BrokenSystem("preadv", code=code))
            cached = self.open()
            self.store(cached, *range(COUNT))
            asked = self.verify(cached)
            self.failureResultOf(asked, ReadError)
            self.patch(blobfile, "os", os)
            self.successResultOf(self.verify(cached))
            self.successResultOf(cached.close())
            self.file().unlink()

    def test_who_waits_for_the_hash_and_who_closes_are_told_whatever_goes_wrong(self) -> None:
        self.patch(BlobFile, "verify", lambda *_: 1 / 0)
        cached = self.open()
        self.pool.held = []
        self.store(cached, *range(COUNT))
        asked, closed = cached.verify(), cached.close()
        self.pool.run()
        self.failureResultOf(asked, ReadError)
        self.successResultOf(closed)
        self.assertEqual(1, len(self.flushLoggedErrors(ZeroDivisionError)))

    def verify(self, cached: CachedBlob) -> Deferred[None]:
        self.pool.held = []
        asked = cached.verify()
        self.pool.run()
        return asked

    def test_an_incomplete_blob_cannot_be_verified(self) -> None:
        self.failureResultOf(self.open().verify(), ReadError)

    def test_wrong_bytes_poison_the_blob_and_drop_its_file(self) -> None:
        cached = self.open(digest=digest_of(DATA))
        self.store(cached, *range(COUNT - 1))
        self.assertTrue(cached.store(COUNT - 1, [b"x" * 100]))
        self.assertIsInstance(cached.error, CorruptBlob)
        self.assertEqual([], self.present(cached))
        self.assertEqual(1, len(self.logged(LogLevel.critical)))
        self.assertFalse(self.file().exists())
        self.failureResultOf(cached.verify(), CorruptBlob)
        self.assertFalse(cached.store(0, [DATA[:CHUNK]]))
        self.successResultOf(cached.close())

    def test_the_one_who_asked_hears_of_wrong_bytes(self) -> None:
        cached = self.open()
        self.pool.held = []
        for chunk in range(COUNT):
            cached.store(chunk, [bytes(cached.chunking.length(chunk))])
        asked = cached.verify()
        self.pool.run()
        self.failureResultOf(asked, CorruptBlob)

    def test_a_poisoned_blob_does_not_take_its_successors_file_along(self) -> None:
        cached = self.open()
        self.pool.held = []
        for chunk in range(COUNT):
            cached.store(chunk, [bytes(cached.chunking.length(chunk))])
        self.file().unlink()
        self.file().write_bytes(b"of another process")
        self.pool.run()
        self.assertTrue(self.file().exists())

    def test_close_gives_up_a_verification_under_way(self) -> None:
        cached = self.open()
        self.pool.held = []
        self.store(cached, *range(COUNT))
        asked = cached.verify()
        closed = cached.close()
        self.pool.run()
        self.failureResultOf(asked, ReadError)
        self.successResultOf(closed)

    def test_an_empty_blob_is_complete(self) -> None:
        cached = self.open(b"")
        self.assertTrue(cached.chunks.complete)
        self.successResultOf(cached.verify())
