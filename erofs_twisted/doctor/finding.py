"""One thing that was looked at, what is to be said of it, and what would put it right."""

from __future__ import annotations

import enum

import attrs


class Level(enum.StrEnum):
    """How a check ended. `UNKNOWN`: it cannot be told."""

    OK = "ok"
    UNKNOWN = "unknown"
    WARNING = "warning"
    BAD = "bad"


class Act(enum.StrEnum):
    """What can be done without a person."""

    REATTACH = "reattach"
    UNMOUNT = "unmount"
    DISCONNECT = "disconnect"
    FORGET = "forget"
    CLEAR = "clear"
    UNLINK = "unlink"


DONE = {
    Act.REATTACH: "started a new daemon for {target}",
    Act.UNMOUNT: "unmounted {target}, lazily",
    Act.DISCONNECT: "disconnected {target}",
    Act.FORGET: "forgot what was on record of {target}",
    Act.CLEAR: "removed what was left in {target}",
    Act.UNLINK: "removed {target}",
}


@attrs.frozen(kw_only=True)
class Repair:
    """``target`` is the mount point, the device, the directory or the file. ``identifier`` is what a device
    says of its server; ``mount_id`` and ``source`` are those of the mount. All of it was so when it was
    found, and is looked at again before anything is done."""

    act: Act
    target: str
    identifier: str = ""
    mount_id: int = 0
    source: str = ""

    def told(self) -> str:
        """In words, once it is done."""
        return DONE[self.act].format(target=self.target)


@attrs.frozen
class Finding:
    """``text`` is one line, and so is ``cure``, for a person; ``repairs`` are done in their order, and no
    more of them after one that fails."""

    level: Level
    subject: str
    text: str
    cure: str = ""
    repairs: tuple[Repair, ...] = ()
