"""``Content-Range`` (RFC 9110, section 14.4), of which a blob's reader only takes bytes."""

from __future__ import annotations

import re
from collections.abc import Sequence

import attrs

from erofs_twisted.registry.errors import InvalidHeader, TransferFailed

_FORM = re.compile(
    r"[ \t]*bytes[ \t]+(?:([0-9]{1,19})-([0-9]{1,19})|\*)/(?:([0-9]{1,19})|\*)[ \t]*", re.IGNORECASE
)


@attrs.frozen
class ContentRange:
    """Bytes [start, stop) of ``total``; None where the server does not know how many there are."""

    start: int
    stop: int
    total: int | None


@attrs.frozen
class Unsatisfied:
    """The range that was asked for lies outside the ``total`` bytes that there are."""

    total: int


def parse_content_range(text: str) -> ContentRange | Unsatisfied:
    """Read ``bytes 0-99/1000``, ``bytes 0-99/*`` or ``bytes */1000``. Raises `InvalidHeader`."""
    match = _FORM.fullmatch(text)
    if match is None:
        raise InvalidHeader(f"Content-Range: {text[:100]!r} is not a range of bytes")
    first, last, total_text = match.groups()
    total = None if total_text is None else int(total_text)
    if first is None:
        if total is None:
            raise InvalidHeader(f"Content-Range: {text[:100]!r} says nothing")
        return Unsatisfied(total)
    start, stop = int(first), int(last) + 1
    if stop <= start or (total is not None and stop > total):
        raise InvalidHeader(f"Content-Range: {text[:100]!r} contradicts itself")
    return ContentRange(start, stop, total)


def check_partial(lines: Sequence[str], body_length: object, start: int, stop: int, total: int) -> None:
    """Are the headers of a 206 those of the bytes [start, stop) of ``total``, and of nothing else?

    ``lines`` are all of ``Content-Range``; ``body_length`` is the body's where the response says it, else
    anything that is no int. Raises `InvalidHeader`, `TransferFailed`.
    """
    if len(lines) != 1:
        raise TransferFailed(f"partial content with {len(lines)} Content-Range headers, not one")
    if parse_content_range(lines[0]) != ContentRange(start, stop, total):
        raise TransferFailed(
            f"bytes {start}-{stop - 1}/{total} were asked for, Content-Range says {lines[0].strip():.80}"
        )
    if isinstance(body_length, int) and body_length != stop - start:
        raise TransferFailed(f"a body of {body_length} bytes, but {stop - start} in Content-Range")
