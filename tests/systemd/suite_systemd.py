"""The units, mount(8) and fstab under systemd itself, which is the first process of a guest here."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

from twisted.trial.unittest import SkipTest, SynchronousTestCase

from erofs_twisted.control.client import Daemon
from erofs_twisted.errors import MountError
from tests.daemon import is_mounted, mounts, nbd_devices_in_use, registry
from tests.processes import BIN, PROJECT, adopt_orphans, run, until
from tests.reading import Reader
from tests.scenery import BIG, scenery, sha256
from tests.warm import warm_process, warm_run

UNITS = Path("/etc/systemd/system")
CONFIGURATION = Path("/etc/erofs-twisted")
FSTAB = Path("/etc/fstab")
CONTROL = Path("/run/erofs-twisted/control")
SOCKET = "erofs-nbd.socket"
SERVICE = "erofs-nbd.service"
WATCHDOG = 4.0
"""Seconds until a daemon that hangs is replaced, here."""
REQUEUED = 2.5
PAUSE = 10.0
"""Seconds before a daemon is started again that said itself why it cannot go on."""


def install() -> None:
    """As docs/operating.md says it."""
    for unit in (PROJECT / "etc" / "systemd").iterdir():
        shutil.copy(unit, UNITS)
    Path("/opt/erofs-twisted").symlink_to(BIN.parent)
    for name in ("mount.erofs-nbd", "umount.erofs-nbd"):
        Path("/sbin", name).symlink_to(f"/opt/erofs-twisted/bin/{name}")
    CONFIGURATION.mkdir()
    for unit in (SERVICE, "erofs-nbd@.service"):
        drop_in = UNITS / f"{unit}.d"
        drop_in.mkdir()
        # A test hangs for seconds, not for a minute.
        (drop_in / "test.conf").write_text(f"[Service]\nWatchdogSec={WATCHDOG}s\n")


class SystemdTestCase(SynchronousTestCase):
    def setUp(self) -> None:
        if Path("/proc/1/comm").read_text().strip() != "systemd":
            raise SkipTest("systemd is not the first process here: tests/kernel/run --systemd")
        if not Path("/opt/erofs-twisted").exists():
            install()
        adopt_orphans()
        warm_process()
        self.registry = registry()
        self.directory = Path(tempfile.mkdtemp(prefix="systemd-"))
        self.began = time.time()
        self.systemctl("daemon-reload")
        self.systemctl("start", SOCKET)
        self.addCleanup(self.end)

    def end(self) -> None:
        """Nothing is left: no mount or device, no unit that failed; and no process where no daemon runs."""
        self.assertEqual([], [mount.path for mount in mounts() if mount.path.startswith(str(self.directory))])
        # What umount(8) unmounts, the daemon gives back a moment later.
        until("its devices are free", lambda: not nbd_devices_in_use())
        if self.property(SERVICE, "ActiveState") == "inactive":
            self.assertEqual("", run("pgrep", "-f", "twistd .*erofs-nbd|nbdfuse").stdout)
        self.assertEqual("", run("systemctl", "--failed", "--plain", "--no-legend").stdout)

    def systemctl(self, *words: str) -> str:
        done = run("systemctl", *words)
        self.assertEqual(0, done.returncode, f"systemctl {words}: {done.stderr}\n{self.journal()}")
        return done.stdout

    def property(self, unit: str, name: str) -> str:
        return self.systemctl("show", "--value", "--property", name, unit).strip()

    def journal(self, *words: str) -> str:
        """What was logged since the test began."""
        return run("journalctl", "--no-pager", f"--since=@{self.began:.0f}", *words).stdout

    def erofs_nbd(self, *words: str | Path) -> subprocess.CompletedProcess[str]:
        return warm_run(BIN / "erofs-nbd", *words, cwd=self.directory)

    def mount(self, name: str, *options: str) -> Path:
        """By the command line, from the daemon of systemd."""
        path = self.directory / name
        done = self.erofs_nbd("mount", self.registry.image(name), path, "--mkdir", *options)
        self.assertEqual(0, done.returncode, f"{done.stderr}\n{self.journal()}")
        return path

    def umount(self, path: Path) -> None:
        done = self.erofs_nbd("umount", path)
        self.assertEqual((0, ""), (done.returncode, done.stderr))

    def reader(self, path: Path) -> Reader:
        reader = Reader(path / BIG, scenery().tree / BIG, 1)
        self.addCleanup(reader.kill)
        return reader

    def assert_whole(self, path: Path) -> None:
        self.assertEqual(sha256(scenery().tree / BIG), sha256(path / BIG))

    def status(self) -> dict[str, Any]:
        """The daemon's own, below its parent."""
        return dict(Daemon(CONTROL).status())

    def until_another_serves(self, pid: int) -> None:
        def serves() -> bool:
            with contextlib.suppress(MountError):  # it was killed while it was asked
                return bool(self.status()["pid"] != pid)
            return False

        until("another daemon answers", serves)


class ServiceTests(SystemdTestCase):
    """One daemon, many mounts."""

    def test_the_first_mount_starts_the_daemon_and_its_socket_outlives_it(self) -> None:
        self.systemctl("stop", SERVICE)
        for name in ("one", "two"):
            path = self.mount(name)
            self.assertEqual("active", self.property(SERVICE, "ActiveState"))
            self.assert_whole(path)
            self.systemctl("stop", SERVICE)
            self.assertFalse(is_mounted(path))
            self.assertEqual("active", self.property(SOCKET, "ActiveState"))
            self.assertEqual("success", self.property(SERVICE, "Result"))

    def test_readers_go_on_when_the_daemon_or_its_parent_is_killed(self) -> None:
        path = self.mount("killed")
        self.assertEqual("listening on /run/erofs-twisted/control", self.property(SERVICE, "StatusText"))
        reader = self.reader(path)
        pid, restarts = self.status()["pid"], int(self.property(SERVICE, "NRestarts"))
        os.kill(pid, signal.SIGKILL)
        self.until_another_serves(pid)
        self.assertEqual(f"{restarts}", self.property(SERVICE, "NRestarts"), "its parent had the next one")
        time.sleep(REQUEUED)
        pid = self.status()["pid"]
        os.kill(int(self.property(SERVICE, "MainPID")), signal.SIGKILL)
        self.until_another_serves(pid)
        self.assertEqual(f"{restarts + 1}", self.property(SERVICE, "NRestarts"))
        time.sleep(REQUEUED)
        self.assertGreater(reader.end()["reads"], 0)
        self.umount(path)

    def test_a_daemon_that_hangs_is_replaced_by_the_watchdog(self) -> None:
        path = self.mount("hung")
        reader = self.reader(path)
        pid = self.status()["pid"]
        os.kill(pid, signal.SIGSTOP)
        self.until_another_serves(pid)
        self.assertIn("Watchdog timeout", self.journal("--unit", SERVICE))
        time.sleep(REQUEUED)
        self.assertGreater(reader.end()["reads"], 0)
        self.umount(path)

    def test_an_upgrade_is_no_restart(self) -> None:
        path = self.mount("upgraded")
        reader = self.reader(path)
        before, main = self.status(), self.property(SERVICE, "MainPID")
        restarts = self.property(SERVICE, "NRestarts")
        done = self.erofs_nbd("upgrade")
        self.assertEqual((0, ""), (done.returncode, done.stderr))
        self.assertNotEqual(before["instance"], self.status()["instance"])
        self.assertEqual(main, self.property(SERVICE, "MainPID"))
        self.assertEqual("active", self.property(SERVICE, "ActiveState"))
        time.sleep(WATCHDOG + 1)
        self.assertEqual(restarts, self.property(SERVICE, "NRestarts"), "the watchdog hears of the next one")
        self.assertGreater(reader.end()["reads"], 0)
        self.umount(path)

    def test_with_the_fuse_back_end_a_stop_unmounts_before_nbdfuse_ends(self) -> None:
        path = self.mount("fused", "--attach", "fuse")
        self.assert_whole(path)
        self.systemctl("stop", SERVICE)
        self.assertEqual("success", self.property(SERVICE, "Result"))
        self.assertNotIn("Traceback", self.journal())

    def test_options_that_are_wrong_are_said_and_it_is_not_started_over_and_over(self) -> None:
        self.systemctl("stop", SERVICE)
        (CONFIGURATION / "service.conf").write_text("OPTIONS=--cache-size much\n")
        self.addCleanup(self.systemctl, "reset-failed", SERVICE)
        self.addCleanup(self.systemctl, "stop", SERVICE)
        self.addCleanup((CONFIGURATION / "service.conf").unlink)
        began = time.monotonic()
        self.assertEqual(1, run("systemctl", "start", SERVICE).returncode)
        self.assertGreater(time.monotonic() - began, PAUSE, "before it is tried again")
        said = self.journal("--unit", SERVICE)
        self.assertIn("--cache-size: 'much' is not a size above 0", said)
        self.assertNotIn("Traceback", said)


class InstanceTests(SystemdTestCase):
    """A unit for a mount."""

    def configure(self, name: str, **more: str) -> Path:
        path = self.directory / name
        path.mkdir()
        values = {"IMAGE": self.registry.image(name), "MOUNTPOINT": str(path), **more}
        text = "".join(f"{key}={value}\n" for key, value in values.items())
        (CONFIGURATION / f"{name}.conf").write_text(text)
        return path

    def test_it_is_active_when_the_mount_can_be_used_and_unmounts_when_it_is_stopped(self) -> None:
        path = self.configure("app", OPTIONS="--fill off")
        self.systemctl("start", "erofs-nbd@app")
        self.assert_whole(path)
        reader = self.reader(path)
        main = self.property("erofs-nbd@app", "MainPID")
        os.kill(int(main), signal.SIGKILL)
        until("it is restarted", lambda: self.property("erofs-nbd@app", "NRestarts") == "1")
        until("it is up", lambda: self.property("erofs-nbd@app", "ActiveState") == "active")
        time.sleep(REQUEUED)
        self.assertGreater(reader.end()["reads"], 0)
        self.systemctl("stop", "erofs-nbd@app")
        self.assertEqual("success", self.property("erofs-nbd@app", "Result"))

    def test_an_image_that_is_not_there_is_said_by_systemctl_and_in_the_journal(self) -> None:
        self.configure("none", IMAGE=self.registry.image("none", "nosuchtag"))
        failed = run("systemctl", "start", "erofs-nbd@none")
        self.addCleanup(run, "systemctl", "reset-failed", "erofs-nbd@none")
        self.assertEqual(1, failed.returncode)
        self.assertIn("nosuchtag", self.journal("--unit", "erofs-nbd@none"))
        self.systemctl("stop", "erofs-nbd@none")


class FstabTests(SystemdTestCase):
    def fstab(self, name: str, options: str) -> tuple[Path, str]:
        """A line of it, its mount point, and the unit that systemd makes of that."""
        path = self.directory / name
        path.mkdir()
        FSTAB.write_text(f"{self.registry.image(name)} {path} erofs-nbd {options} 0 0\n")
        self.addCleanup(self.systemctl, "daemon-reload")
        self.addCleanup(FSTAB.write_text, "")
        self.systemctl("daemon-reload")
        return path, run("systemd-escape", "--path", "--suffix=mount", path).stdout.strip()

    def test_a_line_is_a_unit_that_mounts_and_unmounts(self) -> None:
        path, unit = self.fstab("line", "_netdev,nofail,fill=off")
        self.systemctl("start", "remote-fs.target", unit)
        self.assert_whole(path)
        self.assertEqual("active", self.property(SERVICE, "ActiveState"), "it is the daemon of systemd")
        self.systemctl("stop", unit)
        self.assertFalse(is_mounted(path))

    def test_what_is_unmounted_by_hand_is_no_failure_of_the_unit(self) -> None:
        path, unit = self.fstab("hand", "_netdev,fill=off")
        self.systemctl("start", unit)
        self.assertEqual(0, run("umount", path).returncode)
        until("systemd knows", lambda: self.property(unit, "ActiveState") == "inactive")

    def test_what_cannot_be_mounted_fails_the_unit_with_the_reason_in_the_journal(self) -> None:
        path, unit = self.fstab("gone", "_netdev,oci.layer=7")
        self.assertNotEqual(0, run("systemctl", "start", unit).returncode)
        self.assertIn("layer", self.journal("--unit", unit))
        self.systemctl("reset-failed", unit)
        self.assertFalse(is_mounted(path))

    def test_an_automount_mounts_at_the_first_access_each_time(self) -> None:
        path, unit = self.fstab("auto", "x-systemd.automount,_netdev,fill=off")
        automount = unit.replace(".mount", ".automount")
        self.systemctl("start", automount)
        self.addCleanup(self.systemctl, "stop", automount)
        for _ in range(2):
            self.assertEqual("inactive", self.property(unit, "ActiveState"))
            self.assert_whole(path)
            self.assertEqual("active", self.property(unit, "ActiveState"))
            self.systemctl("stop", unit)
        self.systemctl("stop", automount)
