"""A registry's servers over an agent whose answers a test writes."""

from __future__ import annotations

from typing import Any

import attrs

from erofs_twisted.registry.client import RegistryStore
from erofs_twisted.registry.credentials import Identity
from erofs_twisted.registry.host import RegistryHost
from erofs_twisted.registry.hosts import HostSettings, default_host
from erofs_twisted.registry.keychain import Given
from erofs_twisted.registry.reference import ImageReference, parse_reference
from erofs_twisted.registry.retry import Backoff
from erofs_twisted.registry.transport import Transport


def fake_host(
    transport: Transport,
    image: str = "r.example/a",
    credentials: Identity | None = None,
    plain_http: bool = False,
    settings: HostSettings | None = None,
) -> RegistryHost:
    """The server of an image's registry, or the one of ``settings``."""
    reference = parse_reference(image)
    assert isinstance(reference, ImageReference)
    settings = settings or default_host(reference.registry)
    return RegistryHost(settings, reference, transport, Given(credentials), plain_http)


def fake_mirror(transport: Transport, url: str, image: str = "r.example/a", **how: Any) -> RegistryHost:
    """A mirror of an image's registry, at ``https://host``."""
    scheme, _, authority = url.partition("://")
    settings = HostSettings(authority=authority, scheme=scheme, is_mirror=True)
    return fake_host(transport, image, settings=attrs.evolve(settings, **how))


def fake_store(transport: Transport, image: str, *hosts: RegistryHost, **how: Any) -> RegistryStore:
    """An image at ``hosts``, or at its registry's own server, for ``credentials`` and with ``plain_http``."""
    reference = parse_reference(image)
    assert isinstance(reference, ImageReference)
    of_host = {name: how.pop(name) for name in ("credentials", "plain_http") if name in how}
    how.setdefault("backoff", Backoff(random=lambda: 1.0))
    return RegistryStore(reference, hosts or (fake_host(transport, image, **of_host),), **how)
