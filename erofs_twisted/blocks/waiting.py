"""Reads that wait for chunks."""

from __future__ import annotations

from collections.abc import Iterable

import attrs
from twisted.internet.defer import Deferred

from erofs_twisted.interfaces import Segment


@attrs.define(eq=False)
class Waiter:
    """A read that waits for ``missing`` of the chunks [first, end), which it touches."""

    offset: int
    length: int
    first: int
    end: int
    wants_bytes: bool
    """A prefetch does not; it only waits."""
    done: Deferred[list[Segment]]
    missing: int = 0
    unkept: list[tuple[int, bytes]] = attrs.field(factory=list)
    """What came, but could not be stored in the cache: a place in the blob, and the bytes from there on."""


class Waiters:
    """Who waits, by each chunk that is waited for."""

    def __init__(self) -> None:
        self._by_chunk: dict[int, list[Waiter]] = {}

    def add(self, waiter: Waiter, runs: Iterable[tuple[int, int]]) -> None:
        """``waiter`` waits for these runs [from, to) of chunks."""
        for start, stop in runs:
            waiter.missing += stop - start
            for chunk in range(start, stop):
                self._by_chunk.setdefault(chunk, []).append(waiter)

    def remove(self, waiter: Waiter) -> None:
        """``waiter`` waits for nothing any more."""
        for chunk in range(waiter.first, waiter.end):
            waiters = self._by_chunk.get(chunk)
            if waiters and waiter in waiters:
                waiters.remove(waiter)
                if not waiters:
                    del self._by_chunk[chunk]

    def pop(self, chunks: Iterable[int]) -> list[Waiter]:
        """Those who waited for any of these chunks, which are there now, each once."""
        found: dict[Waiter, None] = {}
        for chunk in chunks:
            for waiter in self._by_chunk.pop(chunk, ()):
                waiter.missing -= 1
                found[waiter] = None
        return list(found)

    def of(self, chunks: Iterable[int]) -> list[Waiter]:
        """Those who wait for any of these chunks, in the order in which they came, each once."""
        return list(dict.fromkeys(waiter for chunk in chunks for waiter in self._by_chunk.get(chunk, ())))

    def any(self, chunks: Iterable[int]) -> bool:
        """Does anybody wait for any of these?"""
        return any(chunk in self._by_chunk for chunk in chunks)

    def pop_all(self) -> list[Waiter]:
        """Those who wait for anything, each once; nothing is waited for any more."""
        waiters = self.of(self._by_chunk)
        self._by_chunk.clear()
        return waiters
