"""How a registry is spoken to: who we are, which of its servers, by which way, and for how long."""

from __future__ import annotations

import attrs

from erofs_twisted.registry.credentials import Credentials
from erofs_twisted.registry.dockerconfig import LoginFiles
from erofs_twisted.registry.hosts import FoundHosts
from erofs_twisted.registry.proxies import Proxies
from erofs_twisted.registry.tlssettings import TLSSettings


@attrs.frozen(kw_only=True)
class RegistrySettings:
    """``credentials`` were given themselves, and win over those in ``logins``; None: there are none.

    ``hosts`` None is the registry's own server alone. ``proxies`` lie before all servers. ``io_timeout`` is
    how many seconds a read of a blob goes on without progress, ``stall_timeout`` how many a request may bring
    nothing.
    """

    credentials: Credentials | None = None
    logins: LoginFiles | None = None
    hosts: FoundHosts | None = None
    plain_http: bool = False
    tls: TLSSettings = attrs.field(factory=TLSSettings)
    proxies: Proxies = attrs.field(factory=Proxies)
    io_timeout: float = 120.0
    stall_timeout: float = 15.0
