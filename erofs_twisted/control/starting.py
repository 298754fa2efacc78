"""Having a daemon listen where none does."""

from __future__ import annotations

import subprocess
import time
from pathlib import Path

from erofs_twisted.control import SOCKET
from erofs_twisted.control.client import Daemon
from erofs_twisted.control.errors import NoDaemon
from erofs_twisted.errors import MountError
from erofs_twisted.options import read_state_dir
from erofs_twisted.process import TWISTD, run_program

SYSTEMD = Path("/run/systemd/system")
"""There where systemd runs this machine."""
UNIT = "erofs-nbd.service"
PATIENCE = 60.0
"""Seconds for a daemon that was started to listen."""
POLL = 0.05


def have_daemon(state_dir: Path) -> Daemon:
    """The one that listens in ``state_dir``. Where there is none one is started: systemd's own where it has
    one, else one without. It blocks. Raises `MountError`."""
    daemon = Daemon(state_dir / SOCKET)
    try:
        daemon.status()
        return daemon
    except NoDaemon:
        _start(state_dir)
    deadline = time.monotonic() + PATIENCE
    while True:
        try:
            daemon.status()
            return daemon
        except NoDaemon:
            if time.monotonic() > deadline:
                raise
            time.sleep(POLL)


def _start(state_dir: Path) -> None:
    if SYSTEMD.is_dir() and state_dir == read_state_dir({}) and _unit_is_there():
        command = ["systemctl", "start", UNIT]
    else:
        state_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
        log = f"--logfile={state_dir / 'daemon.log'}"
        command = [*TWISTD, "--pidfile=", log, "erofs-nbd", f"--state-dir={state_dir}"]
    status, said = run_program(command)
    if status != 0:
        raise MountError(f"no daemon can be started ({command[0]}): {said}")


def _unit_is_there() -> bool:
    return subprocess.run(["systemctl", "cat", UNIT], capture_output=True, check=False).returncode == 0
