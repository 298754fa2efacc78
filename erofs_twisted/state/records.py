"""The record of a mount, as JSON: what another process may know of it. It holds no secret."""

from __future__ import annotations

import enum
import hashlib
import json
import re
from collections.abc import Mapping
from typing import Any

import attrs

from erofs_twisted.errors import ErofsTwistedError

VERSION = 2


TOLD = ("mountpoint", "image", "status", "reason", "digest", "layer", "backend", "device", "size")
"""The fields of a record that are for everybody who asks for its mount."""


class Status(enum.StrEnum):
    """How far a mount has come."""

    STARTING = "starting"
    READY = "ready"
    STOPPING = "stopping"
    UNMOUNTED = "unmounted"
    """Lazily: it is served until nobody has a file of it open."""
    FAILED = "failed"


class RecordError(ErofsTwistedError):
    """A record that is damaged, or that another version wrote."""


@attrs.frozen(kw_only=True)
class MountRecord:
    """One mount, as its daemon sees it.

    ``pid`` is the daemon's process, ``pid_started`` its start in clock ticks since ``boot``
    (proc_pid_stat(5), field 22; ``boot`` is the kernel's own id): together they name a process for good.
    ``image`` is what was asked for, with ``options`` that have no secret; ``digest`` is that of its manifest,
    ``layer`` that of the blob. ``identifier`` is what the device says of its server, ``size`` its bytes.
    ``mount_id`` is that of the mount namespace's list, ``made`` whether the mount point was made for it, or
    is about to be. ``service`` tells whether the daemon may have other mounts, too. ``reason`` tells why a
    mount failed or what its end waits for.
    """

    mountpoint: str
    image: str
    pid: int
    pid_started: int
    boot: str = ""
    status: Status = Status.STARTING
    reason: str = ""
    digest: str = ""
    layer: str = ""
    backend: str = ""
    identifier: str = ""
    device: str = ""
    size: int = 0
    mount_id: int = 0
    made: bool = False
    service: bool = False
    options: Mapping[str, str | bool] = attrs.field(factory=dict)

    @property
    def is_wanted(self) -> bool:
        """Is it to be mounted, where its daemon has ended? One with that mount alone is started for it."""
        return self.status is not Status.UNMOUNTED or not self.service

    def to_json(self) -> bytes:
        return json.dumps({"version": VERSION, **attrs.asdict(self)}, indent=1).encode() + b"\n"

    @classmethod
    def from_json(cls, data: bytes) -> MountRecord:
        """Raises `RecordError`."""
        try:
            fields = json.loads(data)
        except ValueError as error:
            raise RecordError(f"not JSON: {error}") from error
        if not isinstance(fields, dict) or fields.pop("version", None) != VERSION:
            raise RecordError(f"not a mount record of version {VERSION}")
        for name, kind in _KINDS.items():
            if type(fields.get(name)) is not kind:
                raise RecordError(f"{name} is missing or not {kind.__name__}")
        if not all(type(value) in (str, bool) for value in fields["options"].values()):
            raise RecordError("options are not all text or true and false")
        try:
            fields["status"] = Status(fields["status"])
        except ValueError as error:
            raise RecordError(str(error)) from error
        return cls(**{name: fields[name] for name in _KINDS})


_OTHERS = {
    "pid": int,
    "pid_started": int,
    "size": int,
    "mount_id": int,
    "made": bool,
    "service": bool,
    "options": dict,
}
_KINDS: Mapping[str, type[Any]] = {
    field.name: _OTHERS.get(field.name, str) for field in attrs.fields(MountRecord)
}


def is_record_name(name: str) -> bool:
    """May `record_name` have made it?"""
    return re.fullmatch(r"(.*-)?[0-9a-f]{12}", name) is not None


def record_name(mountpoint: str) -> str:
    """The name of a mount's own directory: readable, unique, and short, as a socket's path is limited."""
    readable = re.sub(r"[^A-Za-z0-9]+", "-", mountpoint).strip("-")[-20:].strip("-")
    unique = hashlib.sha256(mountpoint.encode("utf-8", "surrogateescape")).hexdigest()[:12]
    return f"{readable}-{unique}" if readable else unique
