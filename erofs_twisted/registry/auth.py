"""Getting in: anonymously, by basic authentication, or with a bearer token from the registry's token server.

distribution, "Token Authentication Specification". Nothing is asked for before the registry wants it, so a
registry that lets anyone in costs no extra round trip.
"""

from __future__ import annotations

from collections.abc import Iterable

import attrs
from twisted.internet.defer import CancelledError, Deferred
from twisted.logger import Logger
from twisted.python.failure import Failure

from erofs_twisted.interfaces import silent
from erofs_twisted.registry.challenge import Challenge, parse_challenges
from erofs_twisted.registry.credentials import LOG_IN, Credentials, Identity, RegistryToken
from erofs_twisted.registry.errors import AccessDenied
from erofs_twisted.registry.keychain import Given, IKeychain
from erofs_twisted.registry.realm import check_realm
from erofs_twisted.registry.shared import Shared
from erofs_twisted.registry.tokens import Token
from erofs_twisted.registry.tokenserver import Scopes, TokenServer
from erofs_twisted.registry.transport import Transport
from erofs_twisted.registry.urls import Origin, redacted


@attrs.define(eq=False)
class Authorizer:
    """What one registry lets in with, for one ``scope`` (``repository:team/app:pull``)."""

    _transport: Transport
    _registry: Origin
    _scope: str
    _keychain: IKeychain = attrs.field(factory=Given)
    _extra: Scopes = attrs.field(init=False, default=())
    """What is asked for whether or not the registry names it."""
    _held: Identity | None = attrs.field(init=False, default=None)
    _basic: str | None = attrs.field(init=False, default=None)
    _server: TokenServer | None = attrs.field(init=False, default=None)
    _scopes: Scopes = attrs.field(init=False, default=())
    _tokens: dict[Scopes, Token] = attrs.field(init=False, factory=dict)
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
            self._refresh = self._fetch.join().addErrback(self._refresh_failed, self._scopes)
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
        self._tell_wanted(found)
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

    def branch(self, *scopes: str) -> Authorizer:
        """Another one that knows what this one knows now, for requests that may be refused: what it learns
        from that is its own, and what it doesn't have to learn costs nothing. Its tokens are for ``scopes``,
        too."""
        twin = Authorizer(self._transport, self._registry, self._scope, self._keychain)
        twin._held = self._held
        twin._extra = _distinct(*scopes, *self._extra)
        twin._basic, twin._server = self._basic, self._server
        twin._scopes = _distinct(*scopes, *self._scopes) if self._server is not None else ()
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

    def _tell_wanted(self, found: Iterable[Challenge]) -> None:
        if self._transport.tell is not silent:
            wanted = ", or ".join(_shown(challenge) for challenge in found) or "something it does not name"
            self._transport.tell(f"{self._registry.host} wants {wanted}")

    async def _ask_keychain(self) -> Identity | None:
        self._held = await self._keychain.credentials()
        if self._transport.tell is not silent:
            source = "none" if self._held is None else self._keychain.source
            self._transport.tell(f"credentials for {self._registry.host}: {source}")
        return self._held

    async def _take_basic(self, used: str | None) -> None:
        held = await self._ask_keychain()
        if isinstance(held, Credentials) and used == held.authorization():
            self._keychain.refused(held)
            held = await self._ask_keychain()
        if held is None:
            raise AccessDenied(f"the registry wants a user's name and password: {LOG_IN}")
        if not isinstance(held, Credentials):
            raise AccessDenied("the registry wants a user's name and password, and there is only a token")
        authorization = held.authorization()
        if used == authorization:
            raise AccessDenied("the registry refuses this user name and password")
        self._server, self._basic = None, authorization

    def _take_bearer(self, challenge: Challenge) -> None:
        realm = challenge.parameters.get("realm", "")
        check_realm(realm, self._registry)
        service = challenge.parameters.get("service", "")
        if self._server is None or (self._server.realm, self._server.service) != (realm, service):
            self._server = TokenServer(self._transport, realm, service)
        # New scopes first: some servers read only the first. A scope that was granted before stays wanted.
        # A challenge may name several at once (RFC 6750, section 3): docker-registry's does for a mount.
        wanted = challenge.parameters.get("scope", "").split()
        self._scopes = _distinct(*wanted, *self._extra, *self._scopes) or (self._scope,)
        self._tokens.pop(self._scopes, None)

    async def _fetch_token(self) -> Token:
        server, scopes = self._server, self._scopes
        assert server is not None
        held = await self._ask_keychain()
        try:
            token = await server.exchange(held, scopes)
        except AccessDenied:
            if held is None:
                raise
            self._keychain.refused(held)
            newer = await self._ask_keychain()
            if newer is None or newer == held:
                raise
            token = await server.exchange(newer, scopes)
        self._tokens[scopes] = token
        if self._transport.tell is not silent:
            life = token.expires_at - self._transport.clock.seconds()
            self._transport.tell(f"a token for {' '.join(scopes)}, valid for {life:.0f} s")
        return token

    def _refresh_failed(self, failure: Failure, scopes: Scopes) -> None:
        # The old token still serves; who needs the new one asks again and gets the error.
        token = self._tokens.get(scopes)
        if token is not None:
            self._tokens[scopes] = token.spared(self._transport.clock.seconds())
        if not failure.check(CancelledError):
            self._log.info("refreshing a token failed: {reason}", reason=failure.getErrorMessage())


def _distinct(*scopes: str) -> Scopes:
    return tuple(dict.fromkeys(scopes))


def _shown(challenge: Challenge) -> str:
    """A challenge in one line: scheme, and of its parameters what is no secret."""
    known = {name: challenge.parameters.get(name, "") for name in ("realm", "service", "scope", "error")}
    if challenge.scheme == "bearer":
        known["realm"] = redacted(known["realm"])
    named = ", ".join(f"{name} {value}" for name, value in known.items() if value)
    text = f"{challenge.scheme} ({named})" if named else challenge.scheme
    return "".join(character if character.isprintable() else " " for character in text)[:500]
