"""All faults at once, for ten minutes: ``make soak``, or ``python -m benchmarks.soak --seconds N --seed N``.

As root, on a kernel with nbd, such as ``tests/kernel/run --seconds 1200 --shell COMMAND`` has. A daemon
below its parent has mounts that are read and compared all along. It is killed, stopped, upgraded; its
registry fails by chance, and goes away; other mounts come and go, their devices are cut off, their callers
die; what is read is unmounted lazily by somebody else, and mounted again. The cache is emptied, or finds no
memory; the disk of the state directory is full, file descriptors are used up, and the clock, if it is that
of User-Mode Linux, is set. The status is 0 if no reader saw an error or a wrong byte, memory and files
stayed as they were, and nothing is left at the end.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
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
from tests.daemon import FaultRegistry, mounts, nbd_devices_in_use, registry
from tests.faults import REGISTRY_FAULTS
from tests.processes import BIN, IN_USER_MODE_LINUX, PROJECT, adopt_orphans, children, run, until
from tests.reading import Reader
from tests.scarcity import CACHE_CALLS, without_memory
from tests.scenery import BIG, scenery, sha256
from tests.servers import tool

READERS = 4
READ = {"one": "lz4", "two": "lz4", "three": "plain"}
"""Mounts that are there all the time, and their images."""
SPARE: dict[str, tuple[str, dict[str, str]]] = {
    "four": ("lz4", {}),
    "five": ("plain", {"nbd-io-timeout": "900"}),
}
"""Those that come and go: image and options. The second has a device of its own."""
STATE_SIZE = "256k"
HOUR = 3600.0
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
    scarcity: Path
    """As `tests.scarcity` has it."""
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
            self.abandon_call,
            self.unmount,
            self.unmount_lazily,
            self.unmount_from_outside,
            self.disconnect,
            self.prefetch,
            self.empty_cache,
            self.lack_memory,
            self.use_up_files,
            self.fill_state_disk,
            *([self.set_clock] if IN_USER_MODE_LINUX else []),
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
        status, said = self._call("PUT", self._where(name), self._body(name))
        if status in (200, 201):
            self._compare(name)
        elif status not in (0, 502) and "about to end" not in str(said):
            raise AssertionError(f"mount: {status} {said}")

    def abandon_call(self) -> None:
        """The caller dies, now or a little later."""
        name = self.chance.choice(list(SPARE))
        with suppress(OSError):
            call = self.controlled.begin_call("PUT", self._where(name), json.dumps(self._body(name)).encode())
            time.sleep(self.chance.uniform(0.0, 0.5))
            call.close()

    def unmount(self) -> None:
        self._call("DELETE", self._where(self.chance.choice(list(SPARE))))

    def unmount_lazily(self) -> None:
        self._call("DELETE", self._where(self.chance.choice(list(SPARE))) + "?lazy=true")

    def unmount_from_outside(self) -> None:
        """What is being read: who reads it goes on, and so does who comes later."""
        name = self.chance.choice(list(READ))
        run("umount", "-l", self.controlled.directory / name)
        time.sleep(self.chance.uniform(0.0, 2.0))
        self._mount_again(name)

    def _mount_again(self, name: str) -> None:
        """It may be mounted, or there may be no daemon: it is asked for again at the end."""
        self._call("PUT", self._where(name), {"image": self.registry.image(name, READ[name])})

    def disconnect(self) -> None:
        """A device that nobody reads all along."""
        _, said = self._call("GET", "/v1/mounts")
        devices = {Path(each["mountpoint"]).name: each.get("device") for each in said.get("mounts", [])}
        if (device := devices.get("five")) and device not in [devices.get(name) for name in READ]:
            run(tool("nbd-client"), "-d", device)

    def lack_memory(self) -> None:
        with without_memory(self.scarcity, *CACHE_CALLS, error=self.chance.choice(["ENOMEM", "MemoryError"])):
            time.sleep(self.chance.uniform(0.5, 3.0))

    def use_up_files(self) -> None:
        """So that it can open one or two more, or none."""
        status, said = self._call("GET", "/v1/status")
        if status != 200:
            return
        with suppress(ProcessLookupError):
            limits = resource.prlimit(said["pid"], resource.RLIMIT_NOFILE)
            resource.prlimit(said["pid"], resource.RLIMIT_NOFILE, (said["open_files"] + 1, limits[1]))
            time.sleep(self.chance.uniform(0.5, 3.0))
            resource.prlimit(said["pid"], resource.RLIMIT_NOFILE, limits)

    def fill_state_disk(self) -> None:
        path = self.controlled.state_dir / "filled"
        with suppress(OSError), path.open("wb", buffering=0) as file:
            while True:
                file.write(bytes(4096))
        time.sleep(self.chance.uniform(0.5, 3.0))
        path.unlink()

    def set_clock(self) -> None:
        """Between an hour before and an hour after what it is."""
        time.clock_settime(time.CLOCK_REALTIME, time.time() + self.chance.uniform(-HOUR, HOUR))

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
        """Those that were unmounted from outside are mounted again, unless they were at once."""
        status, said = self._call("GET", "/v1/mounts")
        ready = {
            Path(each["mountpoint"]).name for each in said.get("mounts", []) if each["status"] == "ready"
        }
        missing = READ.keys() - ready
        for name in missing:
            self._mount_again(name)
        return status == 200 and not missing

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

    def _body(self, name: str) -> dict[str, str]:
        image, options = SPARE[name]
        return {"image": self.registry.image(name, image), "io-timeout": "10", **options}

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
    scarcity = directory / "scarcity"
    under = (sys.executable, "-m", "tests.scarcity", str(scarcity))
    controlled = Controlled(directory / "s", options, {"PYTHONPATH": str(PROJECT)}, under)
    controlled.state_dir.mkdir(parents=True)
    run(
        "mount", "-t", "tmpfs", "-o", f"size={STATE_SIZE},mode=700", "state", controlled.state_dir, check=True
    )
    chaos = Soak(controlled, images, random.Random(seed), scarcity)
    began = time.time() - time.monotonic()
    try:
        controlled.start()
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
    finally:
        if IN_USER_MODE_LINUX:
            time.clock_settime(time.CLOCK_REALTIME, began + time.monotonic())
        run("umount", "-l", controlled.state_dir)
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
