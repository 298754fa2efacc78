"""The programs of the project, run as a user runs them, and the processes there are."""

from __future__ import annotations

import ctypes
import functools
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

PROJECT = Path(__file__).resolve().parents[1]
BIN = Path(sys.executable).parent
PATIENCE = 150.0
"""Seconds: User-Mode Linux needs several for each start of Python, and many on a busy machine."""

PR_SET_CHILD_SUBREAPER = 36

IN_USER_MODE_LINUX = "User Mode Linux" in Path("/proc/cpuinfo").read_text()

Found = TypeVar("Found")


@functools.cache
def adopt_orphans() -> None:
    """Become the parent of whatever our children leave behind, daemons too: so their exit status can be had,
    and none can be overlooked."""
    if ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) != 0:
        raise OSError("prctl(PR_SET_CHILD_SUBREAPER) failed")


def children(pid: int | str = "self", *, ended: bool = False) -> set[int]:
    """The children of a process that still run, or also those that have ``ended`` and are not waited for."""
    listed = " ".join(path.read_text() for path in Path(f"/proc/{pid}/task").glob("*/children"))
    return {child for child in map(int, listed.split()) if ended or not _ended(child)}


def descendants(pid: int) -> set[int]:
    """A process, and those below it that still run."""
    return {pid}.union(*map(descendants, children(pid)))


def command_line(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    except FileNotFoundError:
        return "(ended)"


def _ended(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in "ZX"
    except FileNotFoundError:
        return True


def until(what: str, look: Callable[[], Found], patience: float = PATIENCE) -> Found:
    """Look again and again until there is something to see."""
    deadline = time.monotonic() + patience
    while not (found := look()):
        if time.monotonic() > deadline:
            raise AssertionError(f"not within {patience:g} s: {what}")
        time.sleep(0.02)
    return found


def run(*command: str | Path, **options: Any) -> subprocess.CompletedProcess[str]:
    """Run a program to its end, with its output, whatever its status."""
    return subprocess.run(
        [str(word) for word in command],
        **{"capture_output": True, "text": True, "timeout": PATIENCE, "stdin": subprocess.DEVNULL, **options},
    )


def until_serving(process: subprocess.Popen[str]) -> None:
    """Read what ``erofs-nbd serve`` says on standard error until it serves."""
    assert process.stderr is not None
    said: list[str] = []
    while not said or "serving" not in said[-1]:
        said.append(process.stderr.readline())
        if not said[-1]:
            raise AssertionError("it does not serve: " + "".join(said))


def exit_status(pid: int) -> int | None:
    """Of a child that has ended, once; None while it runs."""
    try:
        ended, waited = os.waitpid(pid, os.WNOHANG)
    except ChildProcessError:
        # Not ours yet: its parent, the first of twistd's two forks, is about to end.
        return None
    return os.waitstatus_to_exitcode(waited) if ended else None
