"""What an image is called: ``registry.example/app:1.2``, or ``oci:DIR[:TAG]`` for a layout on disk.

The grammar is that of distribution's ``reference`` package, less its habit to read a short name such as
``Foo/bar`` as a host.
"""

from __future__ import annotations

import ipaddress
import re

import attrs

from erofs_twisted.registry.digest import Digest
from erofs_twisted.registry.errors import InvalidDigest, InvalidReference

DOCKER_HUB = "docker.io"
DOCKER_HUB_API = "registry-1.docker.io"
DEFAULT_TAG = "latest"
LAYOUT_PREFIX = "oci:"
MAX_REPOSITORY = 255

_LABEL = r"[a-z0-9](?:[a-z0-9-]*[a-z0-9])?"
_HOST = re.compile(rf"{_LABEL}(?:\.{_LABEL})*")
_AUTHORITY = re.compile(r"(\[[0-9a-f:.]+\]|[^:\[\]]+)(?::([0-9]{1,5}))?")
_COMPONENT = r"[a-z0-9]+(?:(?:\.|_|__|-+)[a-z0-9]+)*"
_REPOSITORY = re.compile(rf"{_COMPONENT}(?:/{_COMPONENT})*")
_TAG = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,127}")
_ALNUM = r"[A-Za-z0-9]+(?:(?:[-._:@+]|--)[A-Za-z0-9]+)*"
_LAYOUT_TAG = re.compile(rf"{_ALNUM}(?:/{_ALNUM})*")
_HEX_ID = re.compile(r"[0-9a-f]{64}")


@attrs.frozen
class ImageReference:
    """An image in a registry, fully spelt out. Make one with `parse_reference`.

    ``registry`` is ``host`` or ``host:port``, an IPv6 host in brackets. There is a tag or a digest or both;
    where there are both, the digest decides.
    """

    registry: str
    repository: str
    tag: str | None = None
    digest: Digest | None = None

    def __str__(self) -> str:
        tag = f":{self.tag}" if self.tag else ""
        digest = f"@{self.digest}" if self.digest else ""
        return f"{self.registry}/{self.repository}{tag}{digest}"

    @property
    def selector(self) -> str:
        """What the registry's API takes to name the manifest: the digest if there is one, else the tag."""
        return self.digest or self.tag or DEFAULT_TAG

    @property
    def api_authority(self) -> str:
        """``host[:port]`` of the registry's API; Docker Hub's differs from its name."""
        return DOCKER_HUB_API if self.registry == DOCKER_HUB else self.registry

    @property
    def is_loopback(self) -> bool:
        """Is the registry this machine: localhost, 127.0.0.0/8 or ::1?"""
        host = _split_authority(self.registry)[0].strip("[]")
        if host == "localhost":
            return True
        try:
            return ipaddress.ip_address(host).is_loopback
        except ValueError:
            return False


@attrs.frozen
class LayoutReference:
    """An image in an OCI layout on disk. Without a tag the layout must hold one image only."""

    directory: str
    tag: str | None = None

    def __str__(self) -> str:
        return f"{LAYOUT_PREFIX}{self.directory}" + (f":{self.tag}" if self.tag else "")


def parse_reference(text: str) -> ImageReference | LayoutReference:
    """Read ``host[:port]/repository[:tag][@digest]`` or ``oci:DIR[:TAG]``.

    Without a host the image is on Docker Hub, there below ``library/`` if its name has one component;
    without tag and digest the tag is ``latest``. A first component is a host if it holds a dot or a colon or
    is ``localhost``. Raises `InvalidReference`.
    """
    if text.startswith(LAYOUT_PREFIX):
        return _parse_layout(text)
    return _parse_image(text)


def _parse_layout(text: str) -> LayoutReference:
    # Like skopeo: the directory ends at the first colon, so a tag may hold colons and a directory may not.
    directory, colon, tag = text.removeprefix(LAYOUT_PREFIX).partition(":")
    if not directory or "\0" in directory:
        raise InvalidReference(f"{text!r} names no directory: an image in a layout on disk is oci:DIR[:TAG]")
    if colon and not _LAYOUT_TAG.fullmatch(tag):
        raise InvalidReference(
            f"{tag!r} in {text!r} is not a tag; note that DIR in oci:DIR[:TAG] ends at the first colon"
        )
    return LayoutReference(directory, tag or None)


def _parse_image(text: str) -> ImageReference:
    scheme, separator, rest = text.partition("://")
    if separator:
        raise InvalidReference(f"an image's name has no scheme: leave out {scheme}://, as in {rest!r}")
    name, at, digest_text = text.partition("@")
    try:
        digest = Digest.parse(digest_text) if at else None
    except InvalidDigest as error:
        raise InvalidReference(f"{text!r}: {error}") from error
    registry, path = _split_registry(name, text)
    repository, tag = _split_tag(path, text)
    _check_repository(repository, text)
    if registry == DOCKER_HUB and "/" not in repository:
        if _HEX_ID.fullmatch(repository):
            raise InvalidReference(f"{text!r} looks like an image ID, which no registry knows; use a name")
        repository = f"library/{repository}"
    if tag is None and digest is None:
        tag = DEFAULT_TAG
    return ImageReference(registry, repository, tag, digest)


def _split_registry(name: str, text: str) -> tuple[str, str]:
    first, slash, rest = name.partition("/")
    if not slash or not ("." in first or ":" in first or first.lower() == "localhost"):
        return DOCKER_HUB, name
    registry = first.lower()
    try:
        host, port = _split_authority(registry)
    except InvalidReference as error:
        raise InvalidReference(f"{text!r}: {error}") from error
    if registry == f"index.{DOCKER_HUB}":
        return DOCKER_HUB, rest
    return (host if port is None else f"{host}:{port}"), rest


def _split_authority(authority: str) -> tuple[str, int | None]:
    match = _AUTHORITY.fullmatch(authority)
    if match is None:
        raise InvalidReference(
            f"{authority!r} is not a registry: one looks like host, host:port or [::1]:port"
        )
    host, port_text = match.groups()
    if host.startswith("["):
        try:
            host = f"[{ipaddress.IPv6Address(host[1:-1])}]"
        except ValueError:
            raise InvalidReference(f"{host} is not an IPv6 address") from None
    elif not _HOST.fullmatch(host):
        raise InvalidReference(f"{host!r} is not a host's name")
    port = int(port_text) if port_text else None
    if port is not None and not 1 <= port <= 65535:
        raise InvalidReference(f"a port is 1 to 65535, not {port}")
    return host, port


def _split_tag(path: str, text: str) -> tuple[str, str | None]:
    repository, colon, tag = path.partition(":")
    if not colon:
        return repository, None
    if not _TAG.fullmatch(tag):
        raise InvalidReference(
            f"{text!r}: {tag!r} is not a tag: up to 128 letters, digits, _, . and -, not starting with . or -"
        )
    return repository, tag


def _check_repository(repository: str, text: str) -> None:
    if not repository:
        raise InvalidReference(
            f"{text!r} names no repository: an image is host[:port]/repository[:tag][@digest]"
        )
    if not _REPOSITORY.fullmatch(repository):
        if _REPOSITORY.fullmatch(repository.lower()):
            raise InvalidReference(f"{text!r}: a repository's name is lower case")
        raise InvalidReference(
            f"{text!r}: {repository!r} is not a repository: components of a-z and 0-9, inside also . _ - , "
            "separated by /"
        )
    if len(repository) > MAX_REPOSITORY:
        raise InvalidReference(f"{text[:60]!r}…: a repository's name has at most {MAX_REPOSITORY} characters")
