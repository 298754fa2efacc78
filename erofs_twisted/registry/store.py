"""The store that a reference is in."""

from __future__ import annotations

from typing import Any

from twisted.logger import Logger
from twisted.python.threadpool import ThreadPool

from erofs_twisted.interfaces import IImageStore, Tell, silent
from erofs_twisted.registry.credentials import Credentials
from erofs_twisted.registry.dockerconfig import LoginFiles
from erofs_twisted.registry.hosts import HostSettings, default_host
from erofs_twisted.registry.hostsdir import FoundHosts
from erofs_twisted.registry.proxies import Proxies
from erofs_twisted.registry.reference import ImageReference, LayoutReference

_log = Logger()


def open_store(
    reactor: Any,
    reference: ImageReference | LayoutReference,
    *,
    pool: ThreadPool,
    credentials: Credentials | None = None,
    logins: LoginFiles | None = None,
    plain_http: bool = False,
    io_timeout: float = 120.0,
    stall_timeout: float = 15.0,
    hosts: FoundHosts | None = None,
    cache_dir: str | None = None,
    trust_root: Any = None,
    tell: Tell = silent,
    proxies: Proxies | None = None,
) -> IImageStore:
    """The `IImageStore` of ``reference``. Nothing is opened before it is used.

    ``credentials`` win over those in ``logins``. ``io_timeout`` is how many seconds a read of a registry's
    blob goes on without progress. ``trust_root``, an IOpenSSLTrustRoot, stands for the platform's
    certificates. ``proxies`` lie before the registry; None: there are none. Below ``cache_dir`` a registry's
    manifests are kept. Files are read in the threads of ``pool``.
    """
    if isinstance(reference, LayoutReference):
        from erofs_twisted.registry.layout import LayoutStore

        return LayoutStore(reactor, reference, pool)
    # treq and what it needs take a noticeable part of the start-up: only where there is a registry.
    from erofs_twisted.registry.client import RegistryStore
    from erofs_twisted.registry.documents import DocumentFiles
    from erofs_twisted.registry.host import RegistryHost
    from erofs_twisted.registry.keychain import Given, IKeychain
    from erofs_twisted.registry.transport import Transport

    found = hosts or FoundHosts((default_host(reference.registry),))
    for warning in found.warnings:
        _log.warn("{warning}", warning=warning)
    if tell is not silent:
        said = found.source or "nothing is said of this registry's servers (--hosts-dir)"
        tell(f"{reference.registry}: {said}")
        for host in found.hosts:
            tell(f"{reference.registry}: {host.description}")

    def keychain(host: HostSettings) -> IKeychain:
        if credentials is not None and not host.is_mirror:
            return Given(credentials)
        if logins is None:
            return Given()
        from erofs_twisted.registry.logins import Logins

        registry = reference.registry if host.is_of(reference.registry) else host.authority
        return Logins(reactor, pool, logins, registry, reference.repository)

    servers = []
    for host in found.hosts:
        transport = Transport.over_sockets(
            reactor, trust_root, proxies=proxies, connect_timeout=host.connect_timeout, tell=tell
        )
        servers.append(RegistryHost(host, reference, transport, keychain(host), plain_http))
    documents = None if cache_dir is None else DocumentFiles(reactor, pool, cache_dir)
    return RegistryStore(reference, servers, io_timeout, stall_timeout, documents)
