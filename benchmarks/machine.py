"""What figures are figures of: the machine, and what processes take of it."""

from __future__ import annotations

import os
import platform
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

import attrs

PATIENCE = 300.0


def machine() -> str:
    """Processor, number of cores, memory, kernel."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    gibibytes = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / (1 << 30)
    name = models[0] if models else platform.machine()
    return f"{name}, {os.cpu_count()} cores, {gibibytes:.0f} GiB, Linux {platform.release()}"


def processor_time(pid: int) -> float:
    """Seconds that a process has used, for itself and in the kernel."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def memory(pid: int, field: str) -> int:
    """``VmRSS``, or ``VmHWM`` (the most that it ever was), in bytes."""
    status = Path(f"/proc/{pid}/status").read_text()
    (kibibytes,) = [int(line.split()[1]) for line in status.splitlines() if line.startswith(f"{field}:")]
    return kibibytes << 10


@attrs.frozen
class Ran:
    """Seconds, elapsed and of the processor."""

    elapsed: float
    processor: float


def ran(command: Sequence[str | Path]) -> Ran:
    """Run a program to its end, which must be a good one, within `PATIENCE`."""
    began, before = time.perf_counter(), os.times()
    subprocess.run(command, check=True, timeout=PATIENCE, stdin=subprocess.DEVNULL)
    elapsed, after = time.perf_counter() - began, os.times()
    worked = after.children_user + after.children_system - before.children_user - before.children_system
    return Ran(elapsed, worked)
