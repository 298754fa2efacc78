"""A server that is asked for a repository: the registry itself, or a mirror of it."""

from __future__ import annotations

from collections.abc import Coroutine, Mapping
from typing import Any

import attrs
from twisted.internet.defer import CancelledError, Deferred
from twisted.python.failure import Failure

from erofs_twisted.registry.auth import Authorizer
from erofs_twisted.registry.body import discard
from erofs_twisted.registry.errors import RegistryError, Unreachable
from erofs_twisted.registry.hosts import Capability, HostSettings
from erofs_twisted.registry.keychain import Given, IKeychain
from erofs_twisted.registry.reference import ImageReference
from erofs_twisted.registry.retry import Backoff
from erofs_twisted.registry.session import Answer, Session
from erofs_twisted.registry.transport import Transport
from erofs_twisted.registry.urls import Origin, with_parameters

PATIENCE = 15.0
"""Seconds for a request."""


@attrs.define(eq=False)
class RegistryHost:
    """The repository of ``reference`` at one server, over ``transport``.

    Where it isn't said how to speak to it, a server on a loopback host is spoken to without TLS, unless it
    turns out to want it; with ``plain_http`` any is.
    """

    _settings: HostSettings
    _reference: ImageReference
    transport: Transport
    _keychain: IKeychain = attrs.field(factory=Given)
    _plain_http: bool = False
    session: Session = attrs.field(init=False)
    _root: str = attrs.field(init=False)
    _is_guess: bool = attrs.field(init=False)
    """Is there no TLS only because the host is a loopback host?"""
    _beside: set[Deferred[None]] = attrs.field(init=False, factory=set)

    def __attrs_post_init__(self) -> None:
        scheme = self._settings.scheme
        if scheme is None:
            is_loopback = self._reference.is_loopback
            self._is_guess = is_loopback and not self._plain_http
            scheme = "http" if is_loopback or self._plain_http else "https"
        else:
            self._is_guess = False
        self._speak(scheme)

    def __str__(self) -> str:
        return self._settings.authority

    @property
    def base(self) -> str:
        """The URL of the repository, which nothing but paths is added to."""
        return f"{self._root}/{self._reference.repository}"

    @property
    def is_mirror(self) -> bool:
        return self._settings.is_mirror

    def can(self, capability: Capability) -> bool:
        """Is it to be asked for that?"""
        return capability in self._settings.capabilities

    def url(self, path: str) -> str:
        """Of ``blobs/DIGEST`` and the like. A server that isn't the registry's own is told whose it is."""
        url = f"{self.base}/{path}"
        registry = self._reference.registry
        return url if self._settings.is_of(registry) else with_parameters(url, [("ns", registry)])

    def wants_tls(self, answer: Answer) -> bool:
        """Does an answer say that the server is to be spoken to by TLS? Then, from now on, it is."""
        if not self._is_guess or answer.response.code != 400 or not answer.url.startswith("http:"):
            return False  # Go's servers and nginx answer 400 where they want TLS
        if self.session.origin.scheme == "http":
            self._speak("https")
        return True

    def pusher(self) -> Session:
        """A session that may push. Close it."""
        return self.session.apart(f"repository:{self._reference.repository}:pull,push")

    async def find_scheme(self) -> None:
        """Find out whether a server on a loopback host wants TLS, where nothing was said of it. Raises
        `TransferFailed`."""
        if not self._is_guess or self.session.origin.scheme != "http":
            return
        url = f"{self._root}/"
        response = await self.transport.get(url, {}, PATIENCE)
        await discard(response, self.transport.clock, PATIENCE)
        self.wants_tls(Answer(response, url, False))

    def is_down(self) -> bool:
        """Is it taken to be?"""
        return self.session.circuit.is_open

    def answered(self) -> None:
        """It is there, whatever it said."""
        self.session.circuit.heard().answered()

    def failed(self, error: RegistryError, backoff: Backoff) -> None:
        """It failed to do what it was asked for."""
        if isinstance(error, Unreachable):
            self.session.circuit.heard().failed(error, float("inf"), backoff)

    def beside(self, work: Coroutine[Deferred[Any], Any, None]) -> None:
        """Do something that nobody waits for, until `close`. It deals with its own errors."""
        doing = Deferred.fromCoroutine(work)
        self._beside.add(doing)

        def done(result: Failure | None) -> None:
            self._beside.discard(doing)
            if result is not None:
                result.trap(CancelledError)

        _ = doing.addBoth(done)

    async def close(self) -> None:
        """Let go of it. Reads that are under way are their callers' to cancel."""
        for doing in list(self._beside):
            doing.cancel()
        self.session.close()
        await self.transport.close()

    def _speak(self, scheme: str) -> None:
        root = f"{scheme}://{self._settings.authority}"
        self._root = f"{root}{self._settings.root}"
        origin = Origin.of(root)
        scope = f"repository:{self._reference.repository}:pull"
        authorizer = Authorizer(self.transport, origin, scope, self._keychain)
        headers: Mapping[str, str] = self._settings.headers
        self.session = Session(self.transport, origin, authorizer, self._plain_http, headers=headers)
