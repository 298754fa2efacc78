"""Why no answer came, or not all of it: Twisted's nested failures as one line, with the cure."""

from __future__ import annotations

from OpenSSL.SSL import Error as TLSError
from service_identity import VerificationError
from twisted.internet.defer import CancelledError
from twisted.internet.defer import TimeoutError as TimedOut
from twisted.internet.error import ConnectError, ConnectingCancelledError, ConnectionClosed, DNSLookupError
from twisted.python.failure import Failure
from twisted.web._newclient import RequestNotSent
from twisted.web.client import RequestGenerationFailed, RequestTransmissionFailed, ResponseFailed

from erofs_twisted.registry.errors import TransferFailed, Unreachable
from erofs_twisted.registry.urls import redacted

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
    VerificationError,
)
"""What an agent's request may come to where nothing is wrong with this program."""


def network_failure(error: BaseException, url: str) -> TransferFailed:
    """No answer: the name is unknown, the connection refused or broken, TLS failed, or time ran out.

    What TLS finds wrong stays wrong; all else may pass.
    """
    cause = innermost(error)
    if isinstance(cause, VerificationError):
        return TransferFailed(f"{redacted(url)}: the server's certificate is for another host")
    if isinstance(cause, TLSError) and (reason := _tls_reason(cause)):
        text = f"{redacted(url)}: TLS failed: {reason}"
        if "certificate verify failed" in reason:
            text += "; the environment variable SSL_CERT_FILE names a file of the authorities to trust"
        elif "wrong version number" in reason or "packet length" in reason:
            text += "; if the registry speaks HTTP without TLS, say --plain-http"
        return TransferFailed(text)
    kind = Unreachable if isinstance(cause, ConnectError | DNSLookupError) else TransferFailed
    return kind(f"{redacted(url)}: {describe(cause)}", temporary=True)


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
