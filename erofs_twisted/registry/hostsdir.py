"""Reading what the directories of ``certs.d`` say of a registry's servers."""

from __future__ import annotations

import os
from collections.abc import Sequence

from erofs_twisted.registry.hosts import (
    FoundHosts,
    InvalidHosts,
    certificates_in,
    default_host,
    directories_of,
    parse_hosts,
)

STANDARD = ("/etc/containerd/certs.d", "/etc/docker/certs.d")
"""Where containerd and Docker look, in this order."""
FILE = "hosts.toml"
MAX_FILE = 1 << 20


def find_hosts(roots: Sequence[str], registry: str) -> FoundHosts:
    """What the first of the directories below ``roots`` says that is there for ``registry``.

    Reads files. Raises `InvalidHosts`, which names the file.
    """
    for root in roots:
        for name in directories_of(registry):
            directory = os.path.join(root, name)
            if os.path.isdir(directory):
                return _read(directory, registry)
    return FoundHosts((default_host(registry),))


def _read(directory: str, registry: str) -> FoundHosts:
    path = os.path.join(directory, FILE)
    try:
        with open(path, encoding="utf-8") as file:
            text = file.read(MAX_FILE + 1)
    except (FileNotFoundError, NotADirectoryError):
        text = ""
    except OSError as error:
        raise InvalidHosts(f"{path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise InvalidHosts(f"{path}: not text in UTF-8") from error
    if len(text) > MAX_FILE:
        raise InvalidHosts(f"{path}: larger than {MAX_FILE} bytes")
    if not text.strip():
        return _certificates(directory, registry)
    try:
        hosts, unknown = parse_hosts(text, directory, registry)
    except InvalidHosts as error:
        raise InvalidHosts(f"{path}: {error}") from error
    warnings = [f"{path}: {key} means nothing here" for key in unknown]
    return FoundHosts(hosts, path, tuple(warnings))


def _certificates(directory: str, registry: str) -> FoundHosts:
    try:
        names = os.listdir(directory)
    except OSError as error:
        raise InvalidHosts(f"{directory}: {error.strerror}") from error
    host = certificates_in(directory, names, registry)
    is_of_use = bool(host.authorities or host.clients)
    return FoundHosts((host,), directory if is_of_use else "")
