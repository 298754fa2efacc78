"""Claims, changes and releases mounts in a journal, for as long as it lives, and tells what is for good."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable
from itertools import count
from pathlib import Path
from random import Random
from typing import NoReturn

import attrs

from erofs_twisted.state.journal import Journal, MountState
from erofs_twisted.state.records import Status

MOUNTPOINTS = tuple(f"/mnt/{number}" for number in range(6))

Content = tuple[str, int, str] | None
"""An image, a size, a status; None: it is not on record."""


def content(journal: Journal, mountpoint: str) -> Content:
    """What is on record. Raises `RecordError` where that is damaged."""
    record = journal.read(mountpoint)
    return None if record is None else (record.image, record.size, str(record.status))


def write(state_dir: Path, seed: int, most: int | None, tell: Callable[[str], None]) -> NoReturn:
    """``tell`` what is about to be on record, and then, that it is for good; after ``most`` changes do
    nothing any more."""
    journal, chosen = Journal(state_dir), Random(seed)
    held: dict[str, MountState] = {}
    for number in count(1) if most is None else range(1, most + 1):
        mountpoint = chosen.choice(MOUNTPOINTS)
        state = held.get(mountpoint)
        act = chosen.random()
        if state is None:
            image = f"{seed}-{number}"
            tell(json.dumps([mountpoint, (image, 0, Status.STARTING)]))
            held[mountpoint] = journal.claim(mountpoint, image)
        elif act < 0.6:
            tell(json.dumps([mountpoint, (state.record.image, number, Status.READY)]))
            state.update(size=number, status=Status.READY)
        elif act < 0.8:
            tell(json.dumps([mountpoint, None]))
            held.pop(mountpoint).release()
        elif act < 0.9:
            tell(json.dumps([mountpoint, (state.record.image, state.record.size, Status.FAILED)]))
            held.pop(mountpoint).release("its registry is down")
        else:
            tell(json.dumps([mountpoint, None]))
            held.pop(mountpoint).leave()
            journal.forget(mountpoint)
        tell(json.dumps([mountpoint]))
    while True:
        time.sleep(60)


@attrs.define
class History:
    """What a mount point had on record, one after another; ``safe`` is which of them was acknowledged last
    before the power failed."""

    contents: list[Content]
    safe: int = 0


@attrs.define
class Histories:
    """Of all mount points, from what was found at first and what `write` tells."""

    of: dict[str, History]

    @classmethod
    def found(cls, journal: Journal) -> Histories:
        return cls({each: History([content(journal, each)]) for each in MOUNTPOINTS})

    def hear(self, lines: Iterable[str], has_power: bool) -> int:
        """How many of them acknowledge something."""
        acknowledged = 0
        for line in lines:
            mountpoint, *will = json.loads(line)
            history = self.of[mountpoint]
            if will:
                history.contents.append(tuple(will[0]) if will[0] else None)
            elif has_power:
                history.safe = len(history.contents) - 1
                acknowledged += 1
        return acknowledged

    def lost(self, journal: Journal) -> dict[str, tuple[Content, list[Content]]]:
        """The mount points that have on record what they may not, and what they may."""
        return {
            mountpoint: (content(journal, mountpoint), may_be)
            for mountpoint, history in self.of.items()
            if content(journal, mountpoint) not in (may_be := history.contents[history.safe :])
        }
