"""What the cache holds of each blob, as its files say. Nothing is changed, and all of it blocks."""

from __future__ import annotations

import os
from enum import Enum

import attrs

from erofs_twisted.blocks.blobfile import boot_id
from erofs_twisted.blocks.cachefiles import CacheFiles, Entry
from erofs_twisted.blocks.chunks import ChunkMap
from erofs_twisted.blocks.header import (
    BLOCK,
    TRAILER_SIZE,
    BlobIdentity,
    DamagedFile,
    OtherVersion,
    State,
    find_header,
    read_header,
)


class Holding(Enum):
    """How much of a blob a file holds."""

    VERIFIED = "verified"
    """All of it; its digest was found to be right."""
    COMPLETE = "complete"
    """All of it; nobody has checked it."""
    PARTIAL = "partial"
    """Some of it, or nothing."""
    CORRUPT = "corrupt"
    """Its digest was found to be wrong."""
    DAMAGED = "damaged"
    """It cannot be used, and is made anew when the blob is needed."""
    OTHER_VERSION = "other version"
    """Likewise, but another erofs-twisted may use it."""


@attrs.frozen
class Blob:
    """A file of the cache, and what it holds."""

    entry: Entry
    holding: Holding
    identity: BlobIdentity | None = None
    present: int = 0
    """Bytes of the blob that are there."""
    problem: str = ""
    """Why it cannot be used."""


def survey(files: CacheFiles) -> list[Blob]:
    """All blobs in a cache directory, the least recently used first. Raises OSError, `CacheError`."""
    blobs = []
    for entry in sorted(files.entries(), key=lambda entry: entry.last_used):
        try:
            blobs.append(_look(entry))
        except FileNotFoundError:
            continue
        except OtherVersion as error:
            blobs.append(Blob(entry, Holding.OTHER_VERSION, problem=str(error)))
        except DamagedFile as error:
            blobs.append(Blob(entry, Holding.DAMAGED, problem=str(error)))
    return blobs


def _look(entry: Entry) -> Blob:
    fd = os.open(entry.path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    try:
        size = os.fstat(fd).st_size
        offset = find_header(os.pread(fd, TRAILER_SIZE, max(size - TRAILER_SIZE, 0)))
        block = os.pread(fd, BLOCK, offset)
        identity = read_header(block)
        if (identity.digest, identity.header_offset, identity.file_size) != (entry.digest, offset, size):
            raise DamagedFile("its header is that of another file")
        state = State.of(block)
        marks = os.pread(fd, identity.chunking.count, identity.marks_offset)
    finally:
        os.close(fd)
    try:
        chunks = ChunkMap.from_marks(marks, with_fresh=state.boot == boot_id())
    except ValueError as error:
        raise DamagedFile(f"its map is none: {error}") from error
    present = sum(identity.chunking.length(*run) for run in chunks.runs_present(0, len(chunks)))
    if state.poisoned:
        return Blob(entry, Holding.CORRUPT, identity, present, "its digest was found to be wrong")
    if not chunks.complete:
        if state.verified:
            raise DamagedFile("it was verified, but is not complete")
        return Blob(entry, Holding.PARTIAL, identity, present)
    return Blob(entry, Holding.VERIFIED if state.verified else Holding.COMPLETE, identity, present)
