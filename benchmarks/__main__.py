"""Speed, side by side with other programs: ``python -m benchmarks [--quick] [NAME...]``, as root.

Each figure is a ratio within one run, or is held against what the link or the reference of the same run
gives; the median of several runs counts. The status is 1 if a bar was missed.
"""

from __future__ import annotations

import argparse
import importlib
import os
import signal
import sys
import tempfile
import time
from pathlib import Path

import attrs

from benchmarks.machine import machine
from benchmarks.profiling import profiling
from benchmarks.stage import FULL, QUICK, Stage
from benchmarks.table import Row, console, markdown, show

BENCHMARKS = (
    "links",
    "cached_copy",
    "growth",
    "streaming",
    "curl_plugin",
    "farlink",
    "readiness",
    "residency",
    "startup",
    "cached_reads",
    "guest",
    "takeover",
)
NOT_QUICK = {"links", "cached_reads", "guest", "takeover"}


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", description=(__doc__ or "").partition(":")[0]
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(BENCHMARKS)} [all]")
    parser.add_argument(
        "--quick",
        action="store_true",
        help="two runs, smaller sizes, without links, cached_reads, guest, takeover",
    )
    parser.add_argument("--runs", type=int, help="of each measurement [5, quick: 2]")
    parser.add_argument(
        "--profile", type=Path, metavar="DIR", help="profile our daemons; times are no figures then"
    )
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="also write the table there")
    parser.add_argument("--directory", type=Path, help="on a disk with 20 GB free [$TMPDIR]")
    asked = parser.parse_args()
    unknown = set(asked.names) - set(BENCHMARKS)
    if unknown:
        parser.error(f"there is no {', '.join(sorted(unknown))}")
    if os.geteuid() != 0:
        sys.exit("mounting takes root")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    if asked.directory:
        # The servers' own directories, with their caches, are made there too.
        tempfile.tempdir = os.environ["TMPDIR"] = str(asked.directory.resolve())
    if asked.profile:
        asked.profile.mkdir(parents=True, exist_ok=True)
        profiling.directory = asked.profile.resolve()
    effort = QUICK if asked.quick else FULL
    if asked.runs:
        effort = attrs.evolve(effort, runs=asked.runs)
    names = asked.names or [name for name in BENCHMARKS if not asked.quick or name not in NOT_QUICK]
    began, busy = time.monotonic(), os.getloadavg()[0]
    rows: list[Row] = []
    with tempfile.TemporaryDirectory(prefix="benchmarks-") as directory:
        stage = Stage(Path(directory), effort)
        for name in names:
            console.print(f"[dim]{time.monotonic() - began:5.0f} s  {name}[/dim]")
            try:
                for row in importlib.import_module(f"benchmarks.{name}").measure(stage):
                    console.print(f"         {row.what}: {row.measured}; {row.details}")
                    rows.append(row)
            except Exception as error:  # noqa: BLE001 - the others' figures are worth having
                console.print_exception()
                rows.append(Row(name, "failed", met=False, details=f"{type(error).__name__}: {error}"[:200]))
    console.print(f"\n{machine()}; {effort.runs} runs, medians (least-most)")
    console.print(
        f"load average {busy:.1f} before, {os.getloadavg()[0]:.1f} after; {time.monotonic() - began:.0f} s\n"
    )
    met = show(rows)
    if asked.markdown:
        asked.markdown.write_text(markdown(rows))
    profiling.show()
    sys.exit(0 if met else 1)


if __name__ == "__main__":
    main()
