"""Which servers a registry's images may be asked of: ``hosts.toml``, as containerd has it.

containerd, docs/hosts.md. A file belongs to the registry that its directory is named after. It lists mirrors,
which are asked first and in their order, and says how to speak to the registry itself, which is asked last.
"""

from __future__ import annotations

import posixpath
import re
import tomllib
from collections.abc import Iterable, Mapping
from enum import Enum
from typing import Any
from urllib.parse import urlsplit

import attrs

from erofs_twisted.errors import ErofsTwistedError
from erofs_twisted.registry.reference import DOCKER_HUB, DOCKER_HUB_API

API_ROOT = "/v2"
CONNECT_TIMEOUT, MIRROR_CONNECT_TIMEOUT = 10.0, 3.0
"""Seconds, where nothing is said of it."""


class InvalidHosts(ErofsTwistedError):
    """A ``hosts.toml`` says what it cannot say."""


class Capability(Enum):
    """What a server is trusted to do."""

    PULL = "pull"
    """To have what a digest names."""
    RESOLVE = "resolve"
    """To say which digest a tag stands for."""
    PUSH = "push"
    REFERRERS = "referrers"
    """To list what refers to a manifest."""


ALL = frozenset(Capability)


def _hidden(headers: Mapping[str, str]) -> str:
    return f"<{len(headers)} headers>"


@attrs.frozen(kw_only=True)
class HostSettings:
    """One server. ``authority`` is host[:port]; ``root`` is the path of its API, without a slash at the end.

    ``scheme`` is None where nothing says whether it speaks TLS. ``authorities`` and ``clients`` are the paths
    of PEM files: of certificates that vouch for the server, and of pairs of certificate and key that we show
    it. ``headers``, which may be secret, go with each request to it. ``dial_timeout`` is in seconds.
    """

    authority: str
    scheme: str | None = None
    root: str = API_ROOT
    capabilities: frozenset[Capability] = ALL
    authorities: tuple[str, ...] = ()
    clients: tuple[tuple[str, str], ...] = ()
    skip_verify: bool = False
    headers: Mapping[str, str] = attrs.field(factory=dict, repr=_hidden)
    dial_timeout: float | None = None
    is_mirror: bool = False

    def __str__(self) -> str:
        return f"{self.scheme}://{self.authority}" if self.scheme else self.authority

    @property
    def description(self) -> str:
        """For people: what it is asked for, and how."""
        able = ", ".join(each.value for each in Capability if each in self.capabilities)
        more = [f"{len(self.authorities)} authorities of its own"] if self.authorities else []
        more += [f"{len(self.clients)} client certificates"] if self.clients else []
        more += ["its certificate is not verified"] if self.skip_verify else []
        more += [f"headers {', '.join(self.headers)}"] if self.headers else []
        return f"{'mirror' if self.is_mirror else 'server'} {self}: " + "; ".join((able, *more))

    @property
    def connect_timeout(self) -> float:
        """Seconds for a connection: fewer where there is another server to ask."""
        return self.dial_timeout or (MIRROR_CONNECT_TIMEOUT if self.is_mirror else CONNECT_TIMEOUT)

    def is_of(self, registry: str) -> bool:
        """Is this a server of ``registry`` itself, by its name?"""
        return self.authority == (DOCKER_HUB_API if registry == DOCKER_HUB else registry)


@attrs.frozen
class FoundHosts:
    """The servers of a registry in the order in which they are asked, and where that stands.

    ``source`` is '' where nothing is said of it. ``warnings`` are for the user.
    """

    hosts: tuple[HostSettings, ...]
    source: str = ""
    warnings: tuple[str, ...] = ()


def default_host(registry: str) -> HostSettings:
    """The one server of a registry of which nothing is said."""
    return HostSettings(authority=DOCKER_HUB_API if registry == DOCKER_HUB else registry)


_KEYS = frozenset(
    {
        "capabilities",
        "ca",
        "client",
        "skip_verify",
        "header",
        "override_path",
        "dial_timeout",
        "server",
        "host",
    }
)


def parse_hosts(text: str, directory: str, registry: str) -> tuple[tuple[HostSettings, ...], list[str]]:
    """The servers of ``registry``, in the order in which they are asked, and the keys that mean nothing.

    ``text`` is that of a ``hosts.toml`` in ``directory``, to which its paths are relative. Raises
    `InvalidHosts`.
    """
    try:
        content = tomllib.loads(text)
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        raise InvalidHosts(f"not TOML: {error}") from error
    mirrors = content.get("host", {})
    if not isinstance(mirrors, dict):
        raise InvalidHosts('host is not a table: one looks like [host."https://mirror.example"]')
    hosts = []
    unknown = sorted(content.keys() - _KEYS)
    for url, fields in mirrors.items():
        if not isinstance(fields, dict):
            raise InvalidHosts(
                'host holds what is not a table: one looks like [host."https://mirror.example"]'
            )
        where = f'[host."{url}"]'
        hosts.append(
            attrs.evolve(_host(fields, directory, where, _place(url, fields, where)), is_mirror=True)
        )
        unknown += sorted(
            f"{where} {key}" for key in fields.keys() - _KEYS | fields.keys() & {"server", "host"}
        )
    server = content.get("server", "")
    if not isinstance(server, str):
        raise InvalidHosts(f"server: {server!r} is not a URL in quotes")
    if server:
        place = _place(server, content, "server")
        hosts.append(_host(content, directory, "", place))
    else:
        # What is in the file is said of the registry itself, except what it is trusted with.
        own = {key: value for key, value in content.items() if key not in ("capabilities", "override_path")}
        hosts.append(_host(own, directory, "", {"authority": default_host(registry).authority}))
    return tuple(hosts), unknown


def certificates_in(directory: str, names: Iterable[str], registry: str) -> HostSettings:
    """The registry's server, with the certificates that lie in ``directory`` as Docker has them.

    ``*.crt`` are authorities; ``*.cert`` are client certificates, the key is in ``*.key`` or beside it.
    """
    present = set(names)
    authorities = [name for name in sorted(present) if name.endswith(".crt")]
    clients = []
    for name in sorted(present):
        if name.endswith(".cert"):
            key = name.removesuffix(".cert") + ".key"
            clients.append((name, key if key in present else name))
    return attrs.evolve(
        default_host(registry),
        authorities=tuple(posixpath.join(directory, name) for name in authorities),
        clients=tuple(
            (posixpath.join(directory, pair[0]), posixpath.join(directory, pair[1])) for pair in clients
        ),
    )


def directories_of(registry: str) -> list[str]:
    """The names that a registry's directory may have; the first that is there counts."""
    host, colon, port = registry.rpartition(":")
    has_port = colon and host and port.isdigit()
    return [*([f"{host}_{port}_"] if has_port else []), registry, "_default"]


_HOST = re.compile(r"[a-z0-9._-]+|[0-9a-f:.]*:[0-9a-f:.]*")


def _place(url: str, fields: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Scheme, authority and root of a server's URL."""
    spelt = url if "://" in url else f"https://{url}"
    try:
        parts = urlsplit(spelt)
        host, _ = parts.hostname or "", parts.port
    except ValueError as error:
        raise InvalidHosts(f"{where}: {error}") from error
    if parts.scheme not in ("http", "https") or not _HOST.fullmatch(host):
        raise InvalidHosts(f"{where}: not an http or https URL, such as https://mirror.example")
    if "@" in parts.netloc:
        raise InvalidHosts(
            f"{where.replace(parts.netloc.rpartition('@')[0], '…')}: a URL with user information; log in to "
            "the mirror instead (docker login, podman login), or give it a header"
        )
    if parts.query or parts.fragment:
        raise InvalidHosts(f"{where}: a URL with a query or a fragment, which is not possible here")
    path = posixpath.normpath(parts.path).rstrip("/") if parts.path else ""
    override = _typed(fields, "override_path", bool, where, "true or false")
    if not override and not path.endswith(API_ROOT):
        path += API_ROOT
    return {"scheme": parts.scheme, "authority": parts.netloc.lower(), "root": path}


def _host(fields: Mapping[str, Any], directory: str, where: str, place: Mapping[str, Any]) -> HostSettings:
    def in_directory(path: str) -> str:
        return posixpath.join(directory, path)

    return HostSettings(
        **place,
        capabilities=_capabilities(fields, where),
        authorities=tuple(map(in_directory, _strings(fields, "ca", where))),
        clients=tuple(
            (in_directory(pair[0]), in_directory(pair[1] or pair[0])) for pair in _pairs(fields, where)
        ),
        skip_verify=bool(_typed(fields, "skip_verify", bool, where, "true or false")),
        headers=_headers(fields, where),
        dial_timeout=_duration(fields, where),
    )


def _at(where: str, key: str) -> str:
    return f"{where} {key}".strip()


def _typed(fields: Mapping[str, Any], key: str, kind: type, where: str, wanted: str) -> Any:
    value = fields.get(key)
    if value is not None and not isinstance(value, kind):
        raise InvalidHosts(f"{_at(where, key)}: {value!r} is not {wanted}")
    return value


def _strings(fields: Mapping[str, Any], key: str, where: str) -> list[str]:
    """A string, or a list of them."""
    value = fields.get(key, [])
    values = [value] if isinstance(value, str) else value
    if not isinstance(values, list) or not all(isinstance(item, str) and item for item in values):
        raise InvalidHosts(f"{_at(where, key)}: neither a string nor a list of strings")
    return values


def _capabilities(fields: Mapping[str, Any], where: str) -> frozenset[Capability]:
    names = _strings(fields, "capabilities", where)
    try:
        return frozenset(Capability(name.lower()) for name in names) or ALL
    except ValueError:
        known = ", ".join(capability.value for capability in Capability)
        raise InvalidHosts(f"{_at(where, 'capabilities')}: {names} are not all of {known}") from None


def _pairs(fields: Mapping[str, Any], where: str) -> list[tuple[str, str]]:
    """``client``: a file that holds certificate and key, a list of them, or of pairs of two files."""
    value = fields.get("client", [])
    items = [value] if isinstance(value, str) else value
    pairs = []
    for item in items if isinstance(items, list) else [None]:
        pair = [item, ""] if isinstance(item, str) else item
        if not isinstance(pair, list) or len(pair) != 2 or not all(isinstance(path, str) for path in pair):
            raise InvalidHosts(
                f"{_at(where, 'client')}: neither a file nor a list of files or of [certificate, key] pairs"
            )
        if not pair[0]:
            raise InvalidHosts(f"{_at(where, 'client')}: a pair without a certificate")
        pairs.append((pair[0], pair[1]))
    return pairs


_TOKEN = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")
"""The name of a header (RFC 9110, section 5.6.2)."""


def _headers(fields: Mapping[str, Any], where: str) -> dict[str, str]:
    table = fields.get("header", {})
    if not isinstance(table, dict):
        raise InvalidHosts(
            f'{_at(where, "header")}: not a table, such as [host."https://mirror.example".header]'
        )
    headers = {}
    for name in table:
        values = _strings(table, name, _at(where, "header"))
        text = ", ".join(values)
        if not _TOKEN.fullmatch(name) or not text.isascii() or not text.isprintable():
            raise InvalidHosts(f"{_at(where, 'header')} {name!r}: not a header of HTTP")
        headers[name] = text
    return headers


_UNITS = {"ns": 1e-9, "us": 1e-6, "µs": 1e-6, "ms": 1e-3, "s": 1.0, "m": 60.0, "h": 3600.0}
_PART = re.compile(r"([0-9]+(?:\.[0-9]*)?|\.[0-9]+)(ns|us|µs|ms|s|m|h)", re.ASCII)


def _duration(fields: Mapping[str, Any], where: str) -> float | None:
    """``dial_timeout``, in Go's notation: ``500ms``, ``1m30s``."""
    text = _typed(fields, "dial_timeout", str, where, "a duration in quotes, such as '3s'")
    if not text:
        return None
    parts = _PART.findall(text)
    seconds = sum(float(number) * _UNITS[unit] for number, unit in parts)
    if "".join(number + unit for number, unit in parts) != text or not 0 < seconds < 1e6:
        raise InvalidHosts(f"{_at(where, 'dial_timeout')}: {text!r} is not a duration such as 500ms or 3s")
    return seconds
