"""What a status means: errors that say what the registry said, and whether it will pass."""

from __future__ import annotations

import json
import re

from twisted.internet.interfaces import IReactorTime
from twisted.web.iweb import IResponse

from erofs_twisted.registry.body import read_body
from erofs_twisted.registry.errors import AccessDenied, Busy, NotInRegistry, RegistryError, TransferFailed
from erofs_twisted.registry.retry import parse_retry_after
from erofs_twisted.registry.urls import redacted
from erofs_twisted.steadyclock import unix_time

MAX_ERROR_BODY = 8 * 1024
TEMPORARY = frozenset({408, 425, 429, 499, 500, 502, 503, 504}) | frozenset(range(520, 531))
"""Statuses that pass; 499 and 520 to 530 are what proxies and CDNs add to RFC 9110's."""
_TITLE = re.compile(rb"<title>([^<]{1,300})</title>", re.IGNORECASE)
"""Of a proxy's page: nginx says there that it wants a client certificate, for example."""


async def status_error(response: IResponse, url: str, clock: IReactorTime, seconds: float) -> RegistryError:
    """What a status that is not the one wanted means; the body, which is used up, may say more."""
    said = await _what_it_says(response, clock, seconds)
    text = f"{redacted(url)}: {_status(response)}" + (f": {said}" if said else "")
    if response.code in (401, 403):
        return AccessDenied(text)
    if response.code in (404, 410):
        return NotInRegistry(text)
    if response.code not in TEMPORARY:
        return TransferFailed(text)
    wait = response.headers.getRawHeaders("Retry-After", [""])[0]
    retry_after = parse_retry_after(wait, unix_time(clock))
    kind = Busy if response.code in (429, 503) or retry_after is not None else TransferFailed
    return kind(text, temporary=True, retry_after=retry_after)


def _status(response: IResponse) -> str:
    return f"{response.code} {response.phrase.decode('latin-1')}"


async def _what_it_says(response: IResponse, clock: IReactorTime, seconds: float) -> str:
    try:
        body = await read_body(response, MAX_ERROR_BODY, clock, seconds)
    except TransferFailed:
        return ""
    content_type = response.headers.getRawHeaders("Content-Type", [""])[0]
    if content_type.startswith("text/plain"):
        return _printable(body.decode("utf-8", "replace"))
    if content_type.startswith("text/html"):
        title = _TITLE.search(body)
        said = _printable(title[1].decode("utf-8", "replace")) if title else ""
        return "" if said == _status(response) else said
    return errors_text(body)


def errors_text(body: bytes) -> str:
    """A registry's ``errors`` in one line (distribution specification, "Error Codes"), or a token server's
    ``error`` (RFC 6749, section 5.2); '' where there is neither."""
    try:
        answer = json.loads(body)
        if isinstance(answer.get("error"), str):
            pairs = [(answer["error"], answer.get("error_description"))]
        else:
            pairs = [(error.get("code"), error.get("message")) for error in answer["errors"]]
    except (ValueError, RecursionError, TypeError, KeyError, AttributeError):
        return ""
    return _printable("; ".join(": ".join(str(part) for part in pair if part) for pair in pairs))


def _printable(text: str) -> str:
    return "".join(character if character.isprintable() else " " for character in text).strip()[:300]
