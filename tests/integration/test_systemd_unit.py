"""The systemd unit, as systemd reads it."""

from __future__ import annotations

import subprocess
from pathlib import Path

from tests.servers import tool

UNITS = Path(__file__).parents[2] / "etc" / "systemd"
UNIT = UNITS / "erofs-nbd@.service"
PROGRAMS = "/opt/erofs-twisted/bin"


def analyze(*arguments: str | Path) -> str:
    """What systemd-analyze says, on either channel."""
    command = [tool("systemd-analyze"), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    return done.stdout + done.stderr


def instance(directory: Path, text: str) -> Path:
    """An instance of the unit whose programs are there."""
    for name in ("twistd", "erofs-nbd"):
        (directory / name).symlink_to("/bin/true")
    path = directory / "erofs-nbd@app.service"
    path.write_text(text.replace(PROGRAMS, str(directory)))
    return path


def test_systemd_finds_nothing_wrong_with_the_unit(tmp_path: Path) -> None:
    said = analyze("verify", "--man=no", instance(tmp_path, UNIT.read_text()))
    assert [line for line in said.splitlines() if "erofs-nbd@" in line] == []


def test_systemd_finds_nothing_wrong_with_the_units_of_many_mounts(tmp_path: Path) -> None:
    instance(tmp_path, "")
    for name in ("erofs-nbd.socket", "erofs-nbd.service"):
        (tmp_path / name).write_text((UNITS / name).read_text().replace(PROGRAMS, str(tmp_path)))
    said = analyze("verify", "--man=no", tmp_path / "erofs-nbd.service", tmp_path / "erofs-nbd.socket")
    assert [line for line in said.splitlines() if "erofs-nbd." in line] == []


def test_systemd_would_say_what_is_wrong(tmp_path: Path) -> None:
    broken = UNIT.read_text().replace("KillMode=mixed", "KillMode=mixt")
    said = analyze("verify", "--man=no", instance(tmp_path, broken))
    assert "erofs-nbd@app.service" in said
    assert "mixt" in said


def system_calls(name: str) -> set[str]:
    """What a name in SystemCallFilter= stands for: itself, or a set that may hold others."""
    if not name.startswith("@"):
        return {name}
    members = [
        line.split()[0] for line in analyze("syscall-filter", name).splitlines() if line.startswith(" ")
    ]
    return {call for member in members if member != "#" for call in system_calls(member)}


def test_the_system_calls_that_serve_and_mount_are_allowed() -> None:
    (allowed,) = [line for line in UNIT.read_text().splitlines() if line.startswith("SystemCallFilter=")]
    calls = {call for name in allowed.partition("=")[2].split() for call in system_calls(name)}
    needed = {"mount", "umount2", "sendfile", "preadv2", "mincore", "mmap", "munmap", "fdatasync"}
    assert needed - calls == set()
