"""How long a mount takes, from the command's start: ``python -m benchmarks.startup [--runs N]``, as root.

A 40 MB image of the standard library, a registry on loopback, an empty cache. ``twistd --help``, run in turn
with it, is what the interpreter and twistd take for themselves.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import signal
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import attrs
from rich.console import Console
from rich.table import Table

from erofs_twisted.state.journal import Journal
from tests.images import EROFS, Layout, build_erofs

PROJECT = Path(__file__).resolve().parents[1]
BIN = Path(sys.executable).parent
PATIENCE = 60.0
IMPORT = re.compile(r"import time: +(\d+) \| +\d+ \| +([\w.]+)")
console = Console(highlight=False)


@attrs.frozen
class Bars:
    """Seconds that a mount may take, in all and beyond ``twistd --help``."""

    total: float | None
    beyond: float

    @classmethod
    def of_this_kernel(cls) -> Bars:
        if "User Mode Linux" in Path("/proc/cpuinfo").read_text():
            return cls(None, 1.5)
        return cls(1.2, 0.6)


@attrs.frozen
class Mounting:
    """A mount to be made again and again, each time with nothing cached."""

    image: str
    directory: Path

    def command(self, *options: str) -> list[str]:
        files = [f"--pidfile={self.directory}/pid", f"--logfile={self.directory}/log"]
        places = [f"--{name}={self.directory / name}" for name in ("cache-dir", "state-dir")]
        return [
            *(str(BIN / "twistd"), *options, *files, "erofs-nbd", "--mkdir"),
            *(f"--image={self.image}", f"--mountpoint={self.mountpoint}", *places),
        ]

    @property
    def mountpoint(self) -> Path:
        return self.directory / "mnt"

    def seconds(self) -> float:
        """From the command's start until its mount is in mountinfo."""
        began = time.perf_counter()
        with subprocess.Popen(self.command("-n"), stdout=subprocess.DEVNULL) as daemon:
            self._wait(daemon)
            took = time.perf_counter() - began
            self._end(daemon)
        return took

    def imports(self) -> Counter[str]:
        """Microseconds that each module took to be imported for a mount, without those it imports."""
        command = [sys.executable, "-X", "importtime", *self.command("-n")]
        with tempfile.TemporaryFile("w+") as said:
            with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=said) as daemon:
                self._wait(daemon)
                self._end(daemon)
            said.seek(0)
            found: Counter[str] = Counter()
            for microseconds, module in IMPORT.findall(said.read()):
                found[module] += int(microseconds)
        return found

    def backend(self) -> str:
        """Which one takes the mount, and its device."""
        with subprocess.Popen(self.command("-n"), stdout=subprocess.DEVNULL) as daemon:
            self._wait(daemon)
            while not (record := Journal(self.directory / "state-dir").read(str(self.mountpoint))) or (
                not record.backend
            ):
                time.sleep(0.01)
            self._end(daemon)
        return record.backend

    def _wait(self, daemon: subprocess.Popen[bytes]) -> None:
        wanted = f" {self.mountpoint} "
        deadline = time.monotonic() + PATIENCE
        while wanted not in Path("/proc/self/mountinfo").read_text():
            if daemon.poll() is not None or time.monotonic() > deadline:
                daemon.kill()
                sys.exit(f"no mount:\n{(self.directory / 'log').read_text()}")
            time.sleep(0.001)

    def _end(self, daemon: subprocess.Popen[bytes]) -> None:
        daemon.send_signal(signal.SIGTERM)
        if daemon.wait(PATIENCE) != 0:
            sys.exit(f"status {daemon.returncode}:\n{(self.directory / 'log').read_text()}")
        shutil.rmtree(self.directory / "cache-dir")


def seconds_of_help() -> float:
    began = time.perf_counter()
    subprocess.run([BIN / "twistd", "--help"], stdout=subprocess.DEVNULL, check=True)
    return time.perf_counter() - began


@contextmanager
def registry_with_the_standard_library(directory: Path) -> Iterator[tuple[str, int]]:
    """The image's name, and its size in bytes."""
    layout = Layout(directory / "layout")
    stdlib = Path(sysconfig.get_path("stdlib"))
    image = build_erofs(stdlib, directory / "image", "--exclude-regex=__pycache__")
    layer = layout.blob(image, EROFS)
    layout.tag(layout.manifest([layer]), "latest")
    command = [sys.executable, PROJECT / "examples" / "registry.py", layout.directory]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as registry:
        try:
            assert registry.stdout is not None
            yield f"127.0.0.1:{int(registry.stdout.readline())}/demo/stdlib", layer["size"]
        finally:
            registry.terminate()


def show_times(mounts: list[float], helps: list[float], bars: Bars) -> bool:
    """Print them; are they within their bars?"""
    beyond = [mount - alone for mount, alone in zip(mounts, helps, strict=True)]
    table = Table("", "median", "least", "most", "bar", box=None, header_style="bold")
    rows = (
        ("twistd --help", helps, None),
        ("to the mount", mounts, bars.total),
        ("difference", beyond, bars.beyond),
    )
    for name, times, bar in rows:
        figures = (statistics.median(times), min(times), max(times))
        table.add_row(name, *(f"{figure:.3f} s" for figure in figures), f"≤ {bar:.1f} s" if bar else "")
    console.print(table)
    within = all(bar is None or statistics.median(times) <= bar for _, times, bar in rows)
    console.print("[green]within the bars[/green]" if within else "[red]over a bar[/red]")
    return within


def show_imports(modules: Counter[str], most: int = 15) -> None:
    """By package, ours and Twisted's by their own."""
    packages: Counter[str] = Counter()
    counts: Counter[str] = Counter()
    for module, microseconds in modules.items():
        names = module.split(".")
        package = ".".join(names[: 2 if names[0] in ("twisted", "erofs_twisted") else 1])
        packages[package] += microseconds
        counts[package] += 1
    total = sum(packages.values())
    console.print(
        f"\n{len(modules)} modules are imported, in {total / 1000:.0f} ms (with -X importtime); most by"
    )
    for package, microseconds in packages.most_common(most):
        console.print(f"{microseconds / 1000:8.1f} ms  {package} ({counts[package]})")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split(":", 1)[0])
    parser.add_argument("--runs", type=int, default=7, help="[%(default)s]")
    runs = parser.parse_args().runs
    if os.geteuid() != 0:
        sys.exit("mounting takes root")
    with tempfile.TemporaryDirectory(prefix="startup-") as name:
        directory = Path(name)
        with registry_with_the_standard_library(directory) as (image, size):
            mounting = Mounting(image, directory)
            backend = mounting.backend()  # and every file of Python's is in the page cache
            console.print(f"an image of {size / 1e6:.0f} MB, {backend} back end, {runs} runs")
            helps, mounts = [], []
            for _ in range(runs):
                helps.append(seconds_of_help())
                mounts.append(mounting.seconds())
            within = show_times(mounts, helps, Bars.of_this_kernel())
            show_imports(mounting.imports())
    sys.exit(0 if within else 1)


if __name__ == "__main__":
    main()
