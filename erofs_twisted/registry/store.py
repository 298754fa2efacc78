"""The store that a reference is in."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import attrs
from twisted.logger import Logger
from twisted.python.threadpool import ThreadPool

from erofs_twisted.interfaces import IImageStore, Tell, silent
from erofs_twisted.registry.hosts import FoundHosts, HostSettings, default_host
from erofs_twisted.registry.reference import ImageReference, LayoutReference
from erofs_twisted.registry.settings import RegistrySettings
from erofs_twisted.registry.tlssettings import Server, TLSSettings
from erofs_twisted.registry.urls import Origin

if TYPE_CHECKING:
    from erofs_twisted.registry.host import RegistryHost
    from erofs_twisted.registry.keychain import IKeychain

_log = Logger()


def open_store(
    reactor: Any,
    reference: ImageReference | LayoutReference,
    settings: RegistrySettings | None = None,
    *,
    pool: ThreadPool,
    cache_dir: str | None = None,
    tell: Tell = silent,
) -> IImageStore:
    """The `IImageStore` of ``reference``. Nothing is opened before it is used.

    The files of ``settings.tls`` and of its hosts are read here, for the first time: raises `InvalidTLSFile`.
    Below ``cache_dir`` a registry's manifests are kept. Other files are read in the threads of ``pool``. Each
    step is told to ``tell``.
    """
    if isinstance(reference, LayoutReference):
        from erofs_twisted.registry.layout import LayoutStore

        return LayoutStore(reactor, reference, pool)
    # treq and what it needs take a noticeable part of the start-up: only where there is a registry.
    from erofs_twisted.registry.client import RegistryStore
    from erofs_twisted.registry.documents import DocumentFiles

    settings = settings or RegistrySettings()
    found = settings.hosts or FoundHosts((default_host(reference.registry),))
    _explain(reference, found, settings.tls, tell)
    hosts = [_open_host(reactor, pool, reference, host, settings, tell) for host in found.hosts]
    documents = None if cache_dir is None else DocumentFiles(reactor, pool, cache_dir)
    return RegistryStore(reference, hosts, settings.io_timeout, settings.stall_timeout, documents)


def _explain(reference: ImageReference, found: FoundHosts, tls: TLSSettings, tell: Tell) -> None:
    unverified = tls.unverified.union(*(_tls(host, tls).unverified for host in found.hosts))
    for warning in (*found.warnings, *attrs.evolve(tls, unverified=unverified).warnings()):
        _log.warn("{text}", text=warning)
    if tell is not silent:
        said = found.source or "nothing is said of this registry's servers (--hosts-dir)"
        tell(f"{reference.registry}: {said}")
        for host in found.hosts:
            tell(f"{reference.registry}: {host.description}")


def _open_host(
    reactor: Any,
    pool: ThreadPool,
    reference: ImageReference,
    host: HostSettings,
    settings: RegistrySettings,
    tell: Tell,
) -> RegistryHost:
    """With connections of its own: what vouches for one server need not do so for another."""
    from erofs_twisted.registry.host import RegistryHost
    from erofs_twisted.registry.tls import TLSPolicy
    from erofs_twisted.registry.transport import Transport

    transport = Transport.over_sockets(
        reactor,
        TLSPolicy(_tls(host, settings.tls), own=frozenset({_server(host)})),
        proxies=settings.proxies,
        connect_timeout=host.connect_timeout,
        tell=tell,
    )
    keychain = _keychain(reactor, pool, reference, host, settings)
    return RegistryHost(host, reference, transport, keychain, settings.plain_http)


def _server(host: HostSettings) -> Server:
    origin = Origin.of(f"{host.scheme or 'https'}://{host.authority}")
    return origin.host, origin.port


def _tls(host: HostSettings, tls: TLSSettings) -> TLSSettings:
    """What holds of all servers, and what is said of this one."""
    return TLSSettings(
        authorities=tls.authorities + host.authorities,
        clients=tls.clients + host.clients,
        unverified=tls.unverified | ({_server(host)} if host.skip_verify else set()),
    )


def _keychain(
    reactor: Any,
    pool: ThreadPool,
    reference: ImageReference,
    host: HostSettings,
    settings: RegistrySettings,
) -> IKeychain:
    """What was given is for the registry's own servers; a mirror is logged in to under its own name."""
    from erofs_twisted.registry.keychain import Given

    is_own = host.is_of(reference.registry)
    if settings.credentials is not None and (is_own or not host.is_mirror):
        return Given(settings.credentials)
    if settings.logins is None:
        return Given()
    from erofs_twisted.registry.logins import Logins

    registry = reference.registry if is_own else host.authority
    return Logins(reactor, pool, settings.logins, registry, reference.repository)
