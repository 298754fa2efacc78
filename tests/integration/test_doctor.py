"""What the doctor finds and repairs on this machine: daemons of the fuse back end, sockets, registries."""

from __future__ import annotations

import json
import shutil
import signal
import socket
import subprocess
from pathlib import Path
from typing import Any

from erofs_twisted.state.journal import Journal
from tests.daemon import Daemon, DaemonTestCase, mount_of
from tests.processes import BIN, run
from tests.scenery import BIG, contents, scenery


class DoctorTestCase(DaemonTestCase):
    attach = "fuse"

    def run_doctor(self, state_dir: Path, *words: str, **more: Any) -> subprocess.CompletedProcess[str]:
        done = run(
            *(BIN / "erofs-nbd", "doctor", *words, "--state-dir", state_dir),
            *("--cache-dir", self.directory / "doctors-cache"),
            cwd=self.directory,
            **more,
        )
        self.assertNotIn("Traceback", done.stderr)
        return done

    def doctor(self, state_dir: Path, *words: str, **more: Any) -> dict[str, Any]:
        """What it says for programs; its exit status is as it says. Other tests on this machine may have
        something bad at the same time."""
        done = self.run_doctor(state_dir, "--json", *words, **more)
        found: dict[str, Any] = json.loads(done.stdout)
        bad = sum(finding["level"] == "bad" for finding in found["findings"])
        self.assertEqual((bad, int(bad > 0)), (found["bad"], done.returncode))
        return found

    def levels(self, found: dict[str, Any], subject: object) -> list[str]:
        return [each["level"] for each in found["findings"] if each["subject"] == str(subject)]

    def text(self, found: dict[str, Any], subject: object) -> str:
        return "\n".join(each["text"] for each in found["findings"] if each["subject"] == str(subject))

    def done(self, found: dict[str, Any]) -> list[tuple[str, str]]:
        self.assertEqual([], [each["problem"] for each in found["repairs"] if each["problem"]])
        return [(each["act"], each["target"]) for each in found["repairs"]]


class FuseTests(DoctorTestCase):
    def kill(self, daemon: Daemon) -> None:
        daemon.signal(signal.SIGKILL)
        self.assertEqual(-signal.SIGKILL, daemon.ended())
        daemon.pidfile.unlink()

    def test_a_mount_that_is_served_is_left_alone(self) -> None:
        daemon = self.mounted(self.registry.image("sound"))
        found = self.doctor(daemon.state_dir, "--fix")
        self.assertEqual((["ok"], []), (self.levels(found, daemon.mountpoint), found["repairs"]))
        # Also by one who has another state directory, and by one whose own has lost the record.
        for state_dir in (self.directory / "other", daemon.state_dir):
            found = self.doctor(state_dir, "--fix")
            self.assertEqual([], found["repairs"])
            for record in daemon.state_dir.glob("*/record.json"):
                record.unlink()
        self.assert_same(contents(scenery().tree), contents(daemon.mountpoint))
        daemon.signal(signal.SIGTERM)
        self.assert_ends_well(daemon)

    def test_a_mount_whose_daemon_was_killed_is_unmounted_and_forgotten(self) -> None:
        daemon = self.mounted(self.registry.image("killed"))
        self.kill(daemon)
        found = self.doctor(daemon.state_dir)
        self.assertEqual(["bad"], self.levels(found, daemon.mountpoint))
        self.assertIsNotNone(mount_of(daemon))
        where = str(daemon.mountpoint)
        found = self.doctor(daemon.state_dir, "--fix")
        self.assertEqual([("unmount", where), ("forget", where)], self.done(found))
        self.assertEqual([], self.levels(found, where))
        self.assert_nothing_left(daemon)

    def test_so_is_one_that_is_not_on_record_any_more(self) -> None:
        daemon = self.mounted(self.registry.image("unknown"))
        self.kill(daemon)
        (record,) = daemon.state_dir.glob("*/record.json")
        record.unlink()
        elsewhere = self.doctor(self.directory / "other", "--fix")
        self.assertEqual((["bad"], []), (self.levels(elsewhere, daemon.mountpoint), elsewhere["repairs"]))
        found = self.doctor(daemon.state_dir, "--fix")
        acts = [("unmount", str(daemon.mountpoint)), ("clear", str(record.parent))]
        self.assertEqual(acts, self.done(found))
        self.assert_nothing_left(daemon)

    def test_the_record_stays_as_long_as_somebody_has_a_file_open(self) -> None:
        daemon = self.mounted(self.registry.image("open"))
        with (daemon.mountpoint / BIG).open("rb"):
            self.kill(daemon)
            found = self.doctor(daemon.state_dir, "--fix")
            problems = [each["problem"] for each in found["repairs"]]
            self.assertIsNone(problems[0])
            self.assertIn("is in use still", problems[1])
            self.assertEqual(["warning"], self.levels(found, daemon.mountpoint))
        found = self.doctor(daemon.state_dir, "--fix")
        self.assertEqual([("forget", str(daemon.mountpoint))], self.done(found))
        self.assert_nothing_left(daemon)

    def test_a_mount_that_failed_says_why_and_is_forgotten(self) -> None:
        daemon = self.start(self.registry.image("absent", "absent"))
        self.assertEqual(1, daemon.ended())
        found = self.doctor(daemon.state_dir)
        self.assertEqual(["warning"], self.levels(found, daemon.mountpoint))
        self.assertIn("absent", self.text(found, daemon.mountpoint))
        found = self.doctor(daemon.state_dir, "--fix")
        self.assertEqual([("forget", str(daemon.mountpoint))], self.done(found))
        self.assert_nothing_left(daemon)

    def test_a_daemon_that_is_stopped_is_told_and_how_it_goes_on(self) -> None:
        daemon = self.mounted(self.registry.image("stopped"))
        daemon.signal(signal.SIGSTOP)
        found = self.doctor(daemon.state_dir, "--fix")
        self.assertEqual((["bad"], []), (self.levels(found, daemon.mountpoint), found["repairs"]))
        daemon.signal(signal.SIGCONT)
        self.assertEqual(["ok"], self.levels(self.doctor(daemon.state_dir), daemon.mountpoint))
        daemon.signal(signal.SIGTERM)
        self.assert_ends_well(daemon)

    def test_a_mount_goes_on_without_its_state_directory(self) -> None:
        daemon = self.mounted(self.registry.image("bare", "plain"))
        shutil.rmtree(daemon.state_dir, ignore_errors=True)
        found = self.doctor(daemon.state_dir, "--fix")
        self.assertEqual(([], []), (self.levels(found, daemon.mountpoint), found["repairs"]))
        daemon.signal(signal.SIGTERM)
        self.assert_ends_well(daemon)

    def test_sockets_that_nobody_listens_on_are_removed_and_others_stay(self) -> None:
        state_dir = self.directory / "state"
        state_dir.mkdir(mode=0o700)
        with socket.socket(socket.AF_UNIX) as dead, socket.socket(socket.AF_UNIX) as alive:
            for name, sock in (("dead", dead), ("alive", alive)):
                sock.bind(str(state_dir / name))
            alive.listen()
            dead.close()
            found = self.doctor(state_dir, "--fix")
            self.assertEqual([("unlink", str(state_dir / "dead"))], self.done(found))
            self.assertEqual(["alive"], [path.name for path in state_dir.iterdir()])

    def test_a_damaged_record_is_said_and_stays(self) -> None:
        path = Journal(self.directory / "state").directory("/srv/app")
        path.mkdir(parents=True, mode=0o700)
        (path / "record.json").write_text("{")
        found = self.doctor(self.directory / "state", "--fix")
        self.assertEqual((["warning"], []), (self.levels(found, path / "record.json"), found["repairs"]))
        self.assertEqual("{", (path / "record.json").read_text())

    def test_the_table_says_what_was_done_and_what_there_is(self) -> None:
        daemon = self.mounted(self.registry.image("shown"))
        self.kill(daemon)
        done = self.run_doctor(daemon.state_dir)
        self.assertEqual(1, done.returncode)
        self.assertIn(f"→ erofs-nbd umount --lazy {daemon.mountpoint}", done.stdout)
        self.assertIn("bad", done.stderr)
        done = self.run_doctor(daemon.state_dir, "--fix")
        self.assertIn(f"unmounted {daemon.mountpoint}, lazily\n", done.stdout)
        self.assertIn(f"forgot what was on record of {daemon.mountpoint}\n", done.stdout)
        self.assert_nothing_left(daemon)

    def test_who_may_not_mount_is_told_and_may_repair_nothing(self) -> None:
        unshared = (shutil.which("setpriv") or "setpriv", "--bounding-set=-all", "--inh-caps=-all")
        command = [*unshared, str(BIN / "erofs-nbd"), "doctor", "--state-dir", str(self.directory / "state")]
        done = run(*command, "--json", cwd=self.directory)
        found = json.loads(done.stdout)
        self.assertEqual((1, ["bad"]), (done.returncode, self.levels(found, "privileges")))
        self.assertEqual(["unknown"], self.levels(found, "devices"))
        refused = run(*command, "--fix", cwd=self.directory)
        self.assertEqual((1, ""), (refused.returncode, refused.stdout))
        self.assertIn("--fix takes root", refused.stderr)


class ImageTests(DoctorTestCase):
    def ask(self, image: str, *words: str, **more: Any) -> dict[str, Any]:
        return self.doctor(self.directory / "state", image, *words, **more)

    def test_a_registry_that_does_all_is_well_and_nothing_is_kept(self) -> None:
        found = self.ask(self.registry.image("app"))
        self.assertIn(scenery().manifests["lz4"]["digest"], self.text(found, "image"))
        self.assertEqual((["ok"], ["ok"]), (self.levels(found, "layer"), self.levels(found, "ranges")))
        self.assertIn("LZ4", self.text(found, "layer"))
        self.assertFalse((self.directory / "doctors-cache").exists())

    def test_where_credentials_come_from_is_said_and_they_are_not(self) -> None:
        self.registry.set("private", user="alice:hunter2")
        image = self.registry.image("private")
        words = ("--username", "alice", "--password-file", "-")
        done = self.run_doctor(
            self.directory / "state", image, "--json", *words, stdin=None, input="hunter2\n"
        )
        found = json.loads(done.stdout)
        self.assertEqual((["ok"], ["ok"]), (self.levels(found, "image"), self.levels(found, "ranges")))
        self.assertIn("(--username, --oci)", self.text(found, "credentials"))
        self.assertNotIn("hunter2", done.stdout + done.stderr)
        refused = self.ask(image)
        self.assertEqual(["bad"], self.levels(refused, "image"))

    def test_a_registry_without_ranges_is_slow(self) -> None:
        self.registry.set("whole", {"kind": "blobs", "whole": True})
        found = self.ask(self.registry.image("whole"))
        self.assertEqual(["warning"], self.levels(found, "ranges"))
        self.assertEqual(["ok"], self.levels(found, "image"))

    def test_a_registry_that_is_down_is_bad(self) -> None:
        self.registry.go_down()
        self.addCleanup(self.registry.come_back)
        found = self.ask(self.registry.image("app"))
        self.assertEqual(["bad"], self.levels(found, "image"))

    def test_an_image_without_erofs_is_bad(self) -> None:
        for tag in ("tar", "torn"):
            found = self.ask(self.registry.image("app", tag))
            self.assertEqual((["ok"], ["bad"]), (self.levels(found, "image"), self.levels(found, "layer")))

    def test_one_of_several_layers_has_to_be_named(self) -> None:
        image = self.registry.image("app", "two")
        self.assertEqual(["bad"], self.levels(self.ask(image), "layer"))
        self.assertEqual(["ok"], self.levels(self.ask(image, "--layer", "1"), "layer"))

    def test_a_layout_on_disk_needs_no_registry(self) -> None:
        found = self.ask(f"oci:{scenery().layout}:lz4")
        self.assertEqual((["ok"], ["ok"]), (self.levels(found, "image"), self.levels(found, "ranges")))
