"""Files in PEM, which are replaced while a mount lives. All of it blocks."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable
from typing import Generic, TypeVar

from cryptography import x509

from erofs_twisted.registry.errors import InvalidTLSFile
from erofs_twisted.registry.pem import MAX_PEM, ClientPair, parse_certificates, parse_key

Parsed = TypeVar("Parsed")
Made = TypeVar("Made")
Signature = tuple[int, ...] | None


def read_authorities(path: str) -> tuple[x509.Certificate, ...]:
    """The certificates in a file. Raises `InvalidTLSFile`, which names it."""
    return _parsed(path, parse_certificates)


def read_client(chain_path: str, key_path: str) -> ClientPair:
    """A certificate, those that vouch for it, and its key. Raises `InvalidTLSFile`, which names the file."""
    pair = ClientPair(_parsed(chain_path, parse_certificates), _parsed(key_path, parse_key))
    if not pair.is_one:
        first = ", the first one there" if len(pair.chain) > 1 else ""
        raise InvalidTLSFile(f"{key_path}: the key does not belong to the certificate in {chain_path}{first}")
    return pair


def signature(path: str) -> Signature:
    """What changes when a file does; None where it is out of reach."""
    try:
        found = os.stat(path)
    except (OSError, ValueError):
        return None
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns


class Watched(Generic[Made]):
    """What ``make`` reads from the files at ``paths``. The first time it raises what that does."""

    value: Made

    def __init__(
        self, paths: tuple[str, ...], make: Callable[[], Made], warn: Callable[[str], object]
    ) -> None:
        self._paths = paths
        self._make = make
        self._warn = warn
        self._seen = self._look()
        self.value = make()

    def refresh(self) -> bool:
        """Read the files again if they have changed; is `value` another one now?

        What has become unreadable counts as it was. ``warn`` is told, once for each change.
        """
        seen = self._look()
        if seen == self._seen:
            return False
        # What is read below may be newer than this: then it is read once more the next time.
        self._seen = seen
        try:
            self.value = self._make()
        except InvalidTLSFile as error:
            self._warn(f"{error}; what it held before still counts")
            return False
        return True

    def _look(self) -> list[Signature]:
        return [signature(path) for path in self._paths]


def _parsed(path: str, parse: Callable[[bytes], Parsed]) -> Parsed:
    try:
        with open(os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK), "rb") as file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                raise InvalidTLSFile("not a file, which could be read again when it changes")
            return parse(file.read(MAX_PEM + 1))
    except InvalidTLSFile as error:
        raise InvalidTLSFile(f"{path}: {error}") from error
    except OSError as error:
        raise InvalidTLSFile(f"{path}: {error.strerror}") from error
    except ValueError as error:
        raise InvalidTLSFile(f"{path!r} is no path: {error}") from error
