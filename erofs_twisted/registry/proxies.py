"""Which proxy a request goes through: the environment's variables, as Go's programs and curl read them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from urllib.parse import SplitResult, unquote, urlsplit

import attrs

from erofs_twisted.registry.credentials import Credentials
from erofs_twisted.registry.errors import AccessDenied, InvalidProxy
from erofs_twisted.registry.noproxy import NoProxy, dns_name
from erofs_twisted.registry.urls import Origin

DEFAULT_PORT = {"http": 80, "https": 443}
"""As in Go; curl takes 1080 for http."""

_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://")
_HOST = re.compile(r"[a-z0-9_-]+(\.[a-z0-9_-]+)*\.?|[0-9a-f:.]*:[0-9a-f:.]*")
_UNPRINTABLE = re.compile(r"[\s\x00-\x1f\x7f]")


@attrs.frozen
class Proxy:
    """``scheme`` is http, or https for TLS to the proxy. ``variable`` is where it was found."""

    scheme: str
    host: str
    port: int
    credentials: Credentials | None = attrs.field(default=None, repr=False)
    variable: str = "HTTPS_PROXY"

    @classmethod
    def parse(cls, text: str, variable: str) -> Proxy:
        """From a URL, or HOST:PORT, with USER:PASSWORD@ before it if need be. Raises `InvalidProxy`.

        No part of what may be the password gets into a message.
        """
        scheme = _SCHEME.match(text)
        if scheme is not None and scheme[1].lower() not in DEFAULT_PORT:
            raise InvalidProxy(
                variable, f"proxies that speak {scheme[1].lower()} are not known here, only http and https"
            )
        parts = _split(text if scheme else f"http://{text}")
        host = "" if parts is None else dns_name(parts.hostname or "")
        if parts is None or _UNPRINTABLE.search(text) or not _HOST.fullmatch(host):
            raise _not_understood(variable)
        # A password that holds one of these leaves us only its first part before the @.
        if parts.path not in ("", "/") or parts.query or parts.fragment or parts.port == 0:
            raise _not_understood(variable)
        credentials = None
        if parts.username or parts.password:
            try:
                credentials = Credentials(unquote(parts.username or ""), unquote(parts.password or ""))
            except AccessDenied as error:
                raise InvalidProxy(variable, "the user name in it holds a colon, or is not text") from error
        return cls(parts.scheme, host, parts.port or DEFAULT_PORT[parts.scheme], credentials, variable)

    @property
    def authority(self) -> str:
        return authority(self.host, self.port)

    @property
    def url(self) -> str:
        """Without user and password."""
        return f"{self.scheme}://{self.authority}"


@attrs.frozen
class Proxies:
    """The proxy for http URLs and the one for https URLs, and which hosts need neither."""

    http: Proxy | None = None
    https: Proxy | None = None
    _without: NoProxy = attrs.field(factory=NoProxy)

    @classmethod
    def from_environment(cls, environ: Mapping[str, str]) -> Proxies:
        """From ``HTTP_PROXY``, ``HTTPS_PROXY``, ``ALL_PROXY`` and ``NO_PROXY``. Raises `InvalidProxy`.

        Upper case comes before lower case (as in Go; curl has it the other way round), and what is empty
        counts as missing. In a CGI program ``HTTP_PROXY`` is what a client has sent as its header ``Proxy``,
        so there it does not count.
        """

        def first(*names: str) -> tuple[str, str]:
            return next(((name, text) for name in names if (text := environ.get(name, "").strip())), ("", ""))

        def proxy(*names: str) -> Proxy | None:
            variable, text = first(*names, "ALL_PROXY", "all_proxy")
            return Proxy.parse(text, variable) if text else None

        http_names = ("http_proxy",) if environ.get("REQUEST_METHOD") else ("HTTP_PROXY", "http_proxy")
        without = NoProxy.parse(first("NO_PROXY", "no_proxy")[1])
        return cls(proxy(*http_names), proxy("HTTPS_PROXY", "https_proxy"), without)

    def proxy_for(self, url: str) -> Proxy | None:
        """The proxy for an http or https URL; None: its host is reached directly. Raises `InvalidHeader`."""
        if self.http is self.https is None:
            return None
        origin = Origin.of(url)
        proxy = self.https if origin.scheme == "https" else self.http
        return None if proxy is None or self._without.covers(origin.host, origin.port) else proxy


def authority(host: str, port: int) -> str:
    """HOST:PORT, as URLs and CONNECT have it."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _split(url: str) -> SplitResult | None:
    """None where it is no URL. The error would hold what may be a password."""
    try:
        parts = urlsplit(url)
        _ = parts.port
    except ValueError:
        return None
    return parts


def _not_understood(variable: str) -> InvalidProxy:
    return InvalidProxy(
        variable,
        "not a proxy's URL; it is http://HOST:PORT or http://USER:PASSWORD@HOST:PORT, where user name and "
        "password have %2F for /, %40 for @, %23 for #, %3F for ?, %5B for [",
    )
