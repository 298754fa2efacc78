"""TLS to a registry and to where it sends us: whom to trust, and what to show."""

from __future__ import annotations

import ipaddress
import os
from datetime import UTC, datetime
from functools import partial
from typing import Any

import attrs
from OpenSSL import SSL
from OpenSSL.crypto import X509, X509StoreFlags
from twisted.internet.interfaces import IOpenSSLClientConnectionCreator
from twisted.logger import Logger
from twisted.web.iweb import IPolicyForHTTPS
from zope.interface import implementer

from erofs_twisted.registry.clientpair import read_usable_client, show
from erofs_twisted.registry.pemfiles import Signature, Watched, read_authorities, signature
from erofs_twisted.registry.tlssettings import Server, TLSSettings
from erofs_twisted.registry.verdict import UNKNOWN_AUTHORITY, CertificateRefused, why_not_for, why_refused

_SYSTEM_BUNDLES = (
    "/etc/ssl/certs/ca-certificates.crt",
    "/etc/pki/tls/certs/ca-bundle.crt",
    "/etc/ssl/ca-bundle.pem",
    "/etc/ssl/cert.pem",
)
"""Where distributions keep their authorities: they are updated, too, while a mount lives."""


@implementer(IPolicyForHTTPS)
class TLSPolicy:
    """Trusts the system's authorities (OpenSSL's, so SSL_CERT_FILE and SSL_CERT_DIR count) and those in
    ``settings``. A certificate of ours is shown to the servers in ``own`` only.

    Raises `InvalidTLSFile`. Later, files are looked at again for each new connection, and read if they have
    changed; what cannot be read then counts as it was.
    """

    _log = Logger()

    def __init__(self, settings: TLSSettings | None = None, own: frozenset[Server] = frozenset()) -> None:
        settings = settings or TLSSettings()
        self._own = own
        self._unverified = settings.unverified
        self._authorities = [
            Watched((path,), partial(read_authorities, path), self._warn) for path in settings.authorities
        ]
        self._clients = [
            Watched(pair, partial(read_usable_client, *pair), self._warn) for pair in settings.clients
        ]
        self._system = _system_signatures()
        self._contexts: dict[tuple[bool, bool], SSL.Context] = {}

    def creatorForNetloc(self, hostname: bytes, port: int) -> IOpenSSLClientConnectionCreator:
        return _Creator(self, (_normal(hostname.decode("ascii").strip("[]").lower()), port))

    def connection_to(self, server: Server) -> SSL.Connection:
        """A connection that is yet to be made, by what the files say now."""
        self._refresh()
        kind = server not in self._unverified, server in self._own
        if kind not in self._contexts:
            self._contexts[kind] = self._context(*kind)
        connection = _Connection(self._contexts[kind], server[0])
        if not _is_address(server[0]):
            connection.set_tlsext_host_name(server[0].removesuffix(".").encode("ascii"))
        return connection

    def _refresh(self) -> None:
        changed = [authorities.refresh() for authorities in self._authorities]
        changed += [client.refresh() for client in self._clients]
        system = _system_signatures()
        if any(changed) or system != self._system:
            self._system = system
            self._contexts.clear()

    def _context(self, is_verified: bool, is_own: bool) -> SSL.Context:
        context = SSL.Context(SSL.TLS_CLIENT_METHOD)
        context.set_min_proto_version(SSL.TLS1_2_VERSION)
        context.set_mode(SSL.MODE_RELEASE_BUFFERS)
        context.set_session_cache_mode(SSL.SESS_CACHE_OFF)
        if is_verified:
            context.set_default_verify_paths()
            store = context.get_cert_store()
            assert store is not None
            # As Go and curl do: who trusts an authority, or a server, need not trust the one above it.
            store.set_flags(X509StoreFlags.PARTIAL_CHAIN)
            for authorities in self._authorities:
                for certificate in authorities.value:
                    store.add_cert(X509.from_cryptography(certificate))
            context.set_verify(SSL.VERIFY_PEER, _verify)
        if is_own and self._clients:
            show(context, [client.value for client in self._clients])
        return context

    def _warn(self, text: str) -> None:
        self._log.warn("{text}", text=text)


@implementer(IOpenSSLClientConnectionCreator)
@attrs.frozen
class _Creator:
    """Endpoints keep these for weeks; the files are looked at for each connection."""

    _policy: TLSPolicy
    _server: Server

    def clientConnectionForTLS(self, tlsProtocol: Any) -> SSL.Connection:
        return self._policy.connection_to(self._server)


class _Connection(SSL.Connection):
    """To ``host``, which the verification needs to know."""

    def __init__(self, context: SSL.Context, host: str) -> None:
        super().__init__(context, None)
        self.host = host


def _verify(connection: SSL.Connection, certificate: X509, error: int, depth: int, is_right: int) -> bool:
    """OpenSSL's verdict on each certificate of a chain. pyOpenSSL raises what this raises out of the
    handshake, and Twisted takes errors of OpenSSL's as its end."""
    assert isinstance(connection, _Connection)
    try:
        found = certificate.to_cryptography()
        if not is_right:
            reason: str | None = why_refused(error, depth, found, connection.host, datetime.now(UTC))
            if error in UNKNOWN_AUTHORITY and (lack := _lack_of_authorities()):
                reason = f"{reason}; {lack}"
        else:
            reason = why_not_for(found, connection.host) if depth == 0 else None
    except Exception as broken:  # noqa: BLE001 - Twisted expects no other error than OpenSSL's
        reason = f"a certificate that the server sends cannot be read ({type(broken).__name__}: {broken})"
    if reason is not None:
        raise CertificateRefused(reason)
    return True


def _is_address(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


def _normal(host: str) -> str:
    """An address can be spelt in many ways."""
    return str(ipaddress.ip_address(host)) if _is_address(host) else host


def _system_signatures() -> list[Signature]:
    file, directories = os.environ.get("SSL_CERT_FILE", ""), os.environ.get("SSL_CERT_DIR", "")
    return [signature(path) for path in (file, *directories.split(os.pathsep), *_SYSTEM_BUNDLES)]


def _lack_of_authorities() -> str:
    """Why nobody is trusted, where there are no authorities of the system: OpenSSL does not say."""
    file = os.environ.get("SSL_CERT_FILE")
    if file is not None and not os.access(file, os.R_OK):
        return f"SSL_CERT_FILE in the environment names {file!r}, which cannot be read"
    is_named = file is not None or "SSL_CERT_DIR" in os.environ
    if not is_named and not any(map(os.path.exists, _SYSTEM_BUNDLES)):
        return "this system has no authorities of its own: its package for them, ca-certificates, is missing"
    return ""
