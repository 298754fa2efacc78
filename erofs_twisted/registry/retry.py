"""When to try again: exponential backoff with full jitter, and what the server asked for."""

from __future__ import annotations

import calendar
import email.utils
import re
from collections.abc import Callable

import attrs


@attrs.frozen
class Backoff:
    """``attempt`` counts from 0 since the last progress; seconds everywhere."""

    first: float = 0.25
    longest: float = 5.0
    random: Callable[[], float] = attrs.field(kw_only=True)
    """Uniform in [0, 1): `random.random`, or a fixed number in a test."""

    def delay(self, attempt: int, remaining: float, retry_after: float | None = None) -> float:
        """How long to wait before the next attempt.

        A server that asked for a pause gets it, unless that leaves no time (``remaining``) for an attempt:
        then half of what is left, so that a long pause asked for in error does not fail a read that could
        still be had.
        """
        jittered = self.random() * min(self.longest, self.first * 2.0 ** min(attempt, 30))
        if retry_after is None:
            return min(jittered, max(remaining, 0.0))
        return min(retry_after + jittered, max(remaining, 0.0) / 2)

    def redial(self, remaining: float) -> float:
        """How long to wait before a host that could not be connected to is tried again.

        Always about the same: a connection that is refused costs nobody anything, and a host that is back
        is to be found within a second.
        """
        return min(0.15 + 0.15 * self.random(), max(remaining, 0.0))


def parse_retry_after(text: str, now: float) -> float | None:
    """Seconds that ``Retry-After`` asks to wait (RFC 9110, section 10.2.3), at ``now`` in Unix time.

    None where it can't be read: then it asks for nothing.
    """
    text = text.strip()
    if re.fullmatch("[0-9]{1,9}", text):
        return float(text)
    try:
        parsed = email.utils.parsedate_tz(text)
        if parsed is None:
            return None
        when = calendar.timegm((*parsed[:6], 0, 0, 0)) - (parsed[9] or 0)
    except (ValueError, IndexError, TypeError, OverflowError):
        return None
    return max(0.0, when - now)
