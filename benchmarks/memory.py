"""What ``erofs-nbd serve`` takes of memory after 1 GiB was read: ``python -m benchmarks.memory``.

nbdcopy reads a layer of that size from a registry on loopback, and then again from the cache.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from pathlib import Path

from rich.console import Console
from rich.table import Table

from tests.images import EROFS, Layout, build_erofs

PROJECT = Path(__file__).resolve().parents[1]
BIN = Path(sys.executable).parent
GIB = 1 << 30
MIB = 1 << 20
BAR = 80 * MIB
console = Console(highlight=False)


def one_gibibyte(directory: Path) -> Layout:
    """An image of one layer: a small EROFS image, and then what nobody has asked for."""
    (directory / "tree").mkdir()
    image = build_erofs(directory / "tree", directory / "image")
    with image.open("r+b") as file:
        file.truncate(GIB)
    layout = Layout(directory / "layout")
    layout.tag(layout.manifest([layout.blob(image, EROFS)]), "latest")
    image.unlink()
    return layout


def memory(pid: int) -> dict[str, int]:
    """``VmRSS`` and ``VmHWM`` (the most that it ever was), in bytes."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    fields = dict(line.split(":", 1) for line in lines)
    return {name: int(fields[name].split()[0]) * 1024 for name in ("VmRSS", "VmHWM")}


def copy(socket: Path) -> float:
    """Read all of it; seconds."""
    began = time.perf_counter()
    command = ["nbdcopy", f"--request-size={MIB}", f"nbd+unix:///?socket={socket}", "null:"]
    subprocess.run(command, check=True)
    return time.perf_counter() - began


def measure(directory: Path, port: int) -> bool:
    """Print a line for each stage; is the last within its bar?"""
    socket = directory / "socket"
    server = subprocess.Popen(
        [
            *(BIN / "erofs-nbd", "serve", f"127.0.0.1:{port}/demo/stdlib"),
            *(f"--socket={socket}", f"--cache-dir={directory / 'cache'}"),
        ],
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert server.stderr is not None
        server.stderr.readline()
        table = Table("", "seconds", "resident", "at most", box=None, header_style="bold")
        now = memory(server.pid)
        table.add_row("ready", "", mib(now["VmRSS"]), mib(now["VmHWM"]))
        for stage in ("1 GiB from the registry", "1 GiB from the cache"):
            seconds = copy(socket)
            now = memory(server.pid)
            table.add_row(stage, f"{seconds:.2f}", mib(now["VmRSS"]), mib(now["VmHWM"]))
    finally:
        server.terminate()
        server.wait()
    console.print(table)
    within = now["VmRSS"] <= BAR
    console.print(f"[green]within {mib(BAR)}[/green]" if within else f"[red]over {mib(BAR)}[/red]")
    return within


def mib(size: int) -> str:
    return f"{size / MIB:.0f} MiB"


def main() -> None:
    with tempfile.TemporaryDirectory(prefix="memory-") as name:
        directory = Path(name)
        layout = one_gibibyte(directory)
        command = [sys.executable, PROJECT / "examples" / "registry.py", layout.directory]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as registry:
            try:
                assert registry.stdout is not None
                within = measure(directory, int(registry.stdout.readline()))
            finally:
                registry.terminate()
    sys.exit(0 if within else 1)


if __name__ == "__main__":
    main()
