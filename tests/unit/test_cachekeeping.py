"""The cache's commands: ls, verify, prune."""

from __future__ import annotations

import io
import json
import os
import time
from datetime import datetime
from pathlib import Path
from typing import Any

from click.testing import CliRunner, Result
from rich.console import Console
from twisted.trial.unittest import SynchronousTestCase

from erofs_twisted import cachekeeping
from erofs_twisted.blocks import blobfile, header, survey
from erofs_twisted.blocks.cache import CacheDirectory
from erofs_twisted.blocks.cached import FLUSH_SECONDS, CachedBlob, CorruptBlob
from erofs_twisted.blocks.header import TRAILER_SIZE, VERSION
from erofs_twisted.cli import commands
from erofs_twisted.errors import ErofsTwistedError
from tests.unit.blobs import ThreadlessPool, ThreadlessReactor, blob, digest_of

CHUNK = 4096
COUNT = 4
SIZE = COUNT * CHUNK - 100
TAKEN = COUNT * CHUNK + 8192


class CacheCase(SynchronousTestCase):
    def setUp(self) -> None:
        self.path = Path(self.mktemp())
        self.reactor = ThreadlessReactor()

    def open(self, seed: int, *chunks: int, close: bool = False, age: float = 0.0) -> CachedBlob:
        """A blob of which these chunks are there, last used ``age`` days ago."""
        data = blob(SIZE, seed)
        directory = CacheDirectory(self.reactor, ThreadlessPool(), str(self.path), CHUNK)  # type: ignore[arg-type]
        cached = self.successResultOf(directory.open(digest_of(data), SIZE))
        for chunk in chunks:
            self.assertTrue(cached.store(chunk, [data[chunk * CHUNK : (chunk + 1) * CHUNK]]))
        self.successResultOf(cached.flush())
        if close:
            self.successResultOf(cached.close())
        used = time.time() - age * cachekeeping.DAY
        os.utime(self.file(seed), (used, used))
        return cached

    def leave(self, seed: int, *chunks: int, age: float = 0.0) -> None:
        self.open(seed, *(chunks or range(COUNT)), close=True, age=age)

    def name(self, seed: int) -> str:
        return digest_of(blob(SIZE, seed))

    def file(self, seed: int) -> Path:
        return self.path / "sha256" / self.name(seed).partition(":")[2]

    def there(self, *seeds: int) -> list[int]:
        return [seed for seed in seeds if self.file(seed).exists()]

    def change(self, seed: int, offset: int, data: bytes = b"\x01") -> None:
        with self.file(seed).open("r+b") as file:
            file.seek(offset, os.SEEK_END if offset < 0 else os.SEEK_SET)
            file.write(data)

    def run_command(self, *words: str) -> Result:
        return CliRunner().invoke(commands, ["cache", *words, "--cache-dir", str(self.path)])

    def refusal(self, *words: str) -> str:
        error = self.run_command(*words).exception
        assert isinstance(error, ErofsTwistedError), error
        return str(error)


class ListTests(CacheCase):
    def rows(self) -> dict[str, dict[str, Any]]:
        result = self.run_command("ls", "--json")
        self.assertEqual(0, result.exit_code, result.output)
        listed = json.loads(result.output)
        self.assertEqual(str(self.path.absolute()), listed["path"])
        return {row["digest"]: row for row in listed["blobs"]}

    def test_it_tells_how_much_is_there_and_in_use(self) -> None:
        self.leave(1, 0, 3)
        self.open(2, *range(COUNT))
        rows = self.rows()
        one, two = rows[self.name(1)], rows[self.name(2)]
        self.assertEqual((SIZE, CHUNK + CHUNK - 100, "partial"), (one["size"], one["present"], one["state"]))
        self.assertEqual((SIZE, SIZE, "verified"), (two["size"], two["present"], two["state"]))
        self.assertEqual((False, True), (one["in_use"], two["in_use"]))
        self.assertEqual((2 * CHUNK + 8192, TAKEN), (one["allocated"], two["allocated"]))
        self.assertEqual((None, None), (one["problem"], two["problem"]))

    def test_a_blob_that_nobody_verified_is_only_complete(self) -> None:
        self.patch(blobfile.BlobFile, "verify", lambda *_: False)
        self.leave(1)
        self.assertEqual("complete", self.rows()[self.name(1)]["state"])

    def test_the_least_recently_used_come_first_with_the_time_in_utc(self) -> None:
        for seed, age in ((1, 1), (2, 3), (3, 2)):
            self.leave(seed, age=age)
        rows = self.rows()
        self.assertEqual([self.name(seed) for seed in (2, 3, 1)], list(rows))
        used = datetime.fromisoformat(rows[self.name(2)]["last_used"]).timestamp()
        self.assertLess(abs(time.time() - 3 * cachekeeping.DAY - used), 60)

    def test_what_cannot_be_used_is_listed_with_the_reason(self) -> None:
        for seed in range(1, 6):
            self.leave(seed)
        self.change(1, -1)
        self.change(2, -TRAILER_SIZE - 1)
        os.truncate(self.file(3), 10)
        self.change(
            4, header.BlobIdentity(self.name(4), header.Chunking(SIZE, CHUNK)).header_offset + 254, b"\xc5"
        )  # type: ignore[arg-type]
        self.file(5).write_bytes(self.file(1).read_bytes())
        rows = self.rows()
        states = [rows[self.name(seed)]["state"] for seed in range(1, 6)]
        self.assertEqual(["damaged", "damaged", "damaged", "corrupt", "damaged"], states)
        self.assertTrue(all(row["problem"] for row in rows.values()))

    def test_a_newer_version_is_named(self) -> None:
        self.patch(header, "VERSION", VERSION + 1)
        self.leave(1)
        self.patch(header, "VERSION", VERSION)
        row = self.rows()[self.name(1)]
        self.assertEqual(("other version", None), (row["state"], row["size"]))
        self.assertIn("a newer erofs-twisted", row["problem"])

    def test_what_was_fresh_in_another_boot_is_not_there(self) -> None:
        cached = self.open(1)
        cached.store(0, [blob(SIZE, 1)[:CHUNK]])
        self.assertEqual(CHUNK, self.rows()[self.name(1)]["present"])
        self.patch(blobfile, "boot_id", lambda: b"another".ljust(36))
        self.patch(survey, "boot_id", lambda: b"another".ljust(36))
        self.assertEqual(0, self.rows()[self.name(1)]["present"])

    def test_for_people_it_is_a_table_with_a_sum(self) -> None:
        self.leave(1)
        self.leave(2, 0)
        out = io.StringIO()
        cachekeeping.show(cachekeeping.blobs_in(self.path), Console(file=out, width=200))
        lines = out.getvalue().splitlines()
        self.assertIn("last used", lines[0])
        self.assertIn(self.name(1), out.getvalue())
        self.assertEqual("2 blobs, 36.0 KiB on disk", lines[-1])

    def test_a_directory_that_is_not_there_is_an_error_with_the_cure(self) -> None:
        for words in (("ls",), ("verify",), ("prune", "--all")):
            self.assertIn("--cache-dir", self.refusal(*words))

    def test_a_directory_that_others_may_write_to_is_refused(self) -> None:
        self.leave(1)
        os.chmod(self.path, 0o777)
        for words in (("ls",), ("verify",), ("prune", "--all")):
            self.assertIn("cannot be trusted", self.refusal(*words))
        self.assertEqual([1], self.there(1))


class VerifyTests(CacheCase):
    def test_what_is_right_stays_and_passes_for_verified(self) -> None:
        self.patch(blobfile.BlobFile, "verify", lambda *_: False)
        self.leave(1, age=5)
        result = self.run_command("verify")
        self.assertEqual((0, f"{self.name(1)}  right\n"), (result.exit_code, result.output))
        (found,) = cachekeeping.blobs_in(self.path)
        self.assertEqual("verified", found.holding.value)

    def test_to_be_verified_is_not_to_be_used(self) -> None:
        self.leave(1, age=5)
        self.run_command("verify")
        self.assertLess(abs(time.time() - 5 * cachekeeping.DAY - self.file(1).stat().st_mtime), 60)

    def test_a_flipped_bit_is_found_though_the_blob_was_verified_before(self) -> None:
        self.leave(1)
        self.leave(2)
        self.change(2, 5000)
        result = self.run_command("verify")
        self.assertIsInstance(result.exception, ErofsTwistedError)
        self.assertIn(f"{self.name(2)}  CORRUPT, dropped", result.output)
        self.assertEqual([1], self.there(1, 2))

    def test_a_mount_that_uses_a_corrupt_blob_stops_serving_it(self) -> None:
        cached = self.open(1, *range(COUNT))
        self.change(1, 5000)
        output = self.run_command("verify").output
        self.assertIn(f"fail its reads within {FLUSH_SECONDS:g} s", output)
        self.assertIsNone(cached.error)
        self.reactor.advance(FLUSH_SECONDS)
        self.assertIsInstance(cached.error, CorruptBlob)
        self.assertFalse(cached.chunks.complete)
        self.assertEqual([], self.there(1))

    def test_what_is_not_complete_cannot_be_checked(self) -> None:
        self.leave(1, 0, 1)
        result = self.run_command("verify")
        self.assertEqual(0, result.exit_code)
        self.assertIn("not checked: only 50 % of it is there", result.output)
        self.assertEqual([1], self.there(1))

    def test_a_damaged_map_is_dropped(self) -> None:
        self.leave(1)
        self.change(1, -TRAILER_SIZE - 1, b"\x55")
        result = self.run_command("verify")
        self.assertIsInstance(result.exception, ErofsTwistedError)
        self.assertIn("DAMAGED, dropped", result.output)
        self.assertEqual([], self.there(1))

    def test_a_newer_version_is_left_alone(self) -> None:
        self.patch(header, "VERSION", VERSION + 1)
        self.leave(1)
        self.patch(header, "VERSION", VERSION)
        result = self.run_command("verify")
        self.assertEqual(0, result.exit_code)
        self.assertIn("not checked: a newer", result.output)
        self.assertEqual([1], self.there(1))

    def test_only_what_is_named_is_checked(self) -> None:
        self.leave(1)
        self.leave(2)
        self.change(2, 0)
        self.assertEqual(f"{self.name(1)}  right\n", self.run_command("verify", self.name(1)).output)
        self.assertEqual([1, 2], self.there(1, 2))

    def test_names_of_nothing_are_errors(self) -> None:
        self.leave(1)
        self.assertIn("has no blob", self.refusal("verify", self.name(9)))
        self.assertIn("is not a digest", self.refusal("verify", "sha256:../../x"))


class PruneTests(CacheCase):
    def test_all_goes_but_what_is_in_use(self) -> None:
        self.leave(1)
        self.open(2, 0)
        (self.path / "manifests" / "sha256").mkdir(parents=True)
        manifest = self.path / "manifests" / "sha256" / "x"
        manifest.write_bytes(b"")
        output = self.run_command("prune", "--all").output
        self.assertEqual([2], self.there(1, 2))
        self.assertFalse(manifest.exists())
        self.assertIn("1 blob, 24.0 KiB, removed; 1 blob, ", output)
        self.assertIn("(1 of them only for being in use)", output)

    def test_what_was_not_used_for_long_goes(self) -> None:
        for seed, age in ((1, 1), (2, 8), (3, 30)):
            self.leave(seed, age=age)
        self.run_command("prune", "--older-than", "7")
        self.assertEqual([1], self.there(1, 2, 3))

    def test_the_least_recently_used_go_until_the_rest_is_small_enough(self) -> None:
        for seed, age in ((1, 1), (2, 8), (3, 30)):
            self.leave(seed, age=age)
        self.run_command("prune", "--size", str(2 * TAKEN))
        self.assertEqual([1, 2], self.there(1, 2, 3))
        self.run_command("prune", "--size", str(TAKEN + TAKEN - 1))
        self.assertEqual([1], self.there(1, 2, 3))

    def test_what_is_in_use_counts_and_others_go_for_it(self) -> None:
        self.open(1, *range(COUNT), age=30)
        self.leave(2, age=2)
        self.leave(3, age=1)
        self.run_command("prune", "--size", str(2 * TAKEN))
        self.assertEqual([1, 3], self.there(1, 2, 3))

    def test_age_and_size_go_together(self) -> None:
        for seed, age in ((1, 1), (2, 2), (3, 30)):
            self.leave(seed, age=age)
        self.run_command("prune", "--size", str(TAKEN), "--older-than", "7")
        self.assertEqual([1], self.there(1, 2, 3))

    def test_a_dry_run_removes_nothing(self) -> None:
        self.leave(1)
        self.assertIn("1 blob, 24.0 KiB, would go", self.run_command("prune", "--all", "--dry-run").output)
        self.assertEqual([1], self.there(1))

    def test_files_that_are_no_blobs_stay(self) -> None:
        self.leave(1)
        strangers = [self.path / "notes", self.path / "sha256" / ".tmp", self.path / "traces"]
        for stranger in strangers:
            stranger.write_bytes(b"")
        self.run_command("prune", "--all")
        self.assertTrue(all(stranger.exists() for stranger in strangers))

    def test_what_is_to_go_must_be_said(self) -> None:
        self.leave(1)
        for words in ((), ("--all", "--size", "1G"), ("--dry-run",)):
            self.assertIn("say what is to go", self.refusal("prune", *words))
        self.assertIn("--size", self.refusal("prune", "--size", "much"))
        self.assertNotEqual(0, self.run_command("prune", "--older-than", "-1").exit_code)
        self.assertEqual([1], self.there(1))
