"""Which is ready sooner: a lazy mount, or a download of all, a local mount and the same line of Python?"""

from __future__ import annotations

from collections.abc import Iterator

from benchmarks.cold import cold, summary, whole
from benchmarks.lazy import python_line
from benchmarks.registries import FAR, NEAR, UNSHAPED, Shaped
from benchmarks.stage import Stage
from benchmarks.table import Row, at_least, medians


def measure(stage: Stage) -> Iterator[Row]:
    """By turns, over three links; without a trace."""
    image = stage.python
    with Shaped(root=stage.www) as registry:
        for link in (UNSHAPED, NEAR, FAR):
            pairs = [
                (whole(stage, registry, link, image), cold(stage, registry, link, image, python_line))
                for _ in range(stage.effort.runs)
            ]
            theirs, ours = [full for full, _ in pairs], [lazy for _, lazy in pairs]
            full, download = medians((one.ready for one in theirs), (one.download for one in theirs))
            lazy, interpreter = medians((one.seconds for one in ours), (one.interpreter for one in ours))
            yield at_least(
                f"readiness, {link.name}, against curl + mount",
                [full.ready / lazy.seconds for full, lazy in pairs],
                1.0,
                f"ours {lazy:.2f} s ({summary(ours)}), whole {full:.2f} s (curl {download:.2f} s); "
                f"interpreter and imports {interpreter:.2f} s",
            )
