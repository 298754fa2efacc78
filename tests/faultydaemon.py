"""A daemon that dies after a step of its own, or finds no memory."""

from __future__ import annotations

from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import attrs

from tests.daemon import Daemon
from tests.scarcity import without_memory


@attrs.define(eq=False)
class FaultyDaemon(Daemon):
    """It is up at once, in the foreground."""

    foreground: bool = True
    is_warm: bool = True
    die_after: str | None = None
    """One of `tests.warm.STEPS` and its number."""
    below: str = ""
    """Where below the usual directory its mount point is."""

    @property
    def mountpoint(self) -> Path:
        return self.directory / "target" / self.below

    def start(self) -> None:
        self.steps_file.unlink(missing_ok=True)
        super().start()

    def faults(self) -> dict[str, Any]:
        return {
            "steps": str(self.steps_file),
            "die_after": self.die_after,
            "scarcity": str(self.scarcity_file),
        }

    @property
    def scarcity_file(self) -> Path:
        return self.directory.with_suffix(".scarcity")

    def without_memory(
        self, *calls: str, error: str = "ENOMEM", times: int | None = None
    ) -> AbstractContextManager[None]:
        """For those calls; see `tests.scarcity.without_memory`."""
        return without_memory(self.scarcity_file, *calls, error=error, times=times)

    @property
    def steps_file(self) -> Path:
        return self.directory.with_suffix(".steps")

    def steps(self) -> list[str]:
        """Those that it has come to."""
        return self.steps_file.read_text().splitlines()
