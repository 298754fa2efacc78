"""Certificates and keys in PEM. Errors do not say of which file they are."""

from __future__ import annotations

import attrs
from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey
from cryptography.hazmat.primitives.asymmetric.ed448 import Ed448PrivateKey
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.rsa import RSAPrivateKey
from cryptography.hazmat.primitives.serialization import load_pem_private_key

from erofs_twisted.registry.errors import InvalidTLSFile

MAX_PEM = 8 * 1024 * 1024
"""Bytes of a file; a system's whole bundle of authorities takes a quarter of a megabyte."""

Key = RSAPrivateKey | EllipticCurvePrivateKey | Ed25519PrivateKey | Ed448PrivateKey
"""The kinds that TLS has a use for."""

_BEGIN = b"-----BEGIN CERTIFICATE-----"


@attrs.frozen
class ClientPair:
    """What shows a server who we are. The first certificate of ``chain`` is our own."""

    chain: tuple[x509.Certificate, ...]
    key: Key = attrs.field(repr=False)

    @property
    def issuers(self) -> frozenset[x509.Name]:
        """The authorities that vouch for it, as far as the chain shows them."""
        return frozenset(certificate.issuer for certificate in self.chain)

    @property
    def is_one(self) -> bool:
        """Does the key belong to the certificate?"""
        try:
            return bool(self.chain[0].public_key() == self.key.public_key())
        except (ValueError, UnsupportedAlgorithm):
            return False


def parse_certificates(content: bytes) -> tuple[x509.Certificate, ...]:
    """The certificates in a file, at least one; all else in it is passed over. Raises `InvalidTLSFile`."""
    if len(content) > MAX_PEM:
        raise InvalidTLSFile(f"larger than {MAX_PEM >> 20} MiB, which no file of certificates is")
    if _BEGIN not in content:
        text = f"no PEM certificate in it ({_BEGIN.decode()})"
        if content.startswith(b"\x30\x82"):
            text += "; it looks like DER: openssl x509 -inform der turns that into PEM"
        raise InvalidTLSFile(text)
    try:
        certificates = tuple(x509.load_pem_x509_certificates(content))
    except ValueError as error:
        raise InvalidTLSFile("a certificate in it is damaged") from error
    if len(certificates) < content.count(_BEGIN):
        raise InvalidTLSFile("a certificate in it is damaged, or not all there")
    return certificates


def parse_key(content: bytes) -> Key:
    """The private key in a file, beside what else is there. Raises `InvalidTLSFile`."""
    if b"PRIVATE KEY-----" not in content:
        raise InvalidTLSFile("no PEM private key in it (-----BEGIN PRIVATE KEY-----)")
    try:
        key = load_pem_private_key(content, None)
    except TypeError as error:
        raise InvalidTLSFile(
            "the key is encrypted, and nobody is there to type its passphrase; "
            "openssl pkey -in FILE -out FILE writes one that is not"
        ) from error
    except (ValueError, UnsupportedAlgorithm) as error:
        raise InvalidTLSFile("the private key in it is damaged, or of an unknown kind") from error
    if not isinstance(key, Key):
        raise InvalidTLSFile("the private key in it is of a kind that TLS has no use for")
    return key
