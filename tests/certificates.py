"""A certificate authority for a test, and certificates by it."""

from __future__ import annotations

import ipaddress
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric.rsa import RSAPrivateKey, generate_private_key
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import NameOID

Authority = tuple[RSAPrivateKey, x509.Certificate]


def make_authority(name: str) -> Authority:
    """A key and its self-signed certificate."""
    key = generate_private_key(65537, 2048)
    subject = _name(name)
    certificate = (
        _builder(subject, subject, key)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    return key, certificate


def issue(authority: Authority, hosts: list[str], directory: Path) -> tuple[Path, Path]:
    """A certificate for ``hosts`` (names and addresses), by ``authority``: files of it and of its key."""
    key = generate_private_key(65537, 2048)
    names = [_host(host) for host in hosts]
    certificate = (
        _builder(_name(hosts[0]), authority[1].subject, key)
        .add_extension(x509.SubjectAlternativeName(names), critical=False)
        .sign(authority[0], hashes.SHA256())
    )
    chain_file, key_file = directory / "chain.pem", directory / "key.pem"
    chain_file.write_bytes(pem(certificate))
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


def _builder(subject: x509.Name, issuer: x509.Name, key: RSAPrivateKey) -> x509.CertificateBuilder:
    now = datetime.now(UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(hours=1))
        .not_valid_after(now + timedelta(days=2))
    )
