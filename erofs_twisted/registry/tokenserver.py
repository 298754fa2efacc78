"""Tokens from a registry's token server, in exchange for who we are.

Two forms: GET with basic authentication or none (distribution, "Token Authentication Specification"), and
OAuth2's POST ("Token Authentication Specification using OAuth2"), which an identity token needs.
"""

from __future__ import annotations

import math
from urllib.parse import urlencode

import attrs
from twisted.web.iweb import IResponse

from erofs_twisted.registry.answers import status_error
from erofs_twisted.registry.body import discard, read_body
from erofs_twisted.registry.credentials import (
    LOG_IN,
    TOKEN_USER,
    Credentials,
    Identity,
    IdentityToken,
    RegistryToken,
)
from erofs_twisted.registry.errors import AccessDenied, RegistryError, TransferFailed
from erofs_twisted.registry.tokens import Token, parse_token
from erofs_twisted.registry.transport import Transport
from erofs_twisted.registry.urls import with_parameters
from erofs_twisted.steadyclock import unix_time

MAX_ANSWER = 64 * 1024
SECONDS = 15.0
DENIED_SECONDS = 10.0
"""For which no is taken for an answer, from the same user for the same scopes."""
CLIENT_ID = "erofs-twisted"

_NOT_SPOKEN = frozenset({404, 405})
"""How a server says that it has only the other form."""

Scopes = tuple[str, ...]


@attrs.frozen
class _Denied:
    held: Identity | None
    scopes: Scopes
    reason: str
    until: float


@attrs.define(eq=False)
class TokenServer:
    """The token server at ``realm``, which has been checked, for the registry that it calls ``service``."""

    _transport: Transport
    realm: str
    service: str
    _speaks_other: bool = attrs.field(init=False, default=False)
    """Does it have only the form that is not tried first?"""
    _rotated: tuple[IdentityToken, str] | None = attrs.field(init=False, default=None, repr=False)
    """What it gave in place of an identity token, and which that was."""
    _denied: _Denied | None = attrs.field(init=False, default=None, repr=False)

    async def exchange(self, held: Identity | None, scopes: Scopes) -> Token:
        """The token that we get as who we are. Raises `AccessDenied`, `TransferFailed`.

        What was denied is not asked for again at once: a program that reads on and on, and fails each time,
        is no reason to have an account locked.
        """
        if isinstance(held, RegistryToken):
            return Token(held.value, math.inf, math.inf)
        denied, now = self._denied, self._transport.clock.seconds()
        if denied is not None and (denied.held, denied.scopes) == (held, scopes) and now < denied.until:
            raise AccessDenied(denied.reason)
        try:
            return await self._exchange(held, scopes)
        except AccessDenied as error:
            self._denied = _Denied(held, scopes, str(error), self._transport.clock.seconds() + DENIED_SECONDS)
            raise

    async def _exchange(self, held: IdentityToken | Credentials | None, scopes: Scopes) -> Token:
        posts = held is not None and isinstance(held, IdentityToken) != self._speaks_other
        response = await self._ask(posts, held, scopes)
        if response.code in _NOT_SPOKEN and held is not None:
            await discard(response, self._transport.clock, SECONDS)
            response = await self._ask(not posts, held, scopes)
            if response.code not in _NOT_SPOKEN:
                self._speaks_other = not self._speaks_other
        clock = self._transport.clock
        if response.code != 200:
            error = await status_error(response, self.realm, clock, SECONDS)
            raise _refusal(error, held, response.code)
        body = await read_body(response, MAX_ANSWER, clock, SECONDS)
        token = parse_token(body, clock.seconds(), unix_time(clock))
        if token.refresh_token is not None and isinstance(held, IdentityToken):
            self._rotated = held, token.refresh_token
        return token

    async def _ask(self, posts: bool, held: Identity | None, scopes: Scopes) -> IResponse:
        return await (self._post(held, scopes) if posts else self._get(held, scopes))

    async def _get(self, held: Identity | None, scopes: Scopes) -> IResponse:
        parameters = [("scope", scope) for scope in scopes]
        if self.service:
            parameters.insert(0, ("service", self.service))
        headers = {"Accept": "application/json"}
        if isinstance(held, IdentityToken):
            held = Credentials(TOKEN_USER, self._refresh_token(held))
        if isinstance(held, Credentials):
            headers["Authorization"] = held.authorization()
        return await self._transport.get(with_parameters(self.realm, parameters), headers, SECONDS)

    async def _post(self, held: Identity | None, scopes: Scopes) -> IResponse:
        fields = {"client_id": CLIENT_ID, "service": self.service, "scope": " ".join(scopes)}
        if isinstance(held, IdentityToken):
            fields |= {"grant_type": "refresh_token", "refresh_token": self._refresh_token(held)}
        elif isinstance(held, Credentials):
            fields |= {"grant_type": "password", "username": held.username, "password": held.password}
        headers = {"Accept": "application/json", "Content-Type": "application/x-www-form-urlencoded"}
        body = urlencode(fields).encode("ascii")
        return await self._transport.request("POST", self.realm, headers, SECONDS, body)

    def _refresh_token(self, held: IdentityToken) -> str:
        if self._rotated is not None and self._rotated[0] == held:
            return self._rotated[1]
        return held.value


def _refusal(error: RegistryError, held: Identity | None, code: int) -> RegistryError:
    if isinstance(error, AccessDenied) or (code == 400 and isinstance(held, IdentityToken)):
        if held is None:
            text = f"wants credentials ({LOG_IN})"
        elif isinstance(held, IdentityToken):
            text = "refuses this login's identity token (log in again)"
        else:
            text = "refuses this user name and password"
        return AccessDenied(f"the token server {text}: {error}")
    return TransferFailed(f"no token: {error}", temporary=error.temporary, retry_after=error.retry_after)
