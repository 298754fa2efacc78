"""Where the time goes: daemons run under cProfile, and what it has seen. Their times are no figures then."""

from __future__ import annotations

import pstats
import sys
from collections.abc import Sequence
from pathlib import Path

import attrs

TOP = 25


@attrs.define
class Profiling:
    """Off until it has a directory."""

    directory: Path | None = None
    _count: int = 0

    def command(self, command: Sequence[str]) -> list[str]:
        """The command of a Python script, or that with a profile of it."""
        if self.directory is None:
            return list(command)
        self._count += 1
        name = f"{Path(command[0]).name}-{self._count}.pstats"
        return [sys.executable, "-m", "cProfile", "-o", str(self.directory / name), *command]

    def show(self) -> None:
        """The sum of all."""
        found = sorted(map(str, self.directory.glob("*.pstats"))) if self.directory else []
        if found:
            print(f"\n{len(found)} profiles in {self.directory}")
            pstats.Stats(*found).strip_dirs().sort_stats("tottime").print_stats(TOP)


profiling = Profiling()
