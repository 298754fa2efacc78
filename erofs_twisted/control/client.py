"""Calls to a daemon's control socket, for commands: they block, and need no reactor."""

from __future__ import annotations

import http.client
import json
import socket
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlencode

import attrs

from erofs_twisted.control.errors import NoDaemon
from erofs_twisted.errors import MountError
from erofs_twisted.state.records import Status

POLL = 0.05


class _Connection(http.client.HTTPConnection):
    def __init__(self, path: str, timeout: float | None) -> None:
        super().__init__("localhost", timeout=timeout)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(self.timeout)
        self.sock.connect(self._path)


@attrs.frozen
class Daemon:
    """The one that listens on the socket at ``path``. Each call is a connection of its own.

    All raise `MountError` with the daemon's own words, or `NoDaemon`.
    """

    path: Path

    def call(self, method: str, where: str, body: Any = None, timeout: float | None = 60.0) -> Any:
        """The answer; ``where`` is what comes after ``/v1/``."""
        connection = _Connection(str(self.path), timeout)
        try:
            connection.request(
                method, f"/v1/{where}", None if body is None else json.dumps(body), {"Connection": "close"}
            )
            response = connection.getresponse()
            said = json.loads(response.read())
        except (FileNotFoundError, ConnectionRefusedError) as error:
            raise NoDaemon(
                f"no daemon listens on {self.path}; start it with 'systemctl start erofs-nbd' or "
                "'twistd erofs-nbd', or name the directory of its socket with --state-dir"
            ) from error
        except TimeoutError as error:
            raise MountError(f"the daemon on {self.path} did not answer in {timeout:g} s") from error
        except (OSError, http.client.HTTPException, ValueError) as error:
            reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
            raise MountError(f"the daemon on {self.path} broke the call off: {reason}") from error
        finally:
            connection.close()
        if response.status >= 300:
            raise MountError(str(said.get("error", response.status)))
        return said

    def mount(
        self, mountpoint: str, options: Mapping[str, str | bool], timeout: float | None, reach: str = ""
    ) -> Any:
        """Mount the image that is among the options; when it can be used, what it is. The same again is no
        error. ``reach`` is as `erofs_twisted.mount.mountpoint.Mountpoint` has it."""
        where = _mount(mountpoint) + (f"?{urlencode({'reach': reach})}" if reach else "")
        return self.call("PUT", where, dict(options), timeout)

    def unmount(self, mountpoint: str, lazy: bool) -> None:
        self.call("DELETE", f"{_mount(mountpoint)}?{urlencode({'lazy': str(lazy).lower()})}", timeout=None)

    def prefetch(self, mountpoint: str) -> Any:
        """Fetch all that is missing; when it is there, what the mount is then."""
        return self.call("POST", f"{_mount(mountpoint)}/prefetch", timeout=None)

    def mounts(self) -> Any:
        """What is to be told of each."""
        return self.call("GET", "mounts")["mounts"]

    def one(self, mountpoint: str) -> Any:
        return self.call("GET", _mount(mountpoint))

    def status(self) -> Any:
        """Of the daemon."""
        return self.call("GET", "status")

    def upgrade(self, timeout: float) -> Any:
        """Have it replaced by the program that is installed now; when that has all mounts, its `status`."""
        before = self.mounts()
        wanted = [each for each in before if each["status"] != Status.UNMOUNTED]
        instance = self.call("POST", "upgrade")["instance"]
        deadline = time.monotonic() + timeout
        error = MountError(f"after {timeout:g} s not all mounts are there again; the daemon's log says why")
        while True:
            last = error
            try:
                now = self.status()
                ready = [each for each in self.mounts() if each["status"] == Status.READY]
                if now["instance"] != instance and len(ready) >= len(wanted):
                    return now
            except MountError as failed:
                last = failed  # between the one and the next, nobody listens
            if time.monotonic() > deadline:
                raise last
            time.sleep(POLL)

    def log(self, mountpoint: str, after: int = 0) -> Any:
        """Its last lines since number ``after``, those about a mount or ('') all."""
        return self.call("GET", f"log?{urlencode({'mountpoint': mountpoint, 'after': after})}")


def _mount(mountpoint: str) -> str:
    return f"mounts/{quote(mountpoint, safe='')}"
