"""The last lines of the log, for who asks for them."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

import attrs
from twisted.logger import ILogObserver, LogEvent, eventAsText
from zope.interface import implementer

KEPT = 5000


@implementer(ILogObserver)
@attrs.define
class RecentLines:
    """As a log observer it keeps the last `KEPT` events, as lines of text."""

    _lines: deque[str] = attrs.field(init=False, factory=lambda: deque(maxlen=KEPT))
    _next: int = attrs.field(init=False, default=0)

    def __call__(self, event: LogEvent) -> None:
        self._lines.append(eventAsText(event, includeSystem=False))
        self._next += 1

    def after(self, number: int, words: Sequence[str] = ()) -> tuple[int, list[str]]:
        """The lines from ``number`` on that are still there, with one of ``words`` in them if there are any;
        and the number to ask for next."""
        begin = max(number - (self._next - len(self._lines)), 0)
        lines = list(self._lines)[begin:]
        return self._next, [line for line in lines if not words or any(word in line for word in words)]
