"""What to fetch beside what a reader asks for. No I/O: a range was read, these ranges are worth having.

A kernel reads an image in several places at once: a directory here, two programs' files there. Each place
where reads follow each other is a stream, whose window grows with what was read in it, so that at most as
much again is fetched in vain. A read anywhere else takes its neighbourhood along, since a request costs a
round trip whatever its size.
"""

from __future__ import annotations

from typing import Protocol

import attrs

from erofs_twisted.blocks.link import KIB, MIB, Link

ByteRange = tuple[int, int]
"""Bytes [start, end) of a blob."""


class ReadaheadPolicy(Protocol):
    """Decides what is fetched before it is asked for; `Readahead` is the one that is used."""

    def advise(self, offset: int, length: int, missing: bool) -> list[ByteRange]:
        """A reader asked for [offset, offset + length), of which something is ``missing``, or all is at hand
        or on its way.

        Returns the ranges within the blob that are worth having now, the most urgent first, each to be asked
        for in one request. They may cover bytes that are at hand or on their way.
        """


@attrs.frozen
class Windows:
    """Sizes in bytes; powers of two."""

    neighbourhood: int = 128 * KIB
    """A read that belongs to no stream fetches the aligned block of this size that it lies in, or as much
    from its start on, until the link is known."""
    initial: int = 256 * KIB
    maximum: int = 4 * MIB
    """A stream's window: how far it is read ahead of its reader, from the first continuation to the most; on
    a fast link that is four requests."""
    slack: int = 128 * KIB
    """A read this near to a stream's end continues it: a kernel skips what it has, and reorders a little."""
    streams: int = 16
    """Followed at once; the one longest unread is forgotten first."""


@attrs.define
class Stream:
    """A place where reads follow each other."""

    start: int
    """Where it began."""
    position: int
    """The end of the furthest read."""
    consumed: int
    """Bytes read in it."""
    missed: bool
    """Was anything of it missing? If not, it goes through what a cache kept, and needs no help."""
    ahead: int = 0
    """The end of what was advised."""

    @property
    def is_dense(self) -> bool:
        """Is what lies between its reads little? If not, they only happen to be near to each other."""
        return self.consumed * 2 >= self.position - self.start


@attrs.define
class Readahead:
    """The policy for a blob of ``size`` bytes, whose origin is at the other end of ``link``."""

    size: int
    windows: Windows = attrs.field(factory=Windows)
    link: Link = attrs.field(factory=Link)
    _streams: list[Stream] = attrs.field(factory=list, init=False)

    def advise(self, offset: int, length: int, missing: bool) -> list[ByteRange]:
        stream = self._continued(offset)
        end = offset + length
        if stream is None:
            self._streams.insert(0, Stream(start=offset, position=end, consumed=length, missed=missing))
            del self._streams[self.windows.streams :]
            return self._neighbourhood(offset, end) if missing else []
        if end > stream.position:
            stream.consumed += end - max(offset, stream.position)
            stream.position = end
        stream.missed = stream.missed or missing
        if not stream.missed:
            return []
        if not stream.is_dense:
            return self._neighbourhood(offset, end) if missing else []
        most = max(self.windows.maximum, 4 * self.link.longest)
        window = min(max(stream.consumed, self.windows.initial), most)
        if missing:
            return self._extend(stream, offset, window)
        if stream.ahead - stream.position < window // 2:
            return self._extend(stream, max(stream.ahead, end), window)
        return []

    def _continued(self, offset: int) -> Stream | None:
        slack = self.windows.slack
        streams = self._streams
        for index, stream in enumerate(streams):
            if -slack <= offset - stream.position <= slack:
                if index:
                    streams.insert(0, streams.pop(index))
                return stream
        return None

    def _neighbourhood(self, offset: int, end: int) -> list[ByteRange]:
        # Its bytes are to cost little beside the round trip that they save, if they do.
        block = self.link.share(8, self.windows.neighbourhood, least=16 * KIB, most=MIB)
        start = offset // block * block
        if end > start + block:
            # It touches two: what follows it is nearer to it than what goes before.
            start, block = offset, max(block, end - offset)
        return self._cut(start, start + block)

    def _extend(self, stream: Stream, start: int, window: int) -> list[ByteRange]:
        """From ``start`` to the window's end, which is aligned, so that requests are not ragged."""
        grain = self.windows.initial
        stream.ahead = -(-(stream.position + window) // grain) * grain
        return self._cut(start, stream.ahead)

    def _cut(self, start: int, end: int) -> list[ByteRange]:
        # A window goes out in several requests, side by side.
        request = self.link.longest
        end = min(end, self.size)
        ranges = []
        while start < end:
            # Cuts fall on multiples of the request size, whatever the start.
            stop = min((start // request + 1) * request, end)
            ranges.append((start, stop))
            start = stop
        return ranges
