"""Where traces are kept: beside the cache of the blobs that they are of."""

from __future__ import annotations

import os
from datetime import UTC, datetime

import attrs
from twisted.logger import Logger

from erofs_twisted.blocks.trace import MAX_ENCODED, InvalidTrace, Trace
from erofs_twisted.files import replace_file

DIRECTORY = "traces"


@attrs.frozen
class TraceFiles:
    """The traces below a cache directory: ``traces/sha256/HEX`` is that of the blob ``sha256:HEX``."""

    cache_dir: str
    _log = Logger()

    def path(self, digest: str) -> str:
        """Where the trace of a blob is, or would be."""
        algorithm, _, encoded = digest.partition(":")
        return os.path.join(self.cache_dir, DIRECTORY, algorithm, encoded)

    def load(self, digest: str, size: int) -> Trace | None:
        """The trace of a blob, if there is one that can be used."""
        path = self.path(digest)
        try:
            with open(
                os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOFOLLOW), "rb"
            ) as file:
                trace = Trace.decode(file.read(MAX_ENCODED + 1))
            if (trace.digest, trace.size) != (digest, size):
                raise InvalidTrace(f"it is of {trace.digest}, {trace.size} bytes")
        except FileNotFoundError:
            return None
        except (OSError, InvalidTrace) as error:
            self._log.warn("the trace {path} is not used: {reason}", path=path, reason=str(error))
            return None
        return trace

    def save(self, trace: Trace, durable: bool = True) -> None:
        """Put a trace in the place of what was there, in one step; where it is to be ``durable``, on disk.

        Raises OSError.
        """
        replace_file(self.path(trace.digest), trace.encode(), durable=durable)

    def saved_at(self, digest: str) -> datetime:
        """When the trace of a blob was put there. Raises OSError."""
        return datetime.fromtimestamp(int(os.stat(self.path(digest)).st_mtime), UTC)
