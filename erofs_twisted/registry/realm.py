"""May a token server be sent credentials? A registry names it, and may be wrong, or not our friend.

A registry that anybody runs could have us ask hosts which only we can reach: a cloud's metadata service, a
router, a daemon on loopback.
"""

from __future__ import annotations

import ipaddress
import re
from urllib.parse import urlsplit

from erofs_twisted.registry.errors import AccessDenied, InvalidHeader
from erofs_twisted.registry.urls import Origin, redacted

_Address = ipaddress.IPv4Address | ipaddress.IPv6Address

_NUMBER = re.compile("0x[0-9a-f]*|[0-9]+")


def check_realm(realm: str, registry: Origin) -> None:
    """Raises `AccessDenied` unless ``realm`` is a URL that the registry at ``registry`` may send us to.

    That is https, if the registry is; and no private address, unless it is the registry's own host. What a
    name stands for is not looked at.
    """
    try:
        origin = Origin.of(realm)
    except InvalidHeader as error:
        raise AccessDenied(f"the registry's token server: {error}") from error
    shown = redacted(realm)
    if "@" in urlsplit(realm).netloc:
        raise AccessDenied(f"the URL of the registry's token server {shown} holds user information")
    if origin.scheme != "https" and registry.scheme == "https":
        raise AccessDenied(f"the registry's token server {shown} is not https, which is refused")
    if origin.host == registry.host:
        return
    address = literal_address(origin.host)
    if address is None or (address.is_global and not address.is_multicast):
        return
    own = literal_address(registry.host)
    if address.is_loopback and own is not None and own.is_loopback:
        return
    raise AccessDenied(
        f"the registry's token server {shown} is at a private address and not at the registry's own host, "
        "which is refused; give it a name in DNS"
    )


def literal_address(host: str) -> _Address | None:
    """The address that a URL's host stands for without DNS; None for a name.

    Also of forms that getaddrinfo(3) takes, for the sake of old programs: ``127.1``, ``0x7f000001``.
    """
    host = host.rstrip(".").lower()
    if host == "localhost" or host.endswith(".localhost"):
        return ipaddress.IPv4Address("127.0.0.1")
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return _old_address(host)
    if isinstance(address, ipaddress.IPv6Address):
        return address.ipv4_mapped or address.sixtofour or address
    return address


def _old_address(host: str) -> ipaddress.IPv4Address | None:
    parts = host.split(".")
    if len(parts) > 4 or not all(_NUMBER.fullmatch(part) for part in parts):
        return None
    try:
        *leading, last = (_number(part) for part in parts)
    except ValueError:
        return None
    room = 4 - len(leading)
    if any(part > 255 for part in leading) or last >= 256**room:
        return None
    return ipaddress.IPv4Address(bytes(leading) + last.to_bytes(room, "big"))


def _number(text: str) -> int:
    if text.startswith("0x"):
        return int(text[2:] or "0", 16)
    return int(text[:20], 8 if text.startswith("0") else 10)
