"""Hosts that are reached without a proxy: ``NO_PROXY``, as Go's programs read it.

The rules are those of Go's ``golang.org/x/net/http/httpproxy``, which Docker and containerd use. Besides,
blanks separate as commas do and a dot at a name's end means nothing, as curl has it, and an address may stand
in brackets.
"""

from __future__ import annotations

import re
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address, ip_network
from typing import TypeAlias

import attrs

_Address: TypeAlias = IPv4Address | IPv6Address
_Network: TypeAlias = IPv4Network | IPv6Network

_SEPARATORS = re.compile(r"[\s,]+")
_WITH_PORT = re.compile(r"(\[[^]]*\]|[^]:[]*):([0-9]*)")


@attrs.frozen
class _Rule:
    """A name, or some addresses, and all ports of theirs or one. What has neither is every host."""

    name: str = ""
    has_subdomains: bool = True
    network: _Network | None = None
    port: int | None = None

    def covers(self, name: str, address: _Address | None, port: int) -> bool:
        if self.port not in (None, port):
            return False
        if self.network is not None:
            return address is not None and address in self.network
        if not self.name:
            return True
        if address is not None:
            return False
        if self.name.startswith("."):
            return name.endswith(self.name)
        return name == self.name or (self.has_subdomains and name.endswith(f".{self.name}"))


_LOOPBACK = (
    _Rule("localhost", has_subdomains=False),
    _Rule(network=ip_network("127.0.0.0/8")),
    _Rule(network=ip_network("::1/128")),
)


@attrs.frozen
class NoProxy:
    """Which hosts need no proxy. Without rules, all need one."""

    _rules: tuple[_Rule, ...] = ()

    @classmethod
    def parse(cls, text: str) -> NoProxy:
        """From a list of names, addresses and networks; what cannot be read in it covers nothing.

        ``localhost`` and the addresses of this machine are covered without being named.
        """
        entries = (_parse_rule(entry) for entry in _SEPARATORS.split(text) if entry)
        return cls(_LOOPBACK + tuple(rule for rule in entries if rule is not None))

    def covers(self, host: str, port: int) -> bool:
        """Is ``host``, a name or an address without brackets, reached without a proxy?"""
        address = _address(host)
        name = dns_name(host)
        return any(rule.covers(name, address, port) for rule in self._rules)


def dns_name(name: str) -> str:
    """A host's name as DNS has it, in lower case; what cannot be one stays what it is."""
    name = name.lower().removesuffix(".")
    try:
        labels = [label if label.isascii() else label.encode("idna").decode() for label in name.split(".")]
    except UnicodeError:
        return name
    return ".".join(labels)


def _parse_rule(entry: str) -> _Rule | None:
    if entry == "*":
        return _Rule()
    if "/" in entry:
        network = _network(entry)
        return None if network is None else _Rule(network=network)
    if (address := _address(entry)) is not None:
        return _Rule(network=ip_network(address))
    port = None
    if match := _WITH_PORT.fullmatch(entry):
        entry, digits = match.groups()
        port = int(digits) if digits else None
    if (address := _address(entry.removeprefix("[").removesuffix("]"))) is not None:
        return _Rule(network=ip_network(address), port=port)
    name = dns_name(entry.removeprefix("*") if entry.startswith("*.") else entry)
    return _Rule(name, port=port) if name.strip(".") else None


def _address(text: str) -> _Address | None:
    """Without its zone, and of IPv4 where that is what an IPv6 address stands for."""
    try:
        address = ip_address(text.partition("%")[0])
    except ValueError:
        return None
    return getattr(address, "ipv4_mapped", None) or address


def _network(text: str) -> _Network | None:
    try:
        network = ip_network(text, strict=False)
    except ValueError:
        return None
    mapped = getattr(network.network_address, "ipv4_mapped", None)
    if mapped is None or network.prefixlen < 96:
        return network
    return ip_network((mapped, network.prefixlen - 96))
