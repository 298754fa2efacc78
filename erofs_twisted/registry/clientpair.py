"""Client certificates in OpenSSL's hands: which of several is shown, and only where a server asks for one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from cryptography import x509
from OpenSSL import SSL
from OpenSSL._util import ffi, lib

from erofs_twisted.registry.errors import InvalidTLSFile
from erofs_twisted.registry.pem import ClientPair
from erofs_twisted.registry.pemfiles import read_client


def read_usable_client(chain_path: str, key_path: str) -> ClientPair:
    """`read_client`, and OpenSSL takes it, too. Raises `InvalidTLSFile`."""
    client = read_client(chain_path, key_path)
    try:
        show(SSL.Context(SSL.TLS_CLIENT_METHOD), [client])
    except SSL.Error as error:
        reason = "; ".join(str(entry[-1]) for entry in error.args[0])
        raise InvalidTLSFile(f"{chain_path}: OpenSSL does not take this certificate: {reason}") from error
    return client


def show(context: SSL.Context, clients: Sequence[ClientPair]) -> None:
    """Let the connections of a context show one of ``clients`` to a server that asks: `chosen`."""
    for client in clients:
        for certificate in client.chain[1:]:
            context.add_extra_chain_cert(certificate)
    if len(clients) == 1:
        context.use_certificate(clients[0].chain[0])
        context.use_privatekey(clients[0].key)
        return

    def choose(ssl: Any, _: Any) -> int:
        connection = SSL.Connection._reverse_mapping[ssl]
        client = chosen(clients, _accepted(connection))
        connection.use_certificate(client.chain[0])
        connection.use_privatekey(client.key)
        return 1

    # OpenSSL has a hook for this, and pyOpenSSL no public way to it.
    callback = ffi.callback("int (*)(SSL *, void *)", choose)
    lib.SSL_CTX_set_cert_cb(context._context, callback, ffi.NULL)
    context.set_app_data(callback)  # it has to live as long as the context does


def chosen(clients: Sequence[ClientPair], authorities: Sequence[x509.Name]) -> ClientPair:
    """The first that one of the ``authorities`` vouches for, by which a server says what it accepts. Where
    there is none, the first of all: then the server says what it holds against it."""
    accepted = frozenset(authorities)
    return next((client for client in clients if client.issuers & accepted), clients[0])


def _accepted(connection: SSL.Connection) -> list[x509.Name]:
    try:
        return connection.get_client_ca_list(as_cryptography=True)
    except ValueError:  # a name that cannot be read
        return []
