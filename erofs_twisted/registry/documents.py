"""Manifests and indexes by digest, beside the cache of blobs: what never changes is asked for once."""

from __future__ import annotations

import os
from contextlib import suppress
from typing import Any

import attrs
from twisted.internet.threads import deferToThreadPool
from twisted.logger import Logger
from twisted.python.threadpool import ThreadPool

from erofs_twisted.files import replace_file
from erofs_twisted.registry.digest import Digest
from erofs_twisted.registry.errors import DigestMismatch
from erofs_twisted.registry.manifest import MAX_MANIFEST
from erofs_twisted.registry.resolution import Document, check_content

DIRECTORY = "manifests"
_MAX_MEDIA_TYPE = 255
"""RFC 6838 allows 127 characters for each half."""


class DamagedDocument(Exception):
    """A file holds no document."""


@attrs.frozen
class DocumentFiles:
    """The documents below a cache directory: ``manifests/sha256/HEX`` is the one of that digest.

    A file is the media type, a newline, then the bytes as they came. It is checked each time it is read.
    """

    reactor: Any
    pool: ThreadPool
    cache_dir: str
    _log = Logger()

    async def get(self, digest: Digest) -> Document | None:
        """The document, if it is there and is what its name says."""
        path = self._path(digest)
        try:
            return await deferToThreadPool(self.reactor, self.pool, _read, path, digest)
        except FileNotFoundError:
            return None
        except (OSError, DamagedDocument, DigestMismatch) as error:
            self._log.warn("the cached manifest {path} is not used: {reason}", path=path, reason=str(error))
            return None

    async def put(self, document: Document) -> None:
        """Keep a document. That it cannot be kept is logged, and no error."""
        path = self._path(document.digest)
        try:
            await deferToThreadPool(self.reactor, self.pool, _write, path, document)
        except OSError as error:
            self._log.warn("the manifest {path} is not kept: {reason}", path=path, reason=str(error))

    def _path(self, digest: Digest) -> str:
        return os.path.join(self.cache_dir, DIRECTORY, digest.algorithm, digest.encoded)


def _read(path: str, digest: Digest) -> Document:
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    with open(fd, "rb") as file:
        content = file.read(_MAX_MEDIA_TYPE + 1 + MAX_MANIFEST + 1)
    media_type, newline, data = content.partition(b"\n")
    if not newline or len(media_type) > _MAX_MEDIA_TYPE or not media_type.isascii():
        raise DamagedDocument("it does not begin with a media type")
    check_content("it", data, digest, None)
    return Document(digest, media_type.decode("ascii"), data)


def _write(path: str, document: Document) -> None:
    media_type = document.media_type.encode("ascii", "replace")
    if len(media_type) > _MAX_MEDIA_TYPE or b"\n" in media_type:
        return
    # Not durable: somebody waits for the mount, and what a crash leaves of it is checked.
    replace_file(path, media_type + b"\n" + document.data, durable=False)


def discard_documents(cache_dir: str, before: float) -> None:
    """Remove the documents put there before a time (seconds since 1970). Blocks; raises OSError."""
    for directory, _, names in os.walk(os.path.join(cache_dir, DIRECTORY)):
        for name in names:
            path = os.path.join(directory, name)
            with suppress(FileNotFoundError):
                if os.stat(path, follow_symlinks=False).st_mtime < before:
                    os.unlink(path)
