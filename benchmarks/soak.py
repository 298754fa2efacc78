"""All faults at once, for ten minutes: ``make soak``, or ``python -m benchmarks.soak --seconds N --seed N``.

As root, on a kernel with nbd, such as ``tests/kernel/run --seconds 1200 --shell COMMAND`` has. A daemon below
its parent has mounts that are read and compared all along. It is killed, stopped, upgraded; its registry
fails by chance, and goes away; other mounts come and go, and the cache is emptied. The status is 0 if no
reader saw an error or a wrong byte, memory and files stayed as they were, and nothing is left at the end.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from http.client import HTTPException
from pathlib import Path
from typing import Any
from urllib.parse import quote

import attrs

from benchmarks.machine import machine
from benchmarks.table import Row, console, show
from tests.controlled import Controlled
from tests.daemon import (
    BIN,
    FaultRegistry,
    adopt_orphans,
    children,
    mounts,
    nbd_devices_in_use,
    registry,
    run,
    until,
)
from tests.faults import REGISTRY_FAULTS
from tests.reading import Reader
from tests.scenery import BIG, scenery, sha256

READERS = 4
READ = {"one": "lz4", "two": "lz4", "three": "plain"}
"""Mounts that are there all the time, and their images."""
SPARE = {"four": "lz4", "five": "plain"}
"""Those that come and go."""
RATE = 0.1
MOST_MEMORY, MOST_FILES = 150 << 20, 150
LONGEST_PAUSE = 30.0
"""Seconds: a registry that is away for a while, and a daemon that is killed meanwhile, again and again."""


@attrs.define
class Soak:
    """What is done, by a chance that can be had again."""

    controlled: Controlled
    registry: FaultRegistry
    chance: random.Random
    done: Counter[str] = attrs.field(factory=Counter)
    memory: list[int] = attrs.field(factory=list)
    files: list[int] = attrs.field(factory=list)

    def actions(self) -> list[Callable[[], None]]:
        return [
            self.kill,
            self.stop,
            self.upgrade,
            self.lose_registry,
            self.fail_by_chance,
            self.mount,
            self.mount,
            self.unmount,
            self.unmount_lazily,
            self.prefetch,
            self.empty_cache,
            self.look,
            self.look,
        ]

    def go_on(self, seconds: float) -> None:
        """One after the other, until the time is over."""
        ends_at = time.monotonic() + seconds
        while time.monotonic() < ends_at:
            action = self.chance.choice(self.actions())
            self.done[action.__name__] += 1
            action()
            time.sleep(self.chance.uniform(0.1, 1.5))

    def kill(self) -> None:
        self._signal(signal.SIGKILL)

    def stop(self) -> None:
        """For a while, as a debugger does it, or a machine that swaps."""
        pid = self._signal(signal.SIGSTOP)
        time.sleep(self.chance.uniform(0.5, 3.0))
        with suppress(ProcessLookupError):  # an upgrade may have been under way
            if pid:
                os.kill(pid, signal.SIGCONT)

    def upgrade(self) -> None:
        self._call("POST", "/v1/upgrade")

    def lose_registry(self) -> None:
        self.registry.go_down()
        time.sleep(self.chance.uniform(0.5, 4.0))
        self.registry.come_back()

    def fail_by_chance(self) -> None:
        faults = [fault.fields() for fault in REGISTRY_FAULTS]
        for name in (*READ, *SPARE):
            self.registry.set(name, *faults, rate=RATE, seed=self.chance.randrange(1000))

    def mount(self) -> None:
        name = self.chance.choice(list(SPARE))
        body = {"image": self.registry.image(name, SPARE[name]), "io-timeout": "10"}
        status, said = self._call("PUT", self._where(name), body)
        if status in (200, 201):
            self._compare(name)
        elif status not in (0, 502) and "about to end" not in str(said):
            raise AssertionError(f"mount: {status} {said}")

    def unmount(self) -> None:
        self._call("DELETE", self._where(self.chance.choice(list(SPARE))))

    def unmount_lazily(self) -> None:
        self._call("DELETE", self._where(self.chance.choice(list(SPARE))) + "?lazy=true")

    def prefetch(self) -> None:
        self._call("POST", self._where(self.chance.choice([*READ, *SPARE])) + "/prefetch")

    def empty_cache(self) -> None:
        run(BIN / "erofs-nbd", "cache", "prune", "--all", "--cache-dir", self.controlled.directory / "cache")

    def look(self) -> None:
        status, said = self._call("GET", "/v1/status")
        if status == 200:
            self.memory.append(said["memory"])
            self.files.append(said["open_files"])

    def calm_down(self) -> None:
        """No more faults, and all mounts up."""
        for name in (*READ, *SPARE):
            self.registry.set(name)
        until("all mounts are there", self._all_there, patience=120)

    def _all_there(self) -> bool:
        status, said = self._call("GET", "/v1/mounts")
        ready = {each["mountpoint"] for each in said.get("mounts", []) if each["status"] == "ready"}
        return status == 200 and {str(self.controlled.directory / name) for name in READ} <= ready

    def _compare(self, name: str) -> None:
        """A file of a mount that may go away at any time."""
        path = self.controlled.directory / name
        try:
            found = sha256(path / "sizes" / "4096")
        except OSError:
            return
        if found != sha256(scenery().tree / "sizes" / "4096"):
            raise AssertionError(f"{path}: wrong bytes")

    def _signal(self, number: int) -> int:
        status, said = self._call("GET", "/v1/status")
        if status != 200:
            return 0
        with suppress(ProcessLookupError):
            os.kill(said["pid"], number)
            return int(said["pid"])
        return 0

    def _where(self, name: str) -> str:
        return f"/v1/mounts/{quote(str(self.controlled.mountpoint(name)), safe='')}"

    def _call(self, method: str, where: str, body: Any = None) -> tuple[int, Any]:
        try:
            return self.controlled.call(method, where, None if body is None else json.dumps(body).encode())
        except (OSError, HTTPException, ValueError):
            return 0, {}  # a daemon that was just killed


def soak(directory: Path, seconds: float, seed: int) -> list[Row]:
    adopt_orphans()
    scenery()
    images = registry()
    before, devices_before = children(), nbd_devices_in_use()
    options = (
        "--attach",
        "nbd",
        "--fill",
        "off",
        "--io-timeout",
        "60",
        "--stall-timeout",
        "2",
        "--supervise",
    )
    controlled = Controlled(directory / "s", options)
    controlled.start()
    chaos = Soak(controlled, images, random.Random(seed))
    try:
        paths = [controlled.mount(images.image(name, tag), name) for name, tag in READ.items()]
        readers = [Reader(paths[n % len(paths)] / BIG, scenery().tree / BIG, n) for n in range(READERS)]
        try:
            chaos.go_on(seconds)
            chaos.calm_down()
            found = [reader.end() for reader in readers]
        finally:
            for reader in readers:
                reader.kill()
        for path in paths:
            if sha256(path / BIG) != sha256(scenery().tree / BIG):
                raise AssertionError(f"{path}: wrong bytes")
        status = controlled.stop()
    except BaseException:
        console.print(controlled.log[-20_000:])
        controlled.kill()
        raise
    left = [mount.path for mount in mounts() if mount.path.startswith(str(directory))]
    until("no process is left", lambda: children() <= before, patience=20)
    return rows(chaos, found, status, left, nbd_devices_in_use() - devices_before)


def rows(chaos: Soak, found: list[Any], status: int, left: list[str], devices: set[str]) -> list[Row]:
    pauses = sorted(pause for each in found for pause in each["pauses"])
    reads = sum(each["reads"] for each in found)
    what = ", ".join(f"{count} {name}" for name, count in sorted(chaos.done.items()))
    memory, files = chaos.memory or [0], chaos.files or [0]
    half = len(memory) // 2
    return [
        Row("reads that were wrong or failed", f"0 of {reads}", "0", True, what),
        Row(
            "longest pause of a read",
            f"{pauses[-1]:.1f} s",
            f"<= {LONGEST_PAUSE:.0f} s",
            pauses[-1] <= LONGEST_PAUSE,
            f"p99 {1000 * pauses[-max(len(pauses) // 100, 1)]:.0f} ms of the {len(pauses)} longest",
        ),
        Row(
            "memory",
            f"{max(memory) >> 20} MiB",
            f"<= {MOST_MEMORY >> 20} MiB",
            max(memory) <= MOST_MEMORY,
            f"first half {max(memory[: half + 1]) >> 20} MiB, second {max(memory[half:]) >> 20} MiB at most",
        ),
        Row("open files", f"{max(files)}", f"<= {MOST_FILES}", max(files) <= MOST_FILES, ""),
        Row(
            "left at the end",
            f"status {status}, {len(left)} mounts, {len(devices)} devices",
            "0, 0, 0",
            not (status or left or devices),
            "",
        ),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.soak", description="All faults at once.")
    parser.add_argument("--seconds", type=float, default=600.0)
    parser.add_argument("--seed", type=int, default=random.randrange(1 << 16))
    asked = parser.parse_args()
    console.print(f"seed {asked.seed}")
    with tempfile.TemporaryDirectory(prefix="soak-", ignore_cleanup_errors=True) as directory:
        found = soak(Path(directory), asked.seconds, asked.seed)
    console.print(f"\n{machine()}\n")
    sys.exit(0 if show(found) else 1)


if __name__ == "__main__":
    main()
