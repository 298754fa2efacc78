"""What a token server answers (distribution, "Token Authentication Specification")."""

from __future__ import annotations

import json
import re
from datetime import datetime
from typing import Any

import attrs

from erofs_twisted.registry.errors import TransferFailed

DEFAULT_LIFETIME = 60.0
"""Seconds, from receipt, where the server doesn't say."""
REFRESH_AT = 0.75
"""The part of a token's life after which a new one is fetched, while the old one still serves."""

SPARED = 5.0
"""Seconds, at least, between two of them that fail."""

_TOKEN = re.compile(r"[!-~]+")


@attrs.frozen
class Token:
    """Neither ``value`` nor ``refresh_token`` shows in a repr. Times are the clock's."""

    value: str = attrs.field(repr=False)
    refresh_at: float
    expires_at: float
    refresh_token: str | None = attrs.field(default=None, repr=False)
    """In place of the identity token that was exchanged for this."""

    def spared(self, now: float) -> Token:
        """This one after a refresh ahead of time has failed: half of what is left later is soon enough."""
        return attrs.evolve(self, refresh_at=now + max((self.expires_at - now) / 2, SPARED))


def parse_token(body: bytes, now: float, unix_now: float) -> Token:
    """The token in a token server's answer that was received at ``now``, by the clock that its times are to
    be of, and at ``unix_now`` by the one that tells Unix time.

    Raises `TransferFailed` where there is none.
    """
    try:
        answer = json.loads(body)
    except (ValueError, RecursionError):
        answer = None
    if not isinstance(answer, dict):
        raise TransferFailed("the token server's answer is not a JSON object")
    value = answer.get("access_token") or answer.get("token")
    if not isinstance(value, str) or not _TOKEN.fullmatch(value):
        raise TransferFailed("the token server's answer holds no token")
    lifetime = _lifetime(answer.get("expires_in"))
    age = unix_now - (_issued_at(answer.get("issued_at")) or unix_now)
    # A token that is too old on arrival, or comes from the future, tells of two clocks that disagree.
    received = now - age if 0 <= age < lifetime else now
    rotated = answer.get("refresh_token")
    if not isinstance(rotated, str) or not _TOKEN.fullmatch(rotated):
        rotated = None
    return Token(value, received + lifetime * REFRESH_AT, received + lifetime, rotated)


def _lifetime(expires_in: Any) -> float:
    if isinstance(expires_in, str) and re.fullmatch("[0-9]{1,9}", expires_in):
        expires_in = int(expires_in)
    if isinstance(expires_in, bool) or not isinstance(expires_in, int | float) or not 0 < expires_in < 1e9:
        return DEFAULT_LIFETIME
    return float(expires_in)


def _issued_at(text: Any) -> float | None:
    try:
        issued = datetime.fromisoformat(text)
        return issued.timestamp() if issued.tzinfo else None
    except (TypeError, ValueError, OverflowError):
        return None
