"""Are the shaped links what they are called? curl of a blob, and of a manifest, over each."""

from __future__ import annotations

import statistics
from collections.abc import Iterator

from benchmarks.registries import FAR, NEAR, UNSHAPED, Shaped
from benchmarks.served import curl
from benchmarks.stage import Stage
from benchmarks.table import Row

OFF = 0.05
"""How far they may be from it, beside what curl takes unshaped."""


def measure(stage: Stage) -> Iterator[Row]:
    """What curl itself takes is known from the unshaped link."""
    image = stage.python
    with Shaped(root=stage.www) as registry:
        manifest = f"{registry.url}/v2/{image.name}/manifests/latest"
        bare = 0.0
        for link in (UNSHAPED, NEAR, FAR):
            before = registry.set(link).processor
            blob = statistics.median(
                curl(registry.url + image.path).elapsed for _ in range(stage.effort.runs)
            )
            work = (registry.set(link).processor - before) / stage.effort.runs
            small = statistics.median(curl(manifest).elapsed for _ in range(stage.effort.runs))
            nominal = link.seconds(1, image.size)
            bare = bare or small
            yield Row(
                f"link: {link.name}, curl of {image.size / 1e6:.0f} MB",
                f"{blob:.3f} s",
                f"{nominal:.3f} s +- {OFF:.0%}" if nominal else "",
                abs(blob - nominal) <= OFF * nominal + bare if nominal else None,
                f"a manifest {small * 1000:.0f} ms; the registry's processor time {work:.2f} s",
            )
