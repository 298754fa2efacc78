"""Exports for tests: over a file, over bytes, and one whose reads a test decides."""

from __future__ import annotations

import os
from collections.abc import Sequence

from twisted.internet.defer import Deferred, succeed
from zope.interface import implementer

from erofs_twisted.interfaces import FileSpan, IExport, Segment


@implementer(IExport)
class FileExport:
    """A plain file, all of it at hand. ``holes`` are its (offset, length) that are said to read as zeros."""

    def __init__(self, path: str, name: str = "", holes: Sequence[tuple[int, int]] = ()) -> None:
        self.name = name
        self.description = f"the file {os.path.basename(path)}"
        self.fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        self.size = os.fstat(self.fd).st_size
        self.prefetched: list[tuple[int, int]] = []
        self._edges = sorted({0, self.size, *(edge for o, n in holes for edge in (o, o + n))})
        self._holes = {offset for offset, _ in holes}

    def read(self, offset: int, length: int) -> list[Segment]:
        return [FileSpan(self.fd, offset, length)]

    def prefetch(self, offset: int, length: int) -> Deferred[None]:
        self.prefetched.append((offset, length))
        return succeed(None)

    def extents(self, offset: int, length: int) -> list[tuple[int, bool]]:
        end = offset + length
        found = []
        for start, stop in zip(self._edges, self._edges[1:], strict=False):
            overlap = min(stop, end) - max(start, offset)
            if overlap > 0:
                found.append((overlap, start in self._holes))
        return found

    def close(self) -> None:
        os.close(self.fd)


@implementer(IExport)
class BytesExport:
    """Bytes in memory, all at hand, the first half of each page called data, the second a hole."""

    def __init__(self, content: bytes, name: str = "app", description: str = "an application") -> None:
        self.name = name
        self.description = description
        self.content = content
        self.size = len(content)
        self.prefetched: list[tuple[int, int]] = []

    def read(self, offset: int, length: int) -> list[Segment]:
        return [self.content[offset : offset + length]]

    def prefetch(self, offset: int, length: int) -> Deferred[None]:
        self.prefetched.append((offset, length))
        return succeed(None)

    def extents(self, offset: int, length: int) -> list[tuple[int, bool]]:
        found = []
        while length > 0:
            within = offset % 4096
            piece = min(length, 2048 - within % 2048)
            found.append((piece, within >= 2048))
            offset += piece
            length -= piece
        return found


@implementer(IExport)
class SlowExport(BytesExport):
    """Its reads and prefetches end when a test says so; ``reads`` holds what is under way, in order."""

    def __init__(self, content: bytes, name: str = "slow") -> None:
        super().__init__(content, name)
        self.reads: list[SlowRead] = []
        self.cancelled = 0

    def read(self, offset: int, length: int) -> Deferred[list[Segment]]:  # type: ignore[override]
        deferred: Deferred[list[Segment]] = Deferred(self._cancel)
        self.reads.append(SlowRead(self, deferred, offset, length))
        return deferred

    def prefetch(self, offset: int, length: int) -> Deferred[None]:
        deferred: Deferred[None] = Deferred(self._cancel)
        self.prefetched.append((offset, length))
        self.reads.append(SlowRead(self, deferred, offset, length))
        return deferred

    def _cancel(self, _: Deferred[object]) -> None:
        self.cancelled += 1


class SlowRead:
    """One read under way."""

    def __init__(self, export: SlowExport, deferred: Deferred, offset: int, length: int) -> None:
        self._export = export
        self.deferred = deferred
        self.offset = offset
        self.length = length

    def finish(self) -> None:
        self.deferred.callback([self._export.content[self.offset : self.offset + self.length]])

    def fail(self, error: Exception) -> None:
        self.deferred.errback(error)
