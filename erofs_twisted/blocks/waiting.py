"""Reads that wait for chunks."""

from __future__ import annotations

from collections.abc import Iterable

import attrs
from twisted.internet.defer import Deferred

from erofs_twisted.interfaces import Segment

_GROUP_BITS = 4
"""Waiters are found by groups of so many chunks, as a power of two: few enough to be looked through."""

_NOBODY: dict[Waiter, None] = {}


@attrs.define(eq=False)
class Waiter:
    """A read of the chunks [first, end), which waits for some of them."""

    offset: int
    length: int
    first: int
    end: int
    wants_bytes: bool
    """A prefetch does not; it only waits."""
    done: Deferred[list[Segment]]
    missing: int = 0
    """A bit for each chunk that has not come yet, the lowest for ``first``."""
    unkept: list[tuple[int, bytes]] = attrs.field(factory=list)
    """What came, but could not be stored in the cache: a place in the blob, and the bytes from there on."""

    def bits(self, first: int, end: int) -> int:
        """What `missing` is of those of the chunks [first, end) that it reads, if none of them has come."""
        start, stop = max(first, self.first), min(end, self.end)
        return ((1 << stop - start) - 1) << (start - self.first) if start < stop else 0


class Waiters:
    """Who waits, by what is waited for."""

    def __init__(self) -> None:
        self._by_group: dict[int, dict[Waiter, None]] = {}

    def add(self, waiter: Waiter, runs: Iterable[tuple[int, int]]) -> None:
        """``waiter`` waits for these runs [from, to) of its chunks."""
        for start, stop in runs:
            waiter.missing |= waiter.bits(start, stop)
        for group in _groups(waiter.first, waiter.end):
            self._by_group.setdefault(group, {})[waiter] = None

    def remove(self, waiter: Waiter) -> None:
        """``waiter`` waits for nothing any more."""
        waiter.missing = 0
        for group in _groups(waiter.first, waiter.end):
            waiters = self._by_group.get(group)
            if waiters is not None:
                waiters.pop(waiter, None)
                if not waiters:
                    del self._by_group[group]

    def arrived(self, first: int, end: int) -> list[Waiter]:
        """Those who waited for any of the chunks [first, end), which have come."""
        waiters = self.of(first, end)
        for waiter in waiters:
            waiter.missing &= ~waiter.bits(first, end)
            if not waiter.missing:
                self.remove(waiter)
        return waiters

    def of(self, first: int, end: int) -> list[Waiter]:
        """Those who wait for any of the chunks [first, end), each once."""
        near: dict[Waiter, None] = {}
        for group in _groups(first, end):
            near.update(self._by_group.get(group, _NOBODY))
        return [waiter for waiter in near if waiter.missing & waiter.bits(first, end)]

    def pop_all(self) -> list[Waiter]:
        """Those who wait for anything, each once; nothing is waited for any more."""
        waiters = dict.fromkeys(waiter for group in self._by_group.values() for waiter in group)
        self._by_group.clear()
        return list(waiters)


def _groups(first: int, end: int) -> range:
    return range(first >> _GROUP_BITS, ((end - 1) >> _GROUP_BITS) + 1)
