"""What ``docker login`` and ``podman login`` leave: ``config.json`` or ``auth.json``, and helpers' answers.

Docker's `config file`_, Podman's containers-auth.json(5), and the protocol of docker-credential-helpers.

.. _config file: https://docs.docker.com/reference/cli/docker/#configuration-files
"""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Iterator, Mapping
from pathlib import PurePosixPath
from typing import Any

import attrs

from erofs_twisted.registry.credentials import (
    TOKEN_USER,
    Credentials,
    Identity,
    IdentityToken,
    RegistryToken,
)
from erofs_twisted.registry.errors import AccessDenied, RegistryError
from erofs_twisted.registry.reference import DOCKER_HUB, DOCKER_HUB_API

HUB_SERVER = f"https://index.{DOCKER_HUB}/v1/"
"""What Docker calls its own registry, in these files and to the helpers."""
MAX_CONFIG = 1 << 20
"""Bytes of a file that is looked at."""
SYSTEMD_CREDENTIAL = "erofs-nbd.auth.json"

_HUB_HOSTS = frozenset({DOCKER_HUB, f"index.{DOCKER_HUB}", DOCKER_HUB_API})
_SCHEME = re.compile(r"https?://", re.IGNORECASE)
_HELPER = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_NOT_FOUND = ("credentials not found", "no credentials server URL", "no credentials username")


class InvalidDockerConfig(RegistryError):
    """A file, an entry of it, or a helper's answer is not what it should be. What it holds is not shown."""


@attrs.frozen
class LoginFiles:
    """Files with credentials, in the order of looking. ``is_named``: one, and the user has named it."""

    paths: tuple[str, ...] = ()
    is_named: bool = False


@attrs.frozen
class DockerConfig:
    """One file. Make one with `parse_docker_config`."""

    _auths: Mapping[str, Any] = attrs.field(repr=False)
    _helpers: Mapping[str, Any]
    _store: str

    def helper(self, registry: str, repository: str) -> str | None:
        """The NAME of the docker-credential-NAME that knows more. Raises `InvalidDockerConfig`."""
        name = next((name for _, name in _matches(self._helpers, registry, repository) if name), self._store)
        if not name:
            return None
        if not isinstance(name, str) or not _HELPER.fullmatch(name):
            raise InvalidDockerConfig("what it names as credential helper is no program's name")
        return name

    def identity(self, registry: str, repository: str) -> Identity | None:
        """What the file itself has: under the longest key that fits and is not empty.

        Raises `InvalidDockerConfig`.
        """
        for key, entry in _matches(self._auths, registry, repository):
            try:
                found = _identity(entry)
            except (InvalidDockerConfig, AccessDenied) as error:
                raise InvalidDockerConfig(f'auths["{key:.100}"]: {error}') from error
            if found is not None:
                return found
        return None


def parse_docker_config(data: bytes) -> DockerConfig:
    """Raises `InvalidDockerConfig`."""
    config = _json_object(data)
    auths, helpers = config.get("auths") or {}, config.get("credHelpers") or {}
    if not isinstance(auths, dict) or not isinstance(helpers, dict):
        raise InvalidDockerConfig("auths and credHelpers are objects, and one of these is not")
    return DockerConfig(auths, helpers, config.get("credsStore") or "")


def server_of(registry: str) -> str:
    """What a credential helper knows a registry by."""
    return HUB_SERVER if registry in _HUB_HOSTS else registry


def parse_helper_answer(data: bytes) -> Identity | None:
    """What docker-credential-NAME has printed when it ended well. Raises `InvalidDockerConfig`."""
    answer = _json_object(data)
    try:
        return _of_pair(_text(answer, "Username"), _text(answer, "Secret"))
    except AccessDenied as error:
        raise InvalidDockerConfig(str(error)) from error


def means_not_found(data: bytes) -> bool:
    """Does what docker-credential-NAME has printed when it failed mean no more than that it knows nobody?"""
    text = data.decode("utf-8", "replace")
    return any(words in text for words in _NOT_FOUND)


def standard_files(environ: Mapping[str, str], home: str, uid: int) -> LoginFiles:
    """Where credentials are looked for: first what the environment names, then where programs put them."""
    docker, runtime = environ.get("DOCKER_CONFIG"), environ.get("XDG_RUNTIME_DIR")
    paths = [
        _below(environ.get("CREDENTIALS_DIRECTORY"), SYSTEMD_CREDENTIAL),
        environ.get("REGISTRY_AUTH_FILE"),
        _below(docker, "config.json"),
        _below(runtime, "containers/auth.json") or f"/run/containers/{uid}/auth.json",
        _below(environ.get("XDG_CONFIG_HOME") or f"{home}/.config", "containers/auth.json"),
        None if docker else f"{home}/.docker/config.json",
    ]
    return LoginFiles(tuple(dict.fromkeys(path for path in paths if path)))


def _below(directory: str | None, name: str) -> str | None:
    return str(PurePosixPath(directory, name)) if directory else None


def _matches(entries: Mapping[str, Any], registry: str, repository: str) -> Iterator[tuple[str, Any]]:
    """Those for the repository, then for what is above it, then for the registry."""
    canonical = [(_canonical(key), key, entry) for key, entry in entries.items()]
    path = f"{_canonical(registry)}/{repository}"
    while path:
        fitting = [(key, entry) for name, key, entry in canonical if name == path]
        # The same place may be there twice, once as an address of old times.
        yield from sorted(fitting, key=lambda item: item[0] != path)
        path = path.rpartition("/")[0]


def _canonical(key: str) -> str:
    """``host[:port][/path]``. An address has the host alone: its path is the API's, not a repository's."""
    stripped = _SCHEME.sub("", key, count=1) if _SCHEME.match(key) else key
    host, _, path = stripped.partition("/")
    host = host.lower()
    path = "" if stripped != key else path.rstrip("/")
    if path in ("v1", "v2"):
        path = ""
    host = DOCKER_HUB if host in _HUB_HOSTS else host
    return f"{host}/{path}" if path else host


def _identity(entry: Any) -> Identity | None:
    if not isinstance(entry, dict):
        raise InvalidDockerConfig("it is no object")
    if token := _text(entry, "registrytoken"):
        return RegistryToken(token)
    if token := _text(entry, "identitytoken"):
        return IdentityToken(token)
    if auth := _text(entry, "auth"):
        return _of_pair(*_decode(auth))
    return _of_pair(_text(entry, "username"), _text(entry, "password"))


def _of_pair(username: str, password: str) -> Identity | None:
    if username == TOKEN_USER:
        return IdentityToken(password)
    return Credentials(username, password) if username or password else None


def _decode(auth: str) -> tuple[str, str]:
    try:
        text = base64.b64decode(auth + "=" * (-len(auth) % 4), validate=True).decode()
    except ValueError:
        text = ""  # and no cause of the error below: that would show what could not be decoded
    username, colon, password = text.partition(":")
    if not colon:
        raise InvalidDockerConfig("auth is not the base64 of NAME:PASSWORD")
    return username, password.rstrip("\0")


def _text(fields: Mapping[str, Any], name: str) -> str:
    value = fields.get(name)
    if value is None:
        return ""
    if not isinstance(value, str):
        raise InvalidDockerConfig(f"{name} is no text")
    return value


def _json_object(data: bytes) -> Mapping[str, Any]:
    try:
        value = json.loads(data.decode("utf-8-sig"))
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        raise InvalidDockerConfig("it is not a JSON object")
    return value
