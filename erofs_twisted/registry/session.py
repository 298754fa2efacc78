"""Requests to a registry: with its authorization, through its redirects, and never one with the other."""

from __future__ import annotations

from collections.abc import Mapping

import attrs
from twisted.logger import Logger
from twisted.web.iweb import IResponse

from erofs_twisted.registry.answers import status_error
from erofs_twisted.registry.auth import Authorizer
from erofs_twisted.registry.body import discard
from erofs_twisted.registry.challenge import parse_challenges
from erofs_twisted.registry.circuit import Circuit
from erofs_twisted.registry.credentials import LOG_IN
from erofs_twisted.registry.errors import (
    AccessDenied,
    InvalidHeader,
    RegistryError,
    TransferFailed,
    Unreachable,
)
from erofs_twisted.registry.notices import Notices
from erofs_twisted.registry.transport import Body, Transport
from erofs_twisted.registry.urls import Origin, redacted, resolve_location

MAX_REDIRECTS = 10
REDIRECTS = frozenset({301, 302, 303, 307, 308})
VERBATIM_REDIRECTS = frozenset({307, 308})
"""Those that ask for the same request elsewhere, body and all (RFC 9110, section 15.4)."""


@attrs.frozen
class Answer:
    """A response whose body is yet to be received, and the ``url`` that gave it, after all redirects."""

    response: IResponse
    url: str
    redirected: bool


@attrs.frozen
class Session:
    """Requests to the registry at ``origin`` and to wherever it sends us."""

    transport: Transport
    origin: Origin
    _authorizer: Authorizer
    _plain_http: bool = False
    _notices: Notices = attrs.field(factory=Notices)
    _headers: Mapping[str, str] = attrs.field(factory=dict, repr=False)
    """What goes with each request to the registry itself; it may be secret."""
    circuit: Circuit = attrs.field(init=False, repr=False)
    """For who makes many requests for a long time: whether the registry answers at all."""

    @circuit.default
    def _new_circuit(self) -> Circuit:
        return Circuit(self.transport.clock)

    _log = Logger()

    async def get(self, url: str, headers: Mapping[str, str], seconds: float) -> Answer:
        """`request` with GET."""
        return await self.request("GET", url, headers, seconds)

    async def request(
        self, method: str, url: str, headers: Mapping[str, str], seconds: float, body: Body = b""
    ) -> Answer:
        """The answer to a request, whatever its status, once its redirects were followed; ``seconds`` is for
        each request on the way. What is neither GET nor HEAD follows only those redirects that keep method
        and body.

        The registry's authorization goes to the registry's own origin only; what that refuses is tried once
        more with a new token. Raises `TransferFailed`, `AccessDenied`.
        """
        start = url
        redirects = REDIRECTS if method in ("GET", "HEAD") else VERBATIM_REDIRECTS
        for _ in range(MAX_REDIRECTS + 1):
            try:
                if Origin.of(url) == self.origin:
                    response = await self._ask_registry(method, url, headers, seconds, body)
                    self._pass_on(response)
                else:
                    response = await self.transport.request(method, url, headers, seconds, body)
            except Unreachable as error:
                if url == start:
                    raise
                # The host that was asked has answered: it is another one that is away.
                raise TransferFailed(str(error), temporary=True) from error
            if response.code not in redirects:
                return Answer(response, url, url != start)
            await discard(response, self.transport.clock, seconds)
            url = self.location(response, url)
        raise TransferFailed(f"{redacted(start)}: more than {MAX_REDIRECTS} redirects")

    def location(self, response: IResponse, url: str) -> str:
        """Where the answer from ``url`` leads. Raises `TransferFailed`, `InvalidHeader`."""
        location = response.headers.getRawHeaders("Location", [""])[0]
        if not location:
            raise TransferFailed(f"{redacted(url)}: a redirect to nowhere")
        return self.resolve(url, location)

    def resolve(self, url: str, location: str) -> str:
        """Where ``location``, which the answer from ``url`` names, is. Raises as `location`."""
        target = resolve_location(url, location)
        if url.startswith("https:") and target.startswith("http:") and not self._plain_http:
            raise TransferFailed(
                f"{redacted(url)}: a redirect from https to {redacted(target)} only with --plain-http"
            )
        return target

    @property
    def has_credentials(self) -> bool:
        return self._authorizer.has_credentials

    def apart(self, *scopes: str) -> Session:
        """For requests that may be refused: what comes of that stays apart from this session. Close it.

        Its tokens are to reach as far as ``scopes``, too.
        """
        return attrs.evolve(self, authorizer=self._authorizer.branch(*scopes))

    def close(self) -> None:
        """Forget the tokens."""
        self._authorizer.close()

    async def refusal(self, answer: Answer, seconds: float) -> RegistryError:
        """What an answer that isn't the one wanted means, with the cure if there is one. Uses up its body."""
        error = await status_error(answer.response, answer.url, self.transport.clock, seconds)
        if not isinstance(error, AccessDenied) or Origin.of(answer.url) != self.origin:
            return error
        if scope := _scope_wanted(answer.response):
            return AccessDenied(f"{error} (this user's token does not reach as far as {scope!r:.200})")
        if self._authorizer.has_credentials:
            return AccessDenied(f"{error} (wrong user name or password, or not this user's image)")
        return AccessDenied(f"{error} (does the image exist? if it is private, {LOG_IN})")

    def _pass_on(self, response: IResponse) -> None:
        for text in self._notices.new(response.headers.getRawHeaders("Warning", [])):
            self._log.warn("the registry {host} says: {text}", host=self.origin.host, text=text)

    async def _ask_registry(
        self, method: str, url: str, headers: Mapping[str, str], seconds: float, body: Body
    ) -> IResponse:
        ask, headers = self.transport.request, {**self._headers, **headers}
        used = await self._authorizer.authorization()
        response = await ask(method, url, _authorized(headers, used), seconds, body)
        expired = response.code == 403 and used is not None and used.startswith("Bearer ")
        if response.code == 401 or expired:
            challenges = response.headers.getRawHeaders("WWW-Authenticate", [])
            await discard(response, self.transport.clock, seconds)
            await self._authorizer.renew(challenges, used)
        elif response.code == 403 and used is not None and await self._authorizer.has_newer(used):
            await discard(response, self.transport.clock, seconds)
        else:
            return response
        renewed = await self._authorizer.authorization()
        return await ask(method, url, _authorized(headers, renewed), seconds, body)


def _scope_wanted(response: IResponse) -> str:
    """What a token would have to be for; '' if that was not what is missing (RFC 6750, section 3.1)."""
    try:
        challenges = parse_challenges(response.headers.getRawHeaders("WWW-Authenticate", []))
    except InvalidHeader:
        return ""
    return next(
        (
            challenge.parameters.get("scope", "")
            for challenge in challenges
            if challenge.parameters.get("error") == "insufficient_scope"
        ),
        "",
    )


def _authorized(headers: Mapping[str, str], authorization: str | None) -> Mapping[str, str]:
    return headers if authorization is None else {**headers, "Authorization": authorization}
