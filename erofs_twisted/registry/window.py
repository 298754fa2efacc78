"""How many requests at a time a server takes that has refused some for being too many.

As TCP finds out what a network takes: half as many after each refusal, one more after each answer. So what is
refused is never much more than what is answered.
"""

from __future__ import annotations

import attrs

MOST = 64
"""Requests that were never too many: from there on there is no limit."""


@attrs.define
class Window:
    """``limit`` is None as long as none was refused, and when enough were answered since."""

    limit: int | None = None

    def has_room(self, under_way: int) -> bool:
        """May there be another request beside so many?"""
        return self.limit is None or under_way < self.limit

    def answered(self) -> None:
        if self.limit is not None:
            self.limit = self.limit + 1 if self.limit < MOST else None

    def refused(self, under_way: int) -> None:
        """One of so many was refused."""
        self.limit = max(min(self.limit or MOST, under_way) // 2, 1)

    def close(self) -> None:
        """Begin again with one."""
        self.limit = 1
