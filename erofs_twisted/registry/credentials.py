"""Who we are at a registry."""

from __future__ import annotations

import base64

import attrs

from erofs_twisted.registry.errors import AccessDenied


def _hidden(_: object) -> str:
    return "…"


@attrs.frozen
class Credentials:
    """A user's name and password (or access token). Neither shows in a repr, so neither gets into a log."""

    username: str = attrs.field(repr=_hidden)
    password: str = attrs.field(repr=_hidden)

    def __attrs_post_init__(self) -> None:
        if ":" in self.username:
            raise AccessDenied("a registry's user name cannot hold a colon (RFC 7617)")

    def authorization(self) -> str:
        """The value of ``Authorization`` for basic authentication, in UTF-8 (RFC 7617)."""
        pair = f"{self.username}:{self.password}".encode()
        return "Basic " + base64.b64encode(pair).decode("ascii")
