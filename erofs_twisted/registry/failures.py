"""Why no answer came, or not all of it: Twisted's nested failures as one line, with the cure."""

from __future__ import annotations

from OpenSSL.SSL import Error as TLSError
from twisted.internet.defer import CancelledError
from twisted.internet.defer import TimeoutError as TimedOut
from twisted.internet.error import ConnectError, ConnectingCancelledError, ConnectionClosed, DNSLookupError
from twisted.python.failure import Failure
from twisted.web._newclient import RequestNotSent
from twisted.web.client import RequestGenerationFailed, RequestTransmissionFailed, ResponseFailed

from erofs_twisted.registry.errors import TransferFailed, Unreachable
from erofs_twisted.registry.urls import redacted
from erofs_twisted.registry.verdict import CertificateRefused

NETWORK_FAILURES = (
    ConnectError,
    ConnectingCancelledError,
    ConnectionClosed,
    OSError,
    RequestGenerationFailed,
    RequestNotSent,
    RequestTransmissionFailed,
    ResponseFailed,
    TLSError,
    TimedOut,
)
"""What an agent's request may come to where nothing is wrong with this program."""


def network_failure(error: BaseException, url: str) -> TransferFailed:
    """No answer: the name is unknown, the connection refused or broken, TLS failed, or time ran out.

    What TLS finds wrong stays wrong, unless it is only a connection that was cut or damaged; all else may
    pass.
    """
    cause = innermost(error)
    if isinstance(cause, CertificateRefused):
        return TransferFailed(f"{redacted(url)}: TLS failed: {cause.reason}")
    if isinstance(cause, TLSError) and (reason := _tls_reason(cause)):
        meaning = next((text for words, text in _MEANINGS.items() if words in reason), "")
        return TransferFailed(
            f"{redacted(url)}: TLS failed: {meaning or reason}" + (f" ({reason})" if meaning else ""),
            temporary=any(words in reason for words in _PASSING),
        )
    kind = Unreachable if isinstance(cause, ConnectError | DNSLookupError) else TransferFailed
    return kind(f"{redacted(url)}: {describe(cause)}", temporary=True)


_CLIENT_PAIR = "a client certificate is NAME.cert with NAME.key in the server's directory below certs.d"
_OLD = "the server speaks only versions of TLS that are too old: 1.2 is the oldest that is used here"
_PLAIN = "the server does not speak TLS; if the registry speaks HTTP without it, say --plain-http"
_MEANINGS = {
    "wrong version number": _PLAIN,
    "packet length": _PLAIN,
    "http request": _PLAIN,
    "unsupported protocol": _OLD,
    "alert protocol version": _OLD,
    "alert certificate required": f"the server wants a client certificate; {_CLIENT_PAIR}",
    "alert bad certificate": "the server wants a client certificate, and got none, or one that it refuses; "
    + _CLIENT_PAIR,
    "alert unknown ca": f"the server does not know the authority of our client certificate; {_CLIENT_PAIR}",
    "alert certificate expired": f"the server says that our client certificate has expired; {_CLIENT_PAIR}",
    "alert certificate revoked": f"the server says that our client certificate is revoked; {_CLIENT_PAIR}",
    "alert certificate unknown": f"the server refuses our client certificate; {_CLIENT_PAIR}",
    "alert unsupported certificate": f"the server refuses our client certificate; {_CLIENT_PAIR}",
    "alert access denied": f"the server does not let our client certificate in; {_CLIENT_PAIR}",
    "alert handshake failure": "the server has no cipher in common with us, or wants a client certificate; "
    + _CLIENT_PAIR,
    "alert unrecognized name": "the server knows no host of this name",
}
"""What OpenSSL's words mean for a registry, by a part of them."""
_PASSING = ("bad record mac", "decryption failed", "alert internal error", "alert user canceled")
"""Bytes that were damaged on the way, and what says of itself that it has nothing to do with us."""


def is_cancellation(error: BaseException) -> bool:
    """Did a request end because its Deferred was cancelled? An agent seldom says so by a CancelledError."""
    return isinstance(innermost(error), CancelledError | ConnectingCancelledError)


def broken_off(reason: Failure) -> TransferFailed:
    """A body ended before its end."""
    cause = innermost(reason.value) if reason.value is not None else None
    error = TransferFailed(f"the connection broke off ({describe(cause)})", temporary=True)
    error.__cause__ = cause
    return error


def innermost(error: BaseException) -> BaseException:
    """The error below ``ResponseFailed`` and its like."""
    reasons = getattr(error, "reasons", None)
    if not reasons or not isinstance(reasons[0], Failure) or reasons[0].value is None:
        return error
    return innermost(reasons[0].value)


def describe(error: BaseException | None) -> str:
    """An error in one line; its type where it has nothing to say."""
    return " ".join(str(error).split()) or type(error).__name__


def _tls_reason(error: TLSError) -> str:
    """OpenSSL's own words; '' where the server only hung up."""
    entries = error.args[0] if error.args and isinstance(error.args[0], list | tuple) else ()
    return "; ".join(str(entry[-1]) for entry in entries if entry)
