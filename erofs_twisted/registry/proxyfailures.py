"""What a proxy does wrong, or is told wrong: errors that name it, and the cure."""

from __future__ import annotations

from collections.abc import Iterable

from OpenSSL.SSL import Error as TLSError

from erofs_twisted.registry.answers import TEMPORARY
from erofs_twisted.registry.challenge import parse_challenges
from erofs_twisted.registry.connect import ConnectReply
from erofs_twisted.registry.errors import InvalidHeader, TransferFailed, Unreachable
from erofs_twisted.registry.failures import innermost, network_failure
from erofs_twisted.registry.proxies import Proxy
from erofs_twisted.registry.retry import parse_retry_after

AROUND = "NO_PROXY names hosts to reach without it"


def connection_failure(proxy: Proxy, error: BaseException) -> TransferFailed:
    """No connection to the proxy came about, or it broke."""
    cause = innermost(error)
    if isinstance(cause, TLSError) and "wrong version number" in str(cause):
        return TransferFailed(
            f"the proxy {proxy.url} does not speak TLS: {proxy.variable}=http://{proxy.authority} says so"
        )
    failure = network_failure(cause, proxy.url)
    text = f"the proxy {failure} ({proxy.variable} names it; {AROUND})"
    return type(failure)(text, temporary=failure.temporary)


def refusal(proxy: Proxy, target: str, reply: ConnectReply, now: float) -> TransferFailed:
    """The proxy opens no tunnel to ``target``. Then nothing was asked of the registry."""
    if reply.code in (401, 407):  # tinyproxy says the one to a wrong password and the other to none
        challenges = [*reply.values("Proxy-Authenticate"), *reply.values("WWW-Authenticate")]
        return credentials_wanted(proxy, challenges)
    text = f"the proxy {proxy.url} does not connect us to {target}: {reply.code} {_printable(reply.phrase)}"
    if reply.code not in TEMPORARY:
        return TransferFailed(f"{text.rstrip()} ({AROUND})")
    wait = next(iter(reply.values("Retry-After")), "")
    return Unreachable(text.rstrip(), temporary=True, retry_after=parse_retry_after(wait, now))


def credentials_wanted(proxy: Proxy, challenges: Iterable[str]) -> TransferFailed:
    """The proxy wants a user, or another one. That is no `AccessDenied`, which is the registry's."""
    try:
        schemes = [challenge.scheme for challenge in parse_challenges(challenges)]
    except InvalidHeader:
        schemes = []
    if schemes and "basic" not in schemes:
        return TransferFailed(
            f"the proxy {proxy.url} wants authentication by {', '.join(schemes)[:80]}, "
            f"and only basic is known here ({AROUND})"
        )
    if proxy.credentials is not None:
        return TransferFailed(f"the proxy {proxy.url} refuses the user and password in {proxy.variable}")
    return TransferFailed(
        f"the proxy {proxy.url} wants a user and password: "
        f"{proxy.variable}={proxy.scheme}://USER:PASSWORD@{proxy.authority}"
    )


def _printable(text: str) -> str:
    return "".join(character if character.isprintable() else " " for character in text)[:100]
