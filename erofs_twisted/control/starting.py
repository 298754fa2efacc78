"""Having a daemon listen where none does."""

from __future__ import annotations

import subprocess
import time
from pathlib import Path

from erofs_twisted.control.client import SOCKET, Daemon
from erofs_twisted.control.errors import NoDaemon
from erofs_twisted.errors import MountError
from erofs_twisted.options import read_state_dir
from erofs_twisted.process import TWISTD

SYSTEMD = Path("/run/systemd/system")
"""There where systemd runs this machine."""
UNIT = "erofs-nbd.service"
PATIENCE = 60.0
"""Seconds for a daemon that was started to listen."""
POLL = 0.05


def start_daemon(state_dir: Path) -> None:
    """Have one listen in ``state_dir``: systemd's own where it has one, else one without. Raises
    `MountError`."""
    if SYSTEMD.is_dir() and state_dir == read_state_dir({}) and _unit_is_there():
        command = ["systemctl", "start", UNIT]
    else:
        state_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
        log = f"--logfile={state_dir / 'daemon.log'}"
        command = [*TWISTD, "--pidfile=", log, "erofs-nbd", f"--state-dir={state_dir}"]
    done = subprocess.run(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd="/",
    )
    if done.returncode != 0:
        raise MountError(f"no daemon can be started ({command[0]}): {done.stdout.strip()}")
    deadline = time.monotonic() + PATIENCE
    while True:
        try:
            Daemon(state_dir / SOCKET).status()
            return
        except NoDaemon:
            if time.monotonic() > deadline:
                raise
            time.sleep(POLL)


def _unit_is_there() -> bool:
    return subprocess.run(["systemctl", "cat", UNIT], capture_output=True, check=False).returncode == 0
