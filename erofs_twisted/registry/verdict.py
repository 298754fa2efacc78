"""Which check a server's certificate failed, in words that say what to do."""

from __future__ import annotations

import ipaddress
from collections.abc import Callable, Sequence
from datetime import UTC, datetime

import attrs
from cryptography import x509
from OpenSSL.SSL import Error as TLSError
from service_identity import CertificateError, VerificationError
from service_identity.hazmat import (
    DNS_ID,
    CertificatePattern,
    DNSPattern,
    IPAddress_ID,
    IPAddressPattern,
    verify_service_identity,
)

MAX_NAMES, MAX_NAME = 5, 100
"""What of a certificate gets into a message: so many names, of so many characters."""
TRUST_IT = (
    "--tls-ca PATH names a file of authorities to trust beside the system's (so do ca.crt in the server's "
    "directory below certs.d, and SSL_CERT_FILE in the environment)"
)


class CertificateRefused(TLSError):
    """A server's certificate does not pass. It is an error of OpenSSL's, since Twisted passes on those."""

    def __init__(self, reason: str) -> None:
        super().__init__([("SSL routines", "", "certificate verify failed")])
        self.reason = reason


UNKNOWN_AUTHORITY = frozenset({2, 18, 19, 20, 21})
"""The numbers of errors which only say that whoever vouches is not trusted."""


def why_refused(error: int, depth: int, certificate: x509.Certificate, host: str, now: datetime) -> str:
    """What OpenSSL found wrong with ``certificate``, in the chain of ``host``'s.

    ``error`` is its X509_V_ERR_…; at ``depth`` 0 is the server's own certificate.
    """
    return _REASONS.get(error, _unknown(error))(_Suspect(depth == 0, certificate, host, now))


def why_not_for(certificate: x509.Certificate, host: str) -> str | None:
    """Why a certificate does not stand for ``host``, a name or an address (RFC 9525); None where it does."""
    names = _names(certificate)
    try:
        verify_service_identity(_patterns(names), [_identity(host)], [])
    except (VerificationError, CertificateError):
        if names:
            return f"the server's certificate is for {_listed(names)}, not for {_clean(host)}"
        return (
            f"the server's certificate is for no host at all, so not for {_clean(host)}: it has no subject "
            f"alternative names, and its subject, {_named(certificate.subject)}, does not count"
        )
    except ValueError:
        return f"no certificate can stand for {_clean(host)!r}, which is no host's name"
    return None


@attrs.frozen
class _Suspect:
    is_servers: bool
    certificate: x509.Certificate
    host: str
    now: datetime

    @property
    def subject(self) -> str:
        return _named(self.certificate.subject)

    @property
    def issuer(self) -> str:
        return _named(self.certificate.issuer)

    def __str__(self) -> str:
        return (
            "the server's certificate"
            if self.is_servers
            else f"the certificate of the authority {self.subject}"
        )


def _unknown_issuer(suspect: _Suspect) -> str:
    return (
        f"{suspect} was issued by {suspect.issuer}, an authority that is neither trusted here nor sent "
        f"along; {TRUST_IT}"
    )


def _self_signed(suspect: _Suspect) -> str:
    return f"the server's certificate, {suspect.subject}, is self-signed and not trusted here; {TRUST_IT}"


def _unknown_root(suspect: _Suspect) -> str:
    return (
        f"the server's certificate comes from the authority {suspect.subject}, not trusted here; {TRUST_IT}"
    )


def _expired(suspect: _Suspect) -> str:
    end = _date(suspect.certificate.not_valid_after_utc)
    return f"{suspect} expired on {end} (by the clock of this machine it is {_date(suspect.now)})"


def _not_yet_valid(suspect: _Suspect) -> str:
    start = _date(suspect.certificate.not_valid_before_utc)
    return (
        f"{suspect} is not valid before {start}, and by the clock of this machine it is "
        f"{_date(suspect.now)}; is the clock right?"
    )


def _no_authority(suspect: _Suspect) -> str:
    return (
        f"the server's certificate is signed by {suspect.subject}, whose own certificate is not that of an "
        "authority (basic constraints, key usage)"
    )


def _purpose(suspect: _Suspect) -> str:
    return f"{suspect} is not meant for servers: its key usage allows other purposes only"


def _weak(suspect: _Suspect) -> str:
    return f"{suspect} has a key or a signature that is too weak to be trusted; it has to be issued anew"


def _constraints(suspect: _Suspect) -> str:
    return (
        f"an authority in the chain of the server's certificate may not certify it (name constraints, length "
        f"of the path); found at {suspect.subject}"
    )


def _signature(suspect: _Suspect) -> str:
    return (
        f"the signature of {suspect} is not by the authority {suspect.issuer} as it is trusted here; if that "
        f"has a new key, {TRUST_IT}"
    )


def _unknown(error: int) -> Callable[[_Suspect], str]:
    return lambda suspect: f"{suspect}, {suspect.subject}, fails OpenSSL's check number {error}"


_REASONS: dict[int, Callable[[_Suspect], str]] = {
    2: _unknown_issuer,
    7: _signature,
    9: _not_yet_valid,
    10: _expired,
    18: _self_signed,
    19: _unknown_root,
    20: _unknown_issuer,
    21: _unknown_issuer,
    25: _constraints,
    26: _purpose,
    32: _no_authority,
    47: _constraints,
    48: _constraints,
    66: _weak,
    67: _weak,
    68: _weak,
    79: _no_authority,
}
"""By the numbers in openssl/x509_vfy.h, X509_V_ERR_…: pyOpenSSL has no names for them."""


def _identity(host: str) -> DNS_ID | IPAddress_ID:
    try:
        return IPAddress_ID(ipaddress.ip_address(host))
    except ValueError:
        return DNS_ID(host.removesuffix("."))


def _names(certificate: x509.Certificate) -> list[str | ipaddress.IPv4Address | ipaddress.IPv6Address]:
    try:
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except x509.ExtensionNotFound:
        return []
    addresses = [
        address
        for address in names.get_values_for_type(x509.IPAddress)
        if isinstance(address, ipaddress.IPv4Address | ipaddress.IPv6Address)
    ]
    return [*names.get_values_for_type(x509.DNSName), *addresses]


def _patterns(
    names: Sequence[str | ipaddress.IPv4Address | ipaddress.IPv6Address],
) -> list[CertificatePattern]:
    """Without those that are none, such as an address among the names: they must not spoil the others."""
    patterns: list[CertificatePattern] = []
    for name in names:
        if not isinstance(name, str):
            patterns.append(IPAddressPattern(name))
            continue
        try:
            patterns.append(DNSPattern.from_bytes(name.encode()))
        except CertificateError:
            continue
    return patterns


def _listed(names: Sequence[object]) -> str:
    shown = ", ".join(_clean(str(name)) for name in names[:MAX_NAMES])
    more = len(names) - MAX_NAMES
    return f"{shown} and {more} more" if more > 0 else shown


def _named(name: x509.Name) -> str:
    return f"'{_clean(name.rfc4514_string())}'"


def _clean(text: str) -> str:
    """What a stranger wrote, in one line that is not too long."""
    printable = "".join(character if character.isprintable() else "?" for character in text)
    return printable if len(printable) <= MAX_NAME else f"{printable[:MAX_NAME]}…"


def _date(moment: datetime) -> str:
    return f"{moment.astimezone(UTC):%Y-%m-%d %H:%M} UTC"
