"""What the benchmarks of one run share: a directory, images made when they are needed, how much to do."""

from __future__ import annotations

import itertools
from functools import cached_property
from pathlib import Path

import attrs

from benchmarks.content import MIB, Image, Www, large_image, python_image


@attrs.frozen
class Effort:
    """Sizes in MiB."""

    runs: int
    """Of each measurement; the median counts."""
    stream: int
    """Read cold in one go."""
    delayed: int
    """The same, where each answer takes 25 ms."""
    random_reads: int
    sparse: tuple[int, int]
    """Read cold while memory is watched."""
    export: int
    """Read by many clients at once."""


FULL = Effort(runs=5, stream=1024, delayed=64, random_reads=200, sparse=(1024, 8192), export=256)
QUICK = Effort(runs=2, stream=256, delayed=16, random_reads=60, sparse=(128, 512), export=64)


@attrs.define(slots=False)
class Stage:
    """Below ``directory``, which should be on a disk: the images are of gigabytes."""

    directory: Path
    effort: Effort
    _numbers: itertools.count[int] = attrs.field(factory=itertools.count)

    @property
    def www(self) -> Path:
        """What the registries serve."""
        return self.directory / "www"

    def new(self, name: str) -> Path:
        """A path that is not there yet."""
        return self.directory / f"{name}-{next(self._numbers)}"

    @cached_property
    def python(self) -> Image:
        """About 40 MB, compressed: Python and its library."""
        return python_image(Www(self.www), self.directory)

    @cached_property
    def stream(self) -> Image:
        return large_image(Www(self.www), self.directory, "stream", self.effort.stream * MIB)

    @cached_property
    def delayed(self) -> Image:
        return large_image(Www(self.www), self.directory, "delayed", self.effort.delayed * MIB)

    def sparse(self, mebibytes: int) -> Image:
        return large_image(Www(self.www), self.directory, f"sparse-{mebibytes}", mebibytes * MIB, sparse=True)
