"""The main job, on real input: the Python standard library as an EROFS image, mounted from a registry.

Makes the image with mkfs.erofs, serves it from a registry on loopback, mounts it by the back end that this
machine has, compares every file with its source, and leaves nothing behind. Needs root, as mount(2) does.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import NoReturn

from pack import pack
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from erofs_twisted.mount.mountinfo import Mount, parse_mountinfo
from erofs_twisted.state.journal import process_started

PROJECT = Path(__file__).resolve().parents[1]
BIN = Path(sys.executable).parent
console = Console(highlight=False)


def main() -> None:
    if os.geteuid() != 0:
        give_up("mounting needs root; run 'sudo make demo'")
    with ExitStack() as undo:
        work = Path(undo.enter_context(tempfile.TemporaryDirectory(prefix="erofs-twisted-demo-")))
        source = Path(sysconfig.get_path("stdlib"))
        size = pack(source, work / "layout", "latest")["size"]
        files = sorted(regular_files(source))
        step(f"made an EROFS image of {source}: {len(files)} files, {mb(size)}")
        port = serve(work / "layout", undo)
        image = f"127.0.0.1:{port}/demo/stdlib:latest"
        step(f"a registry on loopback has it as {image}")
        mount(image, work, undo)
        compare(source, work / "mnt", files, work / "cache", size)
        unmount(work)


def regular_files(tree: Path) -> Iterator[Path]:
    """Their paths, from ``tree`` on."""
    for path in tree.rglob("*"):
        if path.is_file() and not path.is_symlink():
            yield path.relative_to(tree)


def serve(layout: Path, undo: ExitStack) -> int:
    """Start the example registry; its port."""
    registry = subprocess.Popen(
        [sys.executable, PROJECT / "examples" / "registry.py", layout], stdout=subprocess.PIPE, text=True
    )
    undo.callback(registry.wait)
    undo.callback(registry.terminate)
    assert registry.stdout is not None, "it is a pipe"
    return int(registry.stdout.readline() or give_up("the registry did not start"))


def mount(image: str, work: Path, undo: ExitStack) -> None:
    (work / "mnt").mkdir()
    state = ("--state-dir", work / "state")
    command = [BIN / "twistd", f"--pidfile={work}/daemon.pid", f"--logfile={work}/daemon.log", "erofs-nbd"]
    command += ["--image", image, "--mountpoint", work / "mnt", "--cache-dir", work / "cache", *state]
    console.print(f"  [dim]$ {' '.join(map(str, command))}[/dim]", soft_wrap=True)
    began = time.monotonic()
    run(*command)
    undo.callback(subprocess.run, [BIN / "erofs-nbd", "umount", work / "mnt", *state], capture_output=True)
    run(BIN / "erofs-nbd", "wait", work / "mnt", "--timeout", "60", *state)
    seconds = time.monotonic() - began
    step(f"usable after {seconds:.2f} s")
    why = [line for line in (work / "daemon.log").read_text().splitlines() if "attaching by" in line]
    step(why[0].partition("] ")[2])


def unmount(work: Path) -> None:
    """Unmount, and see that nothing is left."""
    daemon = int((work / "daemon.pid").read_text())
    run(BIN / "erofs-nbd", "umount", work / "mnt", "--state-dir", work / "state")
    left = [
        *(f"the mount of {mount.source}" for mount in mounts() if mount.path.startswith(str(work))),
        *(f"the daemon, process {pid}" for pid in [daemon] if process_started(pid) is not None),
        *(f"the file {path}" for path in (work / "state").iterdir()),
    ]
    if left:
        give_up(f"unmounted, but {' and '.join(left)} is left")
    step("unmounted: no mount, no device, no process is left")


def mounts() -> list[Mount]:
    return parse_mountinfo(Path("/proc/self/mountinfo").read_bytes())


def compare(source: Path, mountpoint: Path, files: list[Path], cache: Path, size: int) -> None:
    """Read every file through the mount, and hold its SHA-256 against its source's."""
    step(f"fetched so far: {fetched(cache, size)}")
    columns = (TextColumn("  {task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    different: list[Path] = []
    with Progress(*columns, console=console) as progress:
        for path in progress.track(files, description="comparing SHA-256"):
            if sha256(mountpoint / path) != sha256(source / path):
                different.append(path)
    if different:
        give_up(f"{len(different)} of {len(files)} files differ, the first is {different[0]}")
    step(f"all {len(files)} files are equal; fetched: {fetched(cache, size)}")


def fetched(cache: Path, size: int) -> str:
    """What the sparse files of the cache take on disk, which is what came from the registry."""
    on_disk = sum(path.stat().st_blocks * 512 for path in cache.rglob("*") if path.is_file())
    return f"{mb(min(on_disk, size))} of {mb(size)}"


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def mb(size: int) -> str:
    return f"{size / 1e6:.1f} MB"


def step(text: str) -> None:
    console.print(f"[green]✓[/green] {text}", soft_wrap=True)


def run(*command: str | Path) -> None:
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode != 0:
        give_up(f"{' '.join(map(str, command))} failed:\n{done.stdout}")


def give_up(reason: str) -> NoReturn:
    console.print(f"[red]✗[/red] {reason}", soft_wrap=True)
    sys.exit(1)


if __name__ == "__main__":
    main()
