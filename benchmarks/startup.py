"""How long a mount takes from the command's start, and what the imports of that are.

``twistd --help``, run in turn with it, is what the interpreter and twistd take for themselves.
"""

from __future__ import annotations

import re
import sys
from collections import Counter
from collections.abc import Iterator

from benchmarks.cold import cold
from benchmarks.lazy import BIN, Lazy
from benchmarks.machine import ran
from benchmarks.registries import UNSHAPED, Shaped
from benchmarks.stage import Stage
from benchmarks.table import Row, at_most, console, medians

IMPORT = re.compile(r"import time: +(\d+) \| +\d+ \| +([\w.]+)")
TOTAL, BEYOND = 1.2, 0.6
"""Seconds that a mount may take: in all, and beyond ``twistd --help``."""


class ImportTimed(Lazy):
    """With ``-X importtime``."""

    def command(self) -> list[str]:
        return [sys.executable, "-X", "importtime", *super().command()]


def measure(stage: Stage) -> Iterator[Row]:
    """A registry on loopback, an empty cache."""
    image = stage.python
    with Shaped(root=stage.www) as registry:
        modules = imports(stage, registry.reference(image))
        bare, helps, totals, mounts = [], [], [], []
        for _ in range(stage.effort.runs):
            bare.append(ran([sys.executable, "-c", "pass"]).elapsed)
            helps.append(ran_silently(str(BIN / "twistd"), "--help"))
            run = cold(stage, registry, UNSHAPED, image, lambda mountpoint: None)
            totals.append(run.interpreter + run.mounted)
            mounts.append(run.mounted)
    python, alone, mounted = medians(bare, helps, mounts)
    yield at_most(
        "from the command to the mount",
        totals,
        TOTAL,
        f'interpreter alone {python:.2f} s, from "starting up" {mounted:.2f} s',
    )
    beyond = [total - own for total, own in zip(totals, helps, strict=True)]
    yield at_most("the same, beyond twistd --help", beyond, BEYOND, f"twistd --help {alone:.2f} s")
    milliseconds = sum(modules.values()) / 1000
    yield Row(
        "imports for a mount", f"{milliseconds:.0f} ms", details=f"{len(modules)} modules, -X importtime"
    )
    show_imports(modules)


def ran_silently(*command: str) -> float:
    return ran(["sh", "-c", '"$0" "$@" >/dev/null', *command]).elapsed


def imports(stage: Stage, reference: str) -> Counter[str]:
    """Microseconds that each module took to be imported for a mount, without those it imports."""
    with ImportTimed(stage.new("imports"), reference) as lazy:
        said = (lazy.directory / "errors").read_text(errors="replace")
    found: Counter[str] = Counter()
    for microseconds, module in IMPORT.findall(said):
        found[module] += int(microseconds)
    return found


def show_imports(modules: Counter[str], most: int = 10) -> None:
    """By package, ours and Twisted's by their own."""
    packages: Counter[str] = Counter()
    counts: Counter[str] = Counter()
    for module, microseconds in modules.items():
        names = module.split(".")
        package = ".".join(names[: 2 if names[0] in ("twisted", "erofs_twisted") else 1])
        packages[package] += microseconds
        counts[package] += 1
    console.print("most of the imports' time is by")
    for package, microseconds in packages.most_common(most):
        console.print(f"{microseconds / 1000:8.1f} ms  {package} ({counts[package]})")
