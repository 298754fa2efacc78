"""The cold figures a second time, in User-Mode Linux: the nbd back end, the link by the kernel's netem.

Python is several times slower there, so it is not seconds that are compared, but requests and bytes with
those of the fuse back end on this machine. Run as a program, in the guest, it prints its figures as JSON.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import attrs

from benchmarks.cold import cold
from benchmarks.content import Image
from benchmarks.farlink import record
from benchmarks.lazy import find, python_line, tar
from benchmarks.registries import FAR, PROJECT, UNSHAPED, Counts, Link, Shaped
from benchmarks.stage import QUICK, Stage
from benchmarks.table import Row
from tests.servers import tool

GUEST_SECONDS = 240
RUNS = 3
ACTIONS: dict[str, tuple[Callable[[Path], None], bool]] = {
    "find": (find, False),
    "python3 line, with a trace": (python_line, True),
    "python3 line": (python_line, False),
    "every file": (tar, False),
}
"""And whether there is a trace."""
NETEM = ("delay", "12500us", "rate", "100mbit", "limit", "20000")
BYTES_APART, REQUESTS_APART = 0.15, 0.5
SLACK = 2_000_000
"""How far the two may differ, and bytes by this much in any case: what is asked for ahead depends on time, in
how many pieces even more."""


def measure(stage: Stage) -> Iterator[Row]:
    """The median by requests of `RUNS` on each side; the background fill, a matter of time, is off."""
    image = stage.python
    with Shaped(root=stage.www) as registry:
        traces = record(stage, registry, image)
        here = figures(stage, registry, FAR, image, traces)
    there = in_guest(image, stage.www, traces)
    for name, ours in here.items():
        theirs, seconds = Counts(**there[name]["counts"]), there[name]["seconds"]
        bytes_apart = abs(theirs.bytes - ours[0].bytes) / max(ours[0].bytes, 1)
        apart = abs(theirs.requests - ours[0].requests) / max(ours[0].requests, 1)
        yield Row(
            f"nbd and netem in a guest: {name}",
            f"{bytes_apart:.0%} of bytes, {apart:.0%} of requests apart",
            f"<= {BYTES_APART:.0%} or {SLACK / 1e6:.0f} MB, {REQUESTS_APART:.0%}",
            abs(theirs.bytes - ours[0].bytes) <= max(SLACK, BYTES_APART * ours[0].bytes)
            and apart <= REQUESTS_APART,
            f"fuse {ours[0].requests} requests, {ours[0].bytes / 1e6:.1f} MB, {ours[1]:.2f} s; "
            f"guest {theirs.requests}, {theirs.bytes / 1e6:.1f} MB, {seconds:.2f} s",
        )


def figures(
    stage: Stage, registry: Shaped, link: Link, image: Image, traces: Path
) -> dict[str, tuple[Counts, float]]:
    found = {}
    for name, (action, traced) in ACTIONS.items():
        runs = [
            cold(stage, registry, link, image, action, "--fill=off", traces=traces if traced else None)
            for _ in range(RUNS)
        ]
        median = sorted(runs, key=lambda run: run.counts.requests)[RUNS // 2]
        found[name] = median.counts, median.seconds
    return found


def in_guest(image: Image, www: Path, traces: Path) -> dict[str, Any]:
    """What this module prints as a program, on another kernel that has this machine's files."""
    command = [str(PROJECT / "tests/kernel/run"), "--guest", "--seconds", str(GUEST_SECONDS), "--shell"]
    program = [
        sys.executable,
        "-m",
        "benchmarks.guest",
        str(www),
        str(traces),
        json.dumps(attrs.asdict(image), default=str),
    ]
    done = subprocess.run(
        [*command, *program], cwd=PROJECT, capture_output=True, text=True, timeout=GUEST_SECONDS + 60
    )
    if done.returncode != 0:
        raise RuntimeError(f"the guest ends with {done.returncode}:\n{done.stdout}{done.stderr}")
    return dict(json.loads(done.stdout.splitlines()[-1]))


def main(www: str, traces: str, described: str) -> None:
    fields = json.loads(described)
    image = Image(**{**fields, "blob": Path(fields["blob"])})
    subprocess.run([tool("tc"), "qdisc", "add", "dev", "lo", "root", "netem", *NETEM], check=True)
    with tempfile.TemporaryDirectory() as name, Shaped(root=Path(www)) as registry:
        stage = Stage(Path(name), QUICK)
        found = figures(stage, registry, UNSHAPED, image, Path(traces))
    print(json.dumps({k: {"counts": attrs.asdict(c), "seconds": s} for k, (c, s) in found.items()}))


if __name__ == "__main__":
    main(*sys.argv[1:])
