"""Which mounts have lost their daemon, and how new ones are started."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

from twisted.trial.unittest import SynchronousTestCase

from erofs_twisted import reattaching
from erofs_twisted.errors import MountError
from erofs_twisted.process import TWISTD
from erofs_twisted.reattaching import Orphan, failures, orphans_on_record, start
from erofs_twisted.state.journal import Journal
from erofs_twisted.state.takeover import Plan, Step


class ReattachingTestCase(SynchronousTestCase):
    def setUp(self) -> None:
        self.journal = Journal(Path(self.mktemp()))

    def orphan(self, path: str, **options: str | bool) -> None:
        """A mount whose daemon was killed."""
        state = self.journal.claim(path, "registry.example/app", options)
        state.update(pid_started=1)
        os.close(state._lock)


class OrphanTests(ReattachingTestCase):
    def test_those_whose_daemon_has_gone_are_found_and_no_others(self) -> None:
        self.orphan("/mnt/b")
        self.orphan("/mnt/a")
        served = self.journal.claim("/mnt/c", "registry.example/app")
        self.addCleanup(served.release)
        found = orphans_on_record(self.journal, None)
        self.assertEqual(["/mnt/a", "/mnt/b"], [record.mountpoint for record in found])
        (one,) = orphans_on_record(self.journal, "/mnt/b")
        self.assertEqual("/mnt/b", one.mountpoint)

    def test_one_that_is_served_is_none(self) -> None:
        served = self.journal.claim("/mnt", "registry.example/app")
        self.addCleanup(served.release)
        error = self.assertRaises(MountError, orphans_on_record, self.journal, "/mnt")
        self.assertEqual(f"/mnt is served, by process {os.getpid()}", str(error))

    def test_one_that_nobody_knows_is_an_error_that_names_where_was_looked(self) -> None:
        error = self.assertRaises(MountError, orphans_on_record, self.journal, "/mnt")
        self.assertIn(f"{self.journal.state_dir} (--state-dir)", str(error))

    def test_what_will_be_done_is_said_step_by_step(self) -> None:
        self.orphan("/mnt")
        (record,) = orphans_on_record(self.journal, None)
        orphan = Orphan(record, Plan((Step.ADOPT, Step.KEEP), "/dev/nbd7", 5))
        self.assertEqual(["serve /dev/nbd7 again", "leave /mnt mounted"], orphan.told())

    def test_errors_of_several_are_one_a_line(self) -> None:
        self.assertEqual("one\ntwo", str(failures([MountError("one"), MountError("two")])))


class StartTests(ReattachingTestCase):
    def setUp(self) -> None:
        super().setUp()
        self.orphan("/mnt", mountpoint="/mnt", fill="off", mkdir=True)
        (self.record,) = orphans_on_record(self.journal, None)
        self.commands: list[list[str]] = []
        self.status, self.output = 0, ""
        self.patch(subprocess, "run", self.run_command)
        self.waited: list[str] = []
        self.patch(reattaching, "wait_until_ready", lambda journal, path, timeout: self.waited.append(path))

    def run_command(self, command: list[str], **how: object) -> object:
        self.commands.append(command)
        return subprocess.CompletedProcess(command, self.status, stdout=self.output)

    def test_the_options_are_those_of_the_daemon_before_and_more(self) -> None:
        start(self.journal, self.record, {"username": "robot"}, 5.0)
        (command,) = self.commands
        options = command[command.index("erofs-nbd") + 1 :]
        self.assertEqual(["--mountpoint=/mnt", "--fill=off", "--mkdir", "--username=robot"], options)
        self.assertEqual([*TWISTD], command[: len(TWISTD)])
        self.assertEqual(["/mnt"], self.waited)

    def test_its_log_is_with_its_record(self) -> None:
        start(self.journal, self.record, {}, 5.0)
        self.assertIn(f"--logfile={self.journal.directory('/mnt')}/log", self.commands[0])

    def test_a_daemon_that_does_not_start_is_an_error_in_its_own_words(self) -> None:
        self.status, self.output = 1, "twistd erofs-nbd: --fill: no such choice\n"
        error = self.assertRaises(MountError, start, self.journal, self.record, {}, 5.0)
        self.assertEqual("/mnt: twistd erofs-nbd: --fill: no such choice", str(error))
        self.assertEqual([], self.waited)
