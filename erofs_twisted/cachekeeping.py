"""The cache, for its operator: what is in it, is that right, and what can go. All of it blocks."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import attrs
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn
from rich.table import Table

from erofs_twisted.blocks.blobfile import OtherDigest, UsedElsewhere
from erofs_twisted.blocks.cached import FLUSH_SECONDS
from erofs_twisted.blocks.cachefiles import CacheError, CacheFiles, Entry
from erofs_twisted.blocks.header import BlobIdentity, DamagedFile
from erofs_twisted.blocks.survey import Blob, Holding, survey
from erofs_twisted.errors import MountError
from erofs_twisted.registry.digest import Digest
from erofs_twisted.registry.documents import discard_documents

WIDTH = 200
DAY = 86400.0


def blobs_in(cache_dir: Path) -> list[Blob]:
    """All blobs, the least recently used first. Raises `CacheError`."""
    with _files(cache_dir) as files:
        return survey(files)


def as_dict(cache_dir: Path, blobs: Sequence[Blob]) -> dict[str, Any]:
    """For JSON: sizes in bytes, times in UTC; what a file does not tell is null."""
    return {
        "path": str(cache_dir),
        "allocated": _allocated(blob.entry for blob in blobs),
        "blobs": [
            {
                "digest": blob.entry.digest,
                "size": blob.identity.chunking.size if blob.identity else None,
                "present": blob.present if blob.identity else None,
                "allocated": blob.entry.allocated,
                "state": blob.holding.value,
                "problem": blob.problem or None,
                "in_use": blob.entry.in_use,
                "last_used": datetime.fromtimestamp(int(blob.entry.last_used), UTC).isoformat(),
            }
            for blob in blobs
        ],
    }


def show(blobs: Sequence[Blob], console: Console | None = None) -> None:
    """Print a table, as wide as it takes: a digest that is cut short is of no use."""
    console = console or Console(width=WIDTH, highlight=False)
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("size", "there", "on disk"):
        table.add_column(name, justify="right", no_wrap=True)
    for name in ("state", "in use", "last used", "digest"):
        table.add_column(name, no_wrap=True)
    for blob in blobs:
        table.add_row(
            readable(blob.identity.chunking.size) if blob.identity else "?",
            readable(blob.present) if blob.identity else "?",
            readable(blob.entry.allocated),
            blob.holding.value,
            "yes" if blob.entry.in_use else "no",
            f"{datetime.fromtimestamp(blob.entry.last_used):%Y-%m-%d %H:%M}",
            blob.entry.digest,
        )
    console.print(table)
    console.print(f"{count(len(blobs))}, {readable(_allocated(blob.entry for blob in blobs))} on disk")


def verify(cache_dir: Path, digests: Sequence[str], say: Callable[[str], None]) -> int:
    """Hash what is complete, of these blobs or of all, and drop what is wrong; how many that are.

    ``say`` gets a line for each blob. Raises `CacheError`, or `MountError` for a digest that is not there.
    """
    wanted = [Digest.parse(text) for text in digests]
    blobs = blobs_in(cache_dir)
    if missing := set(wanted) - {blob.entry.digest for blob in blobs}:
        raise MountError(f"{cache_dir} has no blob {min(missing)}; 'erofs-nbd cache ls' lists those it has")
    chosen = [blob for blob in blobs if not wanted or blob.entry.digest in wanted]
    wrong = 0
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(True), TransferSpeedColumn())
    console = Console(stderr=True)
    progress = Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
    with progress, _files(cache_dir) as files:
        for blob in chosen:
            verdict = _verify(files, blob, progress)
            wrong += verdict.wrong
            say(f"{blob.entry.digest}  {verdict.text}")
    return wrong


def prune(
    cache_dir: Path,
    *,
    everything: bool = False,
    size: int | None = None,
    older_than: float | None = None,
    dry_run: bool = False,
) -> str:
    """Remove blobs that are not in use: all, or those unused for ``older_than`` days and then the least
    recently used until no more than ``size`` bytes are taken. What was done, in a line. Raises `CacheError`.
    """
    with _files(cache_dir) as files:
        entries = sorted(files.entries(), key=lambda entry: entry.last_used)
    now = time.time()
    before = now + DAY if everything else now - older_than * DAY if older_than is not None else 0.0
    chosen = [entry for entry in entries if entry.last_used < before]
    if size is not None:
        chosen += _beyond(size, [entry for entry in entries if entry not in chosen], chosen)
    idle = [entry for entry in chosen if not entry.in_use]
    gone = idle
    if not dry_run:
        with _files(cache_dir) as files:
            gone = [entry for entry in idle if files.evict(entry)]
            discard_documents(files.path, before)
    kept = [entry for entry in entries if entry not in gone]
    used = sum(entry not in gone for entry in chosen)
    return (
        f"{count(len(gone))}, {readable(_allocated(gone))}, {'would go' if dry_run else 'removed'}; "
        f"{count(len(kept))}, {readable(_allocated(kept))}, left"
        + (f" ({used} of them only for being in use)" if used else "")
    )


def count(blobs: int) -> str:
    """So many blobs."""
    return "1 blob" if blobs == 1 else f"{blobs} blobs"


def readable(size: int) -> str:
    """Bytes, for people."""
    number, unit = float(size), "B"
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if number < 1024 or unit == "TiB":
            break
        number /= 1024
    return f"{number:.0f} {unit}" if unit == "B" else f"{number:.1f} {unit}"


@attrs.frozen
class _Verdict:
    wrong: bool
    text: str


def _verify(files: CacheFiles, blob: Blob, progress: Progress) -> _Verdict:
    if blob.holding is Holding.OTHER_VERSION:
        return _Verdict(False, f"not checked: {blob.problem}")
    if blob.holding is Holding.PARTIAL:
        return _Verdict(False, f"not checked: only {_share(blob)} of it is there")
    identity = blob.identity
    if identity is None or blob.holding not in (Holding.VERIFIED, Holding.COMPLETE):
        return _Verdict(True, _dropped_or_not(blob, files.evict(blob.entry), blob.problem))
    try:
        return _hash(files, blob.entry, identity, progress)
    except FileNotFoundError:
        return _Verdict(False, "gone meanwhile")
    except DamagedFile as error:
        return _Verdict(True, _dropped_or_not(blob, files.evict(blob.entry), str(error)))
    except UsedElsewhere:
        return _Verdict(False, "not checked: another system uses it")


def _hash(files: CacheFiles, entry: Entry, identity: BlobIdentity, progress: Progress) -> _Verdict:
    file, chunks = files.open_again(entry, identity)
    task = progress.add_task(escape(f"{entry.digest[:19]}…"), total=identity.chunking.size)
    try:
        # After this all marks are safe, as `note_verified` wants it; and the pages can be let go of.
        if not file.sync(chunks).there.complete:
            return _Verdict(False, "not checked: parts of it have been lost")
        file.forget_pages()
        try:
            file.hash(lambda: False, lambda count: progress.advance(task, count))
        except OtherDigest as error:
            file.poison()
            files.remove(file, entry.path)
            then = f"; mounts that use it fail its reads within {FLUSH_SECONDS:g} s" if entry.in_use else ""
            return _Verdict(True, f"CORRUPT, dropped: {error}{then}")
        file.note_verified()
        return _Verdict(False, "right")
    finally:
        progress.remove_task(task)
        file.close()
        if not entry.in_use:
            # To be checked is not to be used.
            with suppress(FileNotFoundError):
                os.utime(entry.path, (entry.last_used, entry.last_used))


def _dropped_or_not(blob: Blob, dropped: bool, problem: str) -> str:
    what = "dropped" if dropped else "in use, left alone"
    return f"{blob.holding.value.upper()}, {what}: {problem}"


def _share(blob: Blob) -> str:
    size = blob.identity.chunking.size if blob.identity else 0
    return f"{100 * blob.present // max(size, 1)} %"


def _beyond(size: int, entries: Iterable[Entry], gone: Sequence[Entry]) -> list[Entry]:
    """The first of these that have to go for no more than ``size`` bytes to be left, of what is idle."""
    entries = list(entries)
    excess = _allocated(entries) + sum(entry.allocated for entry in gone if entry.in_use) - size
    chosen = []
    for entry in entries:
        if excess <= 0:
            break
        chosen.append(entry)
        if not entry.in_use:
            excess -= entry.allocated
    return chosen


def _allocated(entries: Iterable[Entry]) -> int:
    return sum(entry.allocated for entry in entries)


@contextmanager
def _files(cache_dir: Path) -> Iterator[CacheFiles]:
    """The directory's files. Raises `CacheError`, also for what goes wrong with them meanwhile."""
    files = CacheFiles(str(cache_dir))
    try:
        if not cache_dir.is_dir():
            raise CacheError(f"there is no directory {cache_dir}; --cache-dir names the cache's")
        yield files
    except OSError as error:
        raise files.unusable(error) from error
