"""What the doctor finds of daemons that were killed, on the kernel's own devices, and what it repairs."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
from pathlib import Path
from typing import Any

from erofs_twisted.device.driver import NBDDriver
from erofs_twisted.device.uapi import NBD_FLAG_HAS_FLAGS, NBD_FLAG_READ_ONLY, Connection
from erofs_twisted.state.records import record_name
from tests.daemon import DaemonTestCase, mount_of, nbd_devices_in_use
from tests.processes import BIN, run, until
from tests.scenery import contents, scenery
from tests.servers import tool
from tests.warm import warm_run

SIZE = 1 << 20


class DoctorTests(DaemonTestCase):
    attach = "nbd"
    is_warm = True

    def doctor(self, state_dir: Path, *words: str) -> tuple[int, dict[str, Any]]:
        """Its exit status, and what it says for programs."""
        done = warm_run(
            *(BIN / "erofs-nbd", "doctor", "--json", "--state-dir", state_dir),
            *("--cache-dir", self.directory / "doctors-cache", *words),
            cwd=self.directory,
        )
        self.assertNotIn("Traceback", done.stderr)
        return done.returncode, json.loads(done.stdout)

    def said_of(self, found: dict[str, Any], subject: object) -> dict[str, Any]:
        (finding,) = [each for each in found["findings"] if each["subject"] == str(subject)]
        return dict(finding)

    def done(self, found: dict[str, Any]) -> list[tuple[str, str]]:
        self.assertEqual([], [each["problem"] for each in found["repairs"] if each["problem"]])
        return [(each["act"], each["target"]) for each in found["repairs"]]

    def connect(self, identifier: str) -> tuple[str, socket.socket]:
        """A device whose server is this process, which answers nothing."""
        ours, kernels = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        connection = Connection(
            sockets=[kernels.fileno()],
            size=SIZE,
            block_size=4096,
            server_flags=NBD_FLAG_HAS_FLAGS | NBD_FLAG_READ_ONLY,
            timeout=0,
            dead_conn_timeout=300,
            backend_identifier=identifier,
        )
        attached = NBDDriver().attach(connection, {})
        kernels.close()
        self.addCleanup(ours.close)
        self.addCleanup(self._disconnect, attached.path)
        return attached.path, ours

    def _disconnect(self, path: str) -> None:
        driver = NBDDriver()
        driver.detach(driver.find(path))

    def orphan_identifier(self) -> str:
        digest = scenery().layers["lz4"]["digest"]
        return f"application/vnd.erofs {digest} {record_name(str(self.directory / 'gone'))}"

    def test_a_mount_whose_daemon_was_killed_gets_a_new_one_and_no_reader_notices(self) -> None:
        daemon = self.mounted(self.registry.image("killed"))
        status, found = self.doctor(daemon.state_dir)
        self.assertEqual((0, "ok"), (status, self.said_of(found, daemon.mountpoint)["level"]), found)
        self.kill(daemon)
        status, found = self.doctor(daemon.state_dir)
        said = self.said_of(found, daemon.mountpoint)
        self.assertEqual((1, "bad"), (status, said["level"]))
        self.assertIn("has died", said["text"])
        self.assertIn(f"erofs-nbd reattach {daemon.mountpoint}", said["cure"])
        reader = subprocess.Popen(
            ["cmp", daemon.mountpoint / "sizes" / "4097", scenery().tree / "sizes" / "4097"],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        self.addCleanup(reader.wait)
        status, found = self.doctor(daemon.state_dir, "--fix")
        self.assertEqual([("reattach", str(daemon.mountpoint))], self.done(found))
        self.assertEqual((0, "ok"), (status, self.said_of(found, daemon.mountpoint)["level"]))
        record = daemon.record()
        assert record is not None
        daemon.pid, daemon._status = record.pid, None
        self.assertEqual(0, reader.wait())
        self.assert_same(contents(scenery().tree), contents(daemon.mountpoint))
        daemon.signal(signal.SIGTERM)
        self.assert_ends_well(daemon)

    def test_a_device_that_nobody_serves_or_uses_is_disconnected(self) -> None:
        daemon = self.mounted(self.registry.image("orphan"))
        device = daemon.ready().device
        self.kill(daemon)
        shutil.rmtree(daemon.state_dir)
        # As long as it is mounted, it is only said.
        status, found = self.doctor(daemon.state_dir, "--fix")
        self.assertEqual((1, []), (status, found["repairs"]))
        self.assertIn(device, self.said_of(found, daemon.mountpoint)["text"])
        self.assertIsNotNone(mount_of(daemon))
        self.assertEqual(0, run("umount", daemon.mountpoint).returncode)
        with open(device, "rb"):
            # Nor while a program has it open.
            status, found = self.doctor(daemon.state_dir, "--fix")
            self.assertEqual((1, []), (status, found["repairs"]))
            self.assertIn(f"process {os.getpid()}", self.said_of(found, device)["text"])
        status, found = self.doctor(daemon.state_dir)
        self.assertEqual((1, "bad"), (status, self.said_of(found, device)["level"]))
        status, found = self.doctor(daemon.state_dir, "--fix")
        self.assertEqual((0, [("disconnect", device)]), (status, self.done(found)))
        self.assert_nothing_left(daemon)

    def test_a_device_on_record_that_is_mounted_nowhere_is_disconnected_and_forgotten(self) -> None:
        daemon = self.mounted(self.registry.image("unmounted"))
        device = daemon.ready().device
        self.kill(daemon)
        self.assertEqual(0, run("umount", daemon.mountpoint).returncode)
        status, found = self.doctor(daemon.state_dir, "--fix")
        self.assertEqual([("disconnect", device), ("forget", str(daemon.mountpoint))], self.done(found))
        self.assertEqual(0, status)
        self.assert_nothing_left(daemon)

    def test_a_mount_whose_device_is_gone_is_unmounted_and_the_directory_made_for_it_removed(self) -> None:
        daemon = self.daemon(self.registry.image("bereft"), "--mkdir")
        daemon.mountpoint.rmdir()
        daemon.start()
        device = daemon.ready().device
        self.kill(daemon)
        self.assertEqual(0, run(tool("nbd-client"), "-d", device).returncode)
        status, found = self.doctor(daemon.state_dir)
        self.assertEqual((1, "bad"), (status, self.said_of(found, daemon.mountpoint)["level"]))
        self.assertIsNotNone(mount_of(daemon))
        status, found = self.doctor(daemon.state_dir, "--fix")
        where = str(daemon.mountpoint)
        self.assertEqual((0, [("unmount", where), ("forget", where)]), (status, self.done(found)))
        self.assertFalse(daemon.mountpoint.exists())
        until("device", lambda: nbd_devices_in_use() == self._devices_before)
        self.assert_nothing_left(daemon)

    def test_without_a_record_too(self) -> None:
        daemon = self.mounted(self.registry.image("bereft"))
        device = daemon.ready().device
        self.kill(daemon)
        shutil.rmtree(daemon.state_dir)
        self.assertEqual(0, run(tool("nbd-client"), "-d", device).returncode)
        status, found = self.doctor(daemon.state_dir, "--fix")
        self.assertEqual((0, [("unmount", str(daemon.mountpoint))]), (status, self.done(found)))
        until("device", lambda: nbd_devices_in_use() == self._devices_before)
        self.assert_nothing_left(daemon)

    def test_a_device_of_somebody_else_is_left_alone(self) -> None:
        path, ours = self.connect("their own")
        ours.close()
        status, found = self.doctor(self.directory / "state", "--fix")
        self.assertEqual((0, []), (status, found["repairs"]))
        self.assertNotIn(path, [each["subject"] for each in found["findings"]])
        self.assertIn(Path(path).name, nbd_devices_in_use())

    def test_a_device_that_is_served_by_one_who_cannot_be_seen_is_left_alone(self) -> None:
        path, _ = self.connect(self.orphan_identifier())
        status, found = self.doctor(self.directory / "state", "--fix")
        self.assertEqual(1, status)
        (repair,) = found["repairs"]
        self.assertIn("is served", repair["problem"])
        self.assertIn(Path(path).name, nbd_devices_in_use())

    def test_a_daemon_of_another_state_directory_is_left_alone(self) -> None:
        daemon = self.mounted(self.registry.image("elsewhere"))
        status, found = self.doctor(self.directory / "other", "--fix")
        self.assertEqual((0, []), (status, found["repairs"]))
        said = self.said_of(found, daemon.ready().device)
        self.assertEqual("ok", said["level"])
        self.assertIn(f"process {daemon.pid}", said["text"])
        self.assert_same(contents(scenery().tree), contents(daemon.mountpoint))
        daemon.signal(signal.SIGTERM)
        self.assert_ends_well(daemon)

    def test_what_the_kernel_lacks_is_said(self) -> None:
        _, found = self.doctor(self.directory / "state")
        self.assertEqual("ok", self.said_of(found, "erofs")["level"])
        self.assertEqual("ok", self.said_of(found, "nbd")["level"])
        self.assertIn("LZ4", self.said_of(found, "compression")["text"])
