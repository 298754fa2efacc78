"""Who we are at a registry."""

from __future__ import annotations

import base64
import re
from typing import TypeAlias

import attrs

from erofs_twisted.registry.errors import AccessDenied

_TOKEN = re.compile(r"[!-~]+")
_SURROGATE = re.compile("[\ud800-\udfff]")

LOG_IN = "log in (docker login, podman login, --auth-file), or give --username and --password-file"
"""The cure, for messages."""


TOKEN_USER = "<token>"
"""The user name that says that the password is an identity token."""


def _hidden(_: object) -> str:
    return "…"


def _check_text(_: object, __: attrs.Attribute[str], value: str) -> None:
    # Not by encoding it: the error would hold the value.
    if _SURROGATE.search(value):
        raise AccessDenied("a registry's user name and password are text, and this is none")


def _check_token(_: object, __: attrs.Attribute[str], value: str) -> None:
    if not _TOKEN.fullmatch(value):
        raise AccessDenied("a token is one word of ASCII, and this is none")


@attrs.frozen
class Credentials:
    """A user's name and password (or access token). Neither shows in a repr, so neither gets into a log."""

    username: str = attrs.field(repr=_hidden, validator=_check_text)
    password: str = attrs.field(repr=_hidden, validator=_check_text)

    def __attrs_post_init__(self) -> None:
        if ":" in self.username:
            raise AccessDenied("a registry's user name cannot hold a colon (RFC 7617)")

    def authorization(self) -> str:
        """The value of ``Authorization`` for basic authentication, in UTF-8 (RFC 7617)."""
        pair = f"{self.username}:{self.password}".encode()
        return "Basic " + base64.b64encode(pair).decode("ascii")


@attrs.frozen
class IdentityToken:
    """What a login at a token server gave in a password's place: it takes this as an OAuth2 refresh token."""

    value: str = attrs.field(repr=_hidden, validator=_check_token)


@attrs.frozen
class RegistryToken:
    """What the registry itself takes, as a bearer token."""

    value: str = attrs.field(repr=_hidden, validator=_check_token)

    def authorization(self) -> str:
        """The value of ``Authorization``."""
        return f"Bearer {self.value}"


Identity: TypeAlias = Credentials | IdentityToken | RegistryToken
"""One of the forms in which a registry, or its token server, is told who we are."""
