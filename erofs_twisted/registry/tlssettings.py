"""Whom TLS trusts beside the system's authorities, whom it believes unseen, and what it shows of itself."""

from __future__ import annotations

import ipaddress
import re

import attrs

HTTPS_PORT = 443

Server = tuple[str, int]
"""A host's name in lower case, or its address without brackets; and a port."""

_AUTHORITY = re.compile(r"(?:\[([^\[\]]*)\]|([^:\[\]]+))(?::([0-9]{1,5}))?")
_NAME = re.compile(r"[a-z0-9_](?:[a-z0-9._-]*[a-z0-9])?")


@attrs.frozen
class TLSSettings:
    """Files are in PEM, and named by absolute paths, since they are looked at for as long as a mount lives.

    ``authorities`` are files of certificates that are trusted beside the system's. ``clients`` are pairs of
    files, a certificate with its chain and its key (which may be one file), to show to a registry that wants
    to know who we are. ``unverified`` are the servers whose certificates are not looked at.
    """

    authorities: tuple[str, ...] = ()
    clients: tuple[tuple[str, str], ...] = ()
    unverified: frozenset[Server] = frozenset()

    def warnings(self) -> list[str]:
        """A line for people about each server that is not verified."""
        return [
            f"the certificate of {authority_of(server)} is not verified, as was asked for: anybody on the "
            "way can read and change what is sent"
            for server in sorted(self.unverified)
        ]


def parse_unverified(text: str) -> frozenset[Server]:
    """``HOST[:PORT],…``; without a port it is https's. Raises ValueError."""
    return frozenset(map(_parse_server, text.split(",")))


def authority_of(server: Server) -> str:
    """``host:port``, an IPv6 address in brackets."""
    host, port = server
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _parse_server(text: str) -> Server:
    wanted = "each server is HOST or HOST:PORT, an IPv6 address in brackets"
    if "/" in text:
        raise ValueError(f"{text!r} is a URL or a part of an image's name; {wanted}")
    if "*" in text:
        raise ValueError(f"{text!r} would be many servers; name each of them")
    match = _AUTHORITY.fullmatch(text.lower())
    if match is None:
        raise ValueError(f"{text!r} is not a server; {wanted}")
    address, name, port_text = match.groups()
    port = int(port_text) if port_text else HTTPS_PORT
    if not 1 <= port <= 65535:
        raise ValueError(f"{text!r}: a port is 1 to 65535, not {port}")
    if address is not None:
        try:
            return str(ipaddress.IPv6Address(address)), port
        except ValueError:
            raise ValueError(f"{text!r}: {address!r} is not an IPv6 address") from None
    if not _NAME.fullmatch(name):
        raise ValueError(f"{text!r}: {name!r} is not a host's name; {wanted}")
    return name, port
