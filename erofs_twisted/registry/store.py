"""The store that a reference is in."""

from __future__ import annotations

from typing import Any

from twisted.python.threadpool import ThreadPool

from erofs_twisted.interfaces import IImageStore
from erofs_twisted.registry.credentials import Credentials
from erofs_twisted.registry.dockerconfig import LoginFiles
from erofs_twisted.registry.reference import ImageReference, LayoutReference
from erofs_twisted.registry.tlssettings import TLSSettings


def open_store(
    reactor: Any,
    reference: ImageReference | LayoutReference,
    *,
    pool: ThreadPool,
    credentials: Credentials | None = None,
    logins: LoginFiles | None = None,
    plain_http: bool = False,
    io_timeout: float = 120.0,
    cache_dir: str | None = None,
    tls: TLSSettings | None = None,
) -> IImageStore:
    """The `IImageStore` of ``reference``. Nothing is opened before it is used.

    ``credentials`` win over those in ``logins``. ``io_timeout`` is how many seconds a read of a registry's
    blob goes on without progress. Files of ``tls`` are read here, for the first time: raises
    `InvalidTLSFile`. Below ``cache_dir`` a registry's manifests are kept. Other files are read in the threads
    of ``pool``.
    """
    if isinstance(reference, LayoutReference):
        from erofs_twisted.registry.layout import LayoutStore

        return LayoutStore(reactor, reference, pool)
    # treq and what it needs take a noticeable part of the start-up: only where there is a registry.
    from erofs_twisted.registry.client import RegistryStore
    from erofs_twisted.registry.documents import DocumentFiles
    from erofs_twisted.registry.keychain import Given, IKeychain
    from erofs_twisted.registry.tls import TLSPolicy
    from erofs_twisted.registry.transport import Transport
    from erofs_twisted.registry.urls import Origin

    registry = Origin.of(f"https://{reference.api_authority}/")
    policy = TLSPolicy(tls, own=frozenset({(registry.host, registry.port)}))
    transport = Transport.over_sockets(reactor, policy)
    documents = None if cache_dir is None else DocumentFiles(reactor, pool, cache_dir)
    keychain: IKeychain = Given(credentials)
    if credentials is None and logins is not None:
        from erofs_twisted.registry.logins import Logins

        keychain = Logins(reactor, pool, logins, reference.registry, reference.repository)
    return RegistryStore(reference, transport, keychain, plain_http, io_timeout, documents)
