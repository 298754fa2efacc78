"""What this machine lets us do: privileges, and drivers that it has to load first. Blocks: for a thread."""

from __future__ import annotations

import subprocess
from pathlib import Path

CAP_SYS_ADMIN = 21
PATIENCE = 10.0
"""Seconds that modprobe may take."""


def may_administer() -> bool:
    """Does this process have CAP_SYS_ADMIN, as root has?"""
    for line in Path("/proc/self/status").read_text().splitlines():
        name, _, value = line.partition(":")
        if name == "CapEff":
            return bool(int(value, 16) >> CAP_SYS_ADMIN & 1)
    return False


def load_module(name: str, *parameters: str) -> str:
    """modprobe(8). Returns why not, in its words, or ''."""
    command = ["modprobe", name, *parameters]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        return str(error)
    return done.stderr.strip()


def knows_filesystem(name: str) -> bool:
    """Has this kernel the file system ``name``, by now or after loading it?"""
    if not lists_filesystem(name):
        load_module(name)
    return lists_filesystem(name)


def lists_filesystem(name: str) -> bool:
    """Has it that by now?"""
    lines = Path("/proc/filesystems").read_text().splitlines()
    return any(line.split("\t")[-1] == name for line in lines)
