"""Records mounts, one after the other and each in several steps, until the process is killed."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path

from erofs_twisted.state.journal import Journal

STEPS = 4


def mountpoint(number: int) -> str:
    return f"/mnt/{number}"


def main(state_dir: Path, say: Callable[[str], object]) -> None:
    """Say ``NUMBER STEP`` for each that is on record; the step is its size in bytes."""
    journal = Journal(state_dir)
    for number in itertools.count():
        state = journal.claim(mountpoint(number), "registry.example/app")
        say(f"{number} 0")
        for step in range(1, STEPS):
            state.update(size=step)
            say(f"{number} {step}")
        state.leave()
