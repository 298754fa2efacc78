"""A certificate authority for a test, and certificates by it."""

from __future__ import annotations

import ipaddress
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric.ec import SECP256R1
from cryptography.hazmat.primitives.asymmetric.ec import generate_private_key as generate_ec_key
from cryptography.hazmat.primitives.asymmetric.rsa import RSAPrivateKey, generate_private_key
from cryptography.hazmat.primitives.asymmetric.types import CertificatePublicKeyTypes
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import NameOID, ObjectIdentifier

Authority = tuple[RSAPrivateKey, x509.Certificate]
HOUR, DAY = timedelta(hours=1), timedelta(days=1)
VALID = (-HOUR, 2 * DAY)
"""From when to when, counted from now."""


def make_authority(
    name: str,
    by: Authority | None = None,
    *,
    is_authority: bool = True,
    valid: tuple[timedelta, timedelta] = VALID,
    permitted: Sequence[str] = (),
) -> Authority:
    """A key and its certificate, self-signed or by another authority.

    ``permitted`` are the domains that it may certify, if not all. It says itself whether it is an authority.
    """
    key = generate_private_key(65537, 2048)
    subject = _name(name)
    issuer = subject if by is None else by[1].subject
    builder = _builder(subject, issuer, key.public_key(), valid).add_extension(
        x509.BasicConstraints(ca=is_authority, path_length=None), critical=True
    )
    if permitted:
        domains = [x509.DNSName(domain) for domain in permitted]
        builder = builder.add_extension(x509.NameConstraints(domains, None), critical=True)
    return key, builder.sign(key if by is None else by[0], hashes.SHA256())


def issue(
    authority: Authority | None,
    hosts: Sequence[str],
    directory: Path,
    *,
    valid: tuple[timedelta, timedelta] = VALID,
    between: Sequence[Authority] = (),
    purpose: ObjectIdentifier | None = None,
    common: str = "",
) -> tuple[Path, Path]:
    """A certificate for ``hosts`` (names and addresses), by ``authority``: files of it and of its key.

    Without an authority it is self-signed; without hosts it has only a common name. ``between`` are the
    authorities whose certificates follow it in the file. ``purpose`` is what it is for, if not for all.
    """
    key = generate_ec_key(SECP256R1())
    subject = _name(common or hosts[0])
    issuer = subject if authority is None else authority[1].subject
    builder = _builder(subject, issuer, key.public_key(), valid)
    if hosts:
        names = x509.SubjectAlternativeName([_host(host) for host in hosts])
        builder = builder.add_extension(names, critical=False)
    if purpose is not None:
        builder = builder.add_extension(x509.ExtendedKeyUsage([purpose]), critical=False)
    certificate = builder.sign(key if authority is None else authority[0], hashes.SHA256())
    directory.mkdir(parents=True, exist_ok=True)
    chain_file, key_file = directory / "chain.pem", directory / "key.pem"
    chain_file.write_bytes(pem(certificate) + b"".join(pem(other[1]) for other in between))
    key_file.write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    return chain_file, key_file


def pem(certificate: x509.Certificate) -> bytes:
    return certificate.public_bytes(Encoding.PEM)


def _name(common: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common)])


def _host(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        return x509.DNSName(host)


def _builder(
    subject: x509.Name,
    issuer: x509.Name,
    key: CertificatePublicKeyTypes,
    valid: tuple[timedelta, timedelta],
) -> x509.CertificateBuilder:
    now = datetime.now(UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now + valid[0])
        .not_valid_after(now + valid[1])
    )
