"""URLs of a registry and of where it redirects to."""

from __future__ import annotations

from collections.abc import Iterable
from urllib.parse import SplitResult, urlencode, urljoin, urlsplit, urlunsplit

import attrs

from erofs_twisted.registry.errors import InvalidHeader

_DEFAULT_PORT = {"http": 80, "https": 443}


@attrs.frozen
class Origin:
    """Scheme, host and port: what credentials are bound to (RFC 6454)."""

    scheme: str
    host: str
    port: int

    @classmethod
    def of(cls, url: str) -> Origin:
        """The origin of an http or https URL. Raises `InvalidHeader`."""
        try:
            parts = urlsplit(url)
            port = parts.port
        except ValueError as error:
            raise InvalidHeader(f"{url[:200]!r} is not a URL: {error}") from error
        if parts.scheme not in _DEFAULT_PORT or not parts.hostname:
            raise InvalidHeader(f"{redacted(url)[:200]!r} is not an http or https URL")
        return cls(parts.scheme, parts.hostname, _DEFAULT_PORT[parts.scheme] if port is None else port)


def resolve_location(url: str, location: str) -> str:
    """Where the ``Location`` header of the answer from ``url`` leads: an absolute http or https URL.

    Without a fragment. User information in it is refused: no registry has a use for it. Raises
    `InvalidHeader`.
    """
    try:
        joined = urljoin(url, location)
        parts = urlsplit(joined)
    except ValueError as error:
        raise InvalidHeader(f"Location: {error}") from error
    if "@" in parts.netloc:
        raise InvalidHeader(f"Location: {redacted(joined)[:200]!r} holds user information")
    if not joined.isascii() or any(character <= " " for character in joined):
        raise InvalidHeader(f"Location: {redacted(joined)[:200]!r} is not a URL")
    Origin.of(joined)
    return urlunsplit(parts._replace(fragment=""))


def with_parameters(url: str, parameters: Iterable[tuple[str, str]]) -> str:
    """``url`` with more parameters behind those that its query has."""
    parts = urlsplit(url)
    query = "&".join(filter(None, (parts.query, urlencode(list(parameters)))))
    return urlunsplit(parts._replace(query=query, fragment=""))


def redacted(url: str) -> str:
    """A URL as it may be logged: no user information, and no query, in which a CDN's signature lies."""
    try:
        parts = urlsplit(url)
    except ValueError:
        return "<not a URL>"
    netloc = parts.netloc.rpartition("@")[2]
    return urlunsplit(SplitResult(parts.scheme, netloc, parts.path, "…" if parts.query else "", ""))
