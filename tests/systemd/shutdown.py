"""A machine with systemd that is shut down while mounts are read: does it come to an end, and soon?

python -m tests.systemd.shutdown          boots a guest that runs this with --guest, and looks at its end
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tests.daemon import mounts, registry
from tests.processes import PROJECT, run, until
from tests.scenery import BIG
from tests.systemd.suite_systemd import FSTAB, SERVICE, SOCKET, install

LONGEST = 30.0
"""Seconds for a shutdown: services, mounts, and what is left of processes."""
BOOT_AND_MOUNT = 120


def begin_to_read() -> None:
    """Two mounts, by fstab and by the command line, each with a reader of its own unit. They are left so."""
    install()
    directory = Path(tempfile.mkdtemp(prefix="shutdown-"))
    by_fstab, by_hand = directory / "fstab", directory / "hand"
    by_fstab.mkdir()
    FSTAB.write_text(f"{registry().image('one')} {by_fstab} erofs-nbd _netdev,nofail 0 0\n")
    unit = run("systemd-escape", "--path", "--suffix=mount", by_fstab).stdout.strip()
    for command in (
        ("systemctl", "daemon-reload"),
        ("systemctl", "start", SOCKET, unit),
        ("/opt/erofs-twisted/bin/erofs-nbd", "mount", registry().image("two"), by_hand, "--mkdir"),
        *(
            (
                "systemd-run",
                "--quiet",
                "bash",
                "-c",
                f"exec <{path / BIG}; while :; do cat {path / BIG}; done",
            )
            for path in (by_fstab, by_hand)
        ),
    ):
        run(*command, check=True)
    until("both are read", lambda: len(run("pgrep", "-f", f"exec <{directory}").stdout.split()) == 2)
    assert {str(by_fstab), str(by_hand)} <= {mount.path for mount in mounts()}
    assert run("systemctl", "is-active", SERVICE).stdout == "active\n"
    print("going down", flush=True)
    # The registry goes down with this process, as the network does with the machine.
    os._exit(0)


def main() -> None:
    command = [PROJECT / "tests/kernel/run", "--systemd", "--seconds", f"{BOOT_AND_MOUNT + LONGEST:.0f}"]
    guest = subprocess.Popen(
        [*command, "--shell", sys.executable, "-m", "tests.systemd.shutdown", "--guest"],
        stdout=subprocess.PIPE,
        text=True,
        cwd=PROJECT,
    )
    assert guest.stdout is not None
    said = guest.stdout.readline()
    began = time.monotonic()
    status = guest.wait()
    took = time.monotonic() - began
    print(f"{said.strip()}: the guest has ended after {took:.1f} s with status {status}")
    if (said, status) != ("going down\n", 0) or took > LONGEST:
        sys.exit(f"it should have said 'going down', and ended well within {LONGEST:g} s")


if __name__ == "__main__":
    begin_to_read() if sys.argv[1:] == ["--guest"] else main()
