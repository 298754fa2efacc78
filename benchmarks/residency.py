"""What a daemon takes of memory after a cold read of a small and of a large blob, both sparse."""

from __future__ import annotations

import shutil
from collections.abc import Iterator

from benchmarks.content import MIB
from benchmarks.machine import memory
from benchmarks.registries import nginx
from benchmarks.served import Ours, copy
from benchmarks.stage import Stage
from benchmarks.table import Row

BAR = 100 * MIB
DIFFERENCE = 0.10


def measure(stage: Stage) -> Iterator[Row]:
    """One copy each: what is resident does not vary with the machine's load."""
    resident = []
    for mebibytes in stage.effort.sparse:
        image = stage.sparse(mebibytes)
        with nginx(stage.www) as server, Ours(f"{server.authority}/{image.name}", "--fill=off") as ours:
            before = memory(ours.pid, "VmRSS")
            seconds = copy(ours, "--request-size=1048576").elapsed
            after, most = memory(ours.pid, "VmRSS"), memory(ours.pid, "VmHWM")
        shutil.rmtree(image.blob.parents[1])
        resident.append(after)
        yield Row(
            f"resident after {mebibytes} MiB cold",
            f"{after / MIB:.0f} MiB",
            f"<= {BAR // MIB} MiB",
            after <= BAR,
            f"before {before / MIB:.0f} MiB, at most {most / MIB:.0f} MiB; {seconds:.1f} s",
        )
    small, large = resident
    difference = abs(large - small) / small
    yield Row("difference of the two", f"{difference:.1%}", f"<= {DIFFERENCE:.0%}", difference <= DIFFERENCE)
