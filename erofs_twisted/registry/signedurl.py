"""How long a signed URL works, as far as its query tells.

Object stores and CDNs sign the URLs that a registry redirects to, and write into them until when: Amazon's
and Google's version 4 (``X-Amz-Date`` and ``X-Amz-Expires``, ``X-Goog-…``), CloudFront's and older ones
(``Expires``, Unix time), Azure's (``se``, ISO 8601).
"""

from __future__ import annotations

import re
from datetime import UTC, datetime
from urllib.parse import parse_qsl, urlsplit

MAX_LIFE = 7 * 86400.0
"""Seconds: the longest that Amazon and Google sign for. What claims more is taken for so much."""

_DIGITS = re.compile("[0-9]{1,12}")


def lifetime(url: str, now: float) -> float | None:
    """The seconds, more than 0, that ``url``, which was given out at ``now`` (Unix time), goes on to work.

    None where it doesn't say, or where its time was over when it was given out: then the two clocks disagree.
    """
    try:
        pairs = parse_qsl(urlsplit(url).query, max_num_fields=100)
    except ValueError:
        return None
    query = {name.lower(): value for name, value in reversed(pairs)}
    claims = [
        _since(query.get("x-amz-date"), query.get("x-amz-expires"), now),
        _since(query.get("x-goog-date"), query.get("x-goog-expires"), now),
        _until(_unix_time(query.get("expires")), now),
        _until(_iso_time(query.get("se")), now),
    ]
    return min((claim for claim in claims if claim is not None), default=None)


def _since(date: str | None, seconds: str | None, now: float) -> float | None:
    """What is left of so many seconds since the URL was signed; all of them, if that can't be."""
    if seconds is None or not _DIGITS.fullmatch(seconds) or int(seconds) == 0:
        return None
    life = min(float(seconds), MAX_LIFE)
    signed_at = _compact_time(date)
    age = 0.0 if signed_at is None else now - signed_at
    return life - age if 0 <= age < life else life


def _until(end: float | None, now: float) -> float | None:
    return min(end - now, MAX_LIFE) if end is not None and end > now else None


def _unix_time(text: str | None) -> float | None:
    return float(text) if text is not None and _DIGITS.fullmatch(text) else None


def _compact_time(text: str | None) -> float | None:
    try:
        return datetime.strptime(text or "", "%Y%m%dT%H%M%SZ").replace(tzinfo=UTC).timestamp()
    except ValueError:
        return None


def _iso_time(text: str | None) -> float | None:
    try:
        time = datetime.fromisoformat(text or "")
        return (time if time.tzinfo else time.replace(tzinfo=UTC)).timestamp()
    except (ValueError, OverflowError):
        return None
