"""What readers notice of daemons that are killed, again and again, and started anew at once: from nothing, as
systemd does it, and by a parent that has imported all (``--supervise``).

On a kernel with nbd, in User-Mode Linux where this machine's has none. Python is several times slower there,
so the bar for a start from nothing is its own time in the same boot. Run as a program it prints its figures
as JSON.
"""

from __future__ import annotations

import json
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.registries import PROJECT
from benchmarks.stage import Stage
from benchmarks.table import Row
from erofs_twisted.state.records import Status
from tests.daemon import Daemon, registry
from tests.processes import until
from tests.reading import Reader
from tests.scenery import BIG, scenery

KILLS = 100
READERS = 4
REQUEUED = 2.5
"""Seconds that a request in flight takes at most, once the new daemon is there: until the kernel's timer."""

BELOW_PARENT = 3.0
FROM_NOTHING, SUPERVISED = "started from nothing", "below a parent"

APART = 2.0
"""Seconds between two kills, at most; before that a reader may still wait because of the one before."""

GUEST_SECONDS = 7200


def measure(stage: Stage) -> Iterator[Row]:
    """A reader that gets an error or a wrong byte is an exception."""
    for name, found in elsewhere().items():
        starts, pauses = found["starts"], found["pauses"]
        bar = BELOW_PARENT if name == SUPERVISED else max(starts) + REQUEUED
        yield Row(
            f"kill -9, {KILLS} times, under {READERS} readers, {name}: longest pause",
            f"{max(pauses):.2f} s",
            f"<= {bar:.2f} s",
            max(pauses) <= bar,
            f"pauses {told(pauses)}; starts {told(starts)}; {found['reads']} reads, none failed or wrong",
        )


def elsewhere() -> dict[str, Any]:
    """What this module prints as a program, on a kernel that has nbd."""
    command = [str(PROJECT / "tests/kernel/run"), "--seconds", str(GUEST_SECONDS), "--shell"]
    program = [sys.executable, "-m", "benchmarks.takeover", str(KILLS)]
    done = subprocess.run([*command, *program], cwd=PROJECT, capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"it ends with {done.returncode}:\n{done.stdout}{done.stderr}")
    return dict(json.loads(done.stdout.splitlines()[-1]))


def told(seconds: Sequence[float]) -> str:
    percentiles = statistics.quantiles(seconds, n=100)
    return f"p50 {percentiles[49]:.2f}, p99 {percentiles[98]:.2f}, max {max(seconds):.2f} s"


def killed(directory: Path, kills: int, supervised: bool) -> dict[str, Any]:
    """``starts``, how long it took from each kill until the mount was served again, and ``pauses``, those of
    each reader that were the longest, one for each kill; in seconds."""
    moments = random.Random(kills)
    options = ("--attach", "nbd", "--fill", "off", *(["--supervise"] if supervised else []))
    daemon = Daemon(directory, registry().image("killed"), options, foreground=True)
    daemon.start()
    pid = until("the first one serves", partial(served_by_another, daemon, 0))
    original = scenery().tree / BIG
    readers = [Reader(daemon.mountpoint / BIG, original, seed) for seed in range(READERS)]
    starts = []
    for number in range(kills):
        time.sleep(REQUEUED + APART * moments.random())
        began = time.monotonic()
        os.kill(pid, signal.SIGKILL)
        if not supervised:
            daemon.ended()
            daemon.pidfile.unlink()
            daemon = Daemon(directory, daemon.image, options, foreground=True)
            daemon.start()
        pid = until("the next one serves", partial(served_by_another, daemon, pid))
        starts.append(time.monotonic() - began)
        print(f"{number + 1}: {starts[-1]:.2f} s", file=sys.stderr, flush=True)
    time.sleep(REQUEUED)
    ends = [reader.end() for reader in readers]
    daemon.signal(signal.SIGTERM)
    if daemon.ended() != 0:
        raise RuntimeError(daemon.log)
    return {
        "starts": starts,
        "pauses": [pause for end in ends for pause in end["pauses"][:kills]],
        "reads": sum(end["reads"] for end in ends),
    }


def served_by_another(daemon: Daemon, before: int) -> int:
    """The process number of the daemon, once it is another than ``before``."""
    record = daemon.record()
    return record.pid if record is not None and record.status is Status.READY and record.pid != before else 0


def main(kills: str) -> None:
    found = {}
    for name in (FROM_NOTHING, SUPERVISED):
        with tempfile.TemporaryDirectory(prefix="takeover-") as directory:
            found[name] = killed(Path(directory), int(kills), name == SUPERVISED)
    print(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
