"""Getting in: anonymously, by basic authentication, or with a bearer token from the registry's token server.

distribution, "Token Authentication Specification". Nothing is asked for before the registry wants it, so a
registry that lets anyone in costs no extra round trip.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import attrs
from twisted.internet.defer import CancelledError, Deferred
from twisted.logger import Logger
from twisted.python.failure import Failure

from erofs_twisted.registry.answers import status_error
from erofs_twisted.registry.body import read_body
from erofs_twisted.registry.challenge import Challenge, parse_challenges
from erofs_twisted.registry.credentials import Credentials, Identity, RegistryToken
from erofs_twisted.registry.errors import AccessDenied, InvalidHeader, RegistryError, TransferFailed
from erofs_twisted.registry.keychain import Given, IKeychain
from erofs_twisted.registry.shared import Shared
from erofs_twisted.registry.tokens import Token, parse_token
from erofs_twisted.registry.transport import Transport
from erofs_twisted.registry.urls import Origin, redacted, with_parameters

MAX_TOKEN_ANSWER = 64 * 1024
ANSWER_SECONDS = 15.0

_SCOPES = tuple[str, ...]


@attrs.frozen
class _TokenServer:
    realm: str
    service: str


@attrs.define(eq=False)
class Authorizer:
    """What one registry lets in with, for one ``scope`` (``repository:team/app:pull``)."""

    _transport: Transport
    _registry: Origin
    _scope: str
    _keychain: IKeychain = attrs.field(factory=Given)
    _held: Identity | None = attrs.field(init=False, default=None)
    _basic: str | None = attrs.field(init=False, default=None)
    _server: _TokenServer | None = attrs.field(init=False, default=None)
    _scopes: _SCOPES = attrs.field(init=False, default=())
    _tokens: dict[_SCOPES, Token] = attrs.field(init=False, factory=dict)
    _fetch: Shared[Token] = attrs.field(init=False)
    _refresh: Deferred[Token | None] | None = attrs.field(init=False, default=None)
    _log = Logger()

    def __attrs_post_init__(self) -> None:
        self._fetch = Shared(self._fetch_token)

    @property
    def has_credentials(self) -> bool:
        """Were there any, when they were last needed?"""
        return self._held is not None

    async def authorization(self) -> str | None:
        """The value of ``Authorization`` for a request now; None as long as the registry wants none.

        Waits only where a token is needed and none is valid. Raises what fetching one raises:
        `AccessDenied`, `TransferFailed`.
        """
        if self._server is None:
            return self._basic
        token = self._tokens.get(self._scopes)
        now = self._transport.clock.seconds()
        if token is None or now >= token.expires_at:
            token = await self._fetch.join()
        elif now >= token.refresh_at and not self._fetch.is_running:
            self._refresh = self._fetch.join().addErrback(self._refresh_failed)
        return f"Bearer {token.value}"

    async def renew(self, challenges: Iterable[str], used: str | None) -> None:
        """The registry refused a request that was sent with ``used`` and answered with ``challenges``.

        Afterwards `authorization` gives something else to try. However many requests are refused at the
        same time, one token is fetched. Raises `AccessDenied`, `InvalidHeader`, `TransferFailed`.
        """
        if used != self._current():
            return  # another request was refused before this one, and what it learnt is yet to be tried
        if isinstance(self._held, RegistryToken) and used == self._held.authorization():
            self._keychain.refused(self._held)
        found = parse_challenges(challenges)
        by_scheme = {challenge.scheme: challenge for challenge in reversed(found)}
        if "bearer" in by_scheme:
            self._take_bearer(by_scheme["bearer"])
            await self._fetch.join()
        elif "basic" in by_scheme:
            await self._take_basic(used)
        elif self._server is not None and not found:
            # 403 without a challenge: how some registries say that a token has expired.
            self._tokens.pop(self._scopes, None)
            await self._fetch.join()
        else:
            offered = ", ".join(dict.fromkeys(challenge.scheme for challenge in found)) or "nothing"
            raise AccessDenied(f"the registry accepts {offered:.100}, of which none is basic or bearer")

    async def has_newer(self, used: str | None) -> bool:
        """The registry refused ``used`` without a challenge (some do so with a password that has expired).
        Have name or password changed since then? If so, `authorization` gives the new ones."""
        if used is None or used != self._basic or not isinstance(self._held, Credentials):
            return used != self._current()
        self._keychain.refused(self._held)
        held = await self._ask_keychain()
        if not isinstance(held, Credentials) or held.authorization() == used:
            return False
        self._basic = held.authorization()
        return True

    def branch(self) -> Authorizer:
        """Another one that knows what this one knows now, for requests that may be refused: what it learns
        from that is its own, and what it doesn't have to learn costs nothing."""
        twin = Authorizer(self._transport, self._registry, self._scope, self._keychain)
        twin._held = self._held
        twin._basic, twin._server, twin._scopes = self._basic, self._server, self._scopes
        twin._tokens = dict(self._tokens)
        return twin

    def close(self) -> None:
        """Forget the tokens, and stop fetching one that nobody waits for."""
        self._tokens.clear()
        refresh, self._refresh = self._refresh, None
        if refresh is not None:
            refresh.cancel()

    def _current(self) -> str | None:
        if self._server is None:
            return self._basic
        token = self._tokens.get(self._scopes)
        return None if token is None else f"Bearer {token.value}"

    async def _ask_keychain(self) -> Identity | None:
        self._held = await self._keychain.credentials()
        return self._held

    async def _take_basic(self, used: str | None) -> None:
        held = await self._ask_keychain()
        if isinstance(held, Credentials) and used == held.authorization():
            self._keychain.refused(held)
            held = await self._ask_keychain()
        if held is None:
            raise AccessDenied(
                "the registry wants a user's name and password: --username and --password-file"
            )
        if not isinstance(held, Credentials):
            raise AccessDenied("the registry wants a user's name and password, and there is only a token")
        authorization = held.authorization()
        if used == authorization:
            raise AccessDenied("the registry refuses this user name and password")
        self._server, self._basic = None, authorization

    def _take_bearer(self, challenge: Challenge) -> None:
        realm = challenge.parameters.get("realm", "")
        self._check_realm(realm)
        self._server = _TokenServer(realm, challenge.parameters.get("service", ""))
        # New scopes first: some servers read only the first. A scope that was granted before stays wanted.
        wanted = [challenge.parameters.get("scope", ""), *self._scopes]
        self._scopes = tuple(dict.fromkeys(filter(None, wanted))) or (self._scope,)
        self._tokens.pop(self._scopes, None)

    def _check_realm(self, realm: str) -> None:
        """A registry chooses where the credentials are sent: not in the clear, unless it itself is."""
        try:
            origin = Origin.of(realm)
        except InvalidHeader as error:
            raise AccessDenied(f"the registry's token server: {error}") from error
        if origin.scheme != "https" and self._registry.scheme == "https":
            raise AccessDenied(
                f"the registry's token server {redacted(realm)} is not https, which is refused"
            )
        if origin.is_link_local:
            raise AccessDenied(f"the registry's token server {redacted(realm)} is on a link-local address")

    async def _fetch_token(self) -> Token:
        server, scopes = self._server, self._scopes
        assert server is not None
        held = await self._ask_keychain()
        try:
            token = await self._exchange(held, server, scopes)
        except AccessDenied:
            if held is None:
                raise
            self._keychain.refused(held)
            newer = await self._ask_keychain()
            if newer is None or newer == held:
                raise
            token = await self._exchange(newer, server, scopes)
        self._tokens[scopes] = token
        return token

    async def _exchange(self, held: Identity | None, server: _TokenServer, scopes: _SCOPES) -> Token:
        """The token that we get as who we are."""
        if isinstance(held, RegistryToken):
            return Token(held.value, math.inf, math.inf)
        parameters = [("scope", scope) for scope in scopes]
        if server.service:
            parameters.insert(0, ("service", server.service))
        url = with_parameters(server.realm, parameters)
        headers = {"Accept": "application/json"}
        if isinstance(held, Credentials):
            headers["Authorization"] = held.authorization()
        clock = self._transport.clock
        response = await self._transport.get(url, headers, ANSWER_SECONDS)
        if response.code != 200:
            raise self._refusal(await status_error(response, url, clock, ANSWER_SECONDS))
        body = await read_body(response, MAX_TOKEN_ANSWER, clock, ANSWER_SECONDS)
        return parse_token(body, clock.seconds())

    def _refusal(self, error: RegistryError) -> RegistryError:
        if isinstance(error, AccessDenied):
            what = "refuses this user name and password" if self.has_credentials else "wants credentials"
            cure = "" if self.has_credentials else " (--username and --password-file)"
            return AccessDenied(f"the token server {what}{cure}: {error}")
        return TransferFailed(f"no token: {error}", temporary=error.temporary, retry_after=error.retry_after)

    def _refresh_failed(self, failure: Failure) -> None:
        # The old token still serves; who needs the new one asks again and gets the error.
        if not failure.check(CancelledError):
            self._log.info("refreshing a token failed: {reason}", reason=failure.getErrorMessage())
