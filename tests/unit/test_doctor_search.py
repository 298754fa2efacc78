"""How the doctor looks at directories, processes and devices."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path

from twisted.trial.unittest import SynchronousTestCase

from erofs_twisted.doctor import survey
from erofs_twisted.doctor.remains import Remains
from erofs_twisted.doctor.search import Opened, daemon_of, look_for_remains, users_of
from erofs_twisted.doctor.survey import filesystem_of, is_loadable, look_at_cache, look_at_state
from erofs_twisted.state.journal import Journal
from erofs_twisted.state.records import record_name

NAME = record_name("/mnt")


class RemainsTests(SynchronousTestCase):
    def setUp(self) -> None:
        self.state_dir = Path(self.mktemp()).absolute()
        self.here = Path(self.mktemp()).absolute()
        self.here.mkdir()

    def look(self) -> Remains:
        return look_for_remains(self.state_dir, None, self.here)

    def home(self, name: str = NAME) -> Path:
        path = self.state_dir / name
        path.mkdir(parents=True, exist_ok=True)
        return path

    def lock(self, directory: Path) -> None:
        descriptor = os.open(directory, os.O_RDONLY)
        self.addCleanup(os.close, descriptor)
        fcntl.flock(descriptor, fcntl.LOCK_EX)

    def test_where_there_is_no_directory_there_is_nothing(self) -> None:
        seen = self.look()
        self.assertEqual(([], [], [], []), (seen.records, seen.damaged, seen.vacant, seen.sockets))
        self.assertIsNone(seen.devices)

    def test_a_record_is_served_as_long_as_its_daemon_is_the_process_that_it_was(self) -> None:
        state = Journal(self.state_dir).claim("/nowhere/mnt", "registry.example/app")
        self.addCleanup(state.release)
        (before,) = self.look().records
        state.update(pid_started=state.record.pid_started - 1)
        (after,) = self.look().records
        self.assertEqual((True, False), (before.is_served, after.is_served))
        self.assertIsNone(before.plan)
        self.assertIsNotNone(after.plan)

    def test_what_a_dead_daemon_left_of_nbd_is_not_told_without_the_driver(self) -> None:
        state = Journal(self.state_dir).claim("/nowhere/mnt", "registry.example/app")
        self.addCleanup(state.release)
        state.update(pid_started=0, backend="nbd", identifier="ours")
        (found,) = self.look().records
        self.assertEqual((None, True), (found.plan, bool(found.problem)))

    def test_records_that_cannot_be_read_are_told_from_those_set_aside_and_those_in_use(self) -> None:
        (self.home() / "record.json").write_text("{")
        (self.home("b") / "record.damaged").write_text("{")
        (self.home("c") / "record.json").write_text("[]")
        self.lock(self.home("c"))
        seen = {Path(each.path).parent.name: (each.is_aside, each.is_held) for each in self.look().damaged}
        self.assertEqual({NAME: (False, False), "b": (True, False), "c": (False, True)}, seen)

    def test_directories_of_mounts_with_nothing_in_them_are_vacant_unless_held(self) -> None:
        self.home()
        self.home("somebody-elses")
        self.assertEqual([str(self.home())], self.look().vacant)
        self.lock(self.home())
        self.assertEqual([], self.look().vacant)
        self.home(record_name("/other")).joinpath("log").touch()
        self.assertEqual([], self.look().vacant)

    def test_a_directory_of_nbdfuse_is_served_as_long_as_it_is_held(self) -> None:
        directory = self.home() / "fuse-abc"
        directory.mkdir()

        def look() -> list[bool | None]:
            return [each.is_served for each in self.look().fuse if each.path == str(directory)]

        self.assertEqual([False], look())
        self.lock(directory)
        self.assertEqual([True], look())

    def test_a_pidfile_names_a_process_or_none_and_no_argument_of_it_is_shown(self) -> None:
        (self.here / "twistd.pid").write_text(f"{os.getpid()}\n")
        self.home()
        (self.state_dir / "gone.pid").write_text("4194305")
        (self.state_dir / "not.pid").write_text("secret")
        gone, ours = self.look().pidfiles
        self.assertEqual((4194305, ""), (gone.pid, gone.command))
        self.assertEqual(Path("/proc/self/comm").read_text().strip(), ours.command)


class ProcessTests(SynchronousTestCase):
    def test_the_users_of_a_device_are_those_who_have_it_open(self) -> None:
        opened = [Opened(9, "/dev/nbd977"), Opened(8, "/dev/nbd97"), Opened(9, "/dev/nbd977")]
        self.assertEqual(("process 9",), users_of("/dev/nbd977", opened))

    def test_a_daemon_is_who_holds_the_directory_of_the_mounts_name_wherever_it_is(self) -> None:
        identifier = f"application/vnd.erofs sha256:{64 * 'a'} {NAME}"
        opened = [Opened(8, f"/a/{NAME}x"), Opened(9, f"/a/{NAME}")]
        self.assertEqual(9, daemon_of(identifier, opened))
        self.assertEqual(0, daemon_of(identifier, opened[:1]))
        self.assertEqual(0, daemon_of("theirs", [Opened(9, "/a/")]))


class PlaceTests(SynchronousTestCase):
    def setUp(self) -> None:
        self.path = Path(self.mktemp()).absolute()

    def test_a_cache_that_is_made_yet_is_tried_above_it_and_nothing_stays(self) -> None:
        self.path.mkdir()
        place = look_at_cache(self.path / "a" / "b")
        self.assertEqual(("", False), (place.problem, place.is_there))
        self.assertGreater(place.room, 0)
        self.assertIsNotNone(place.is_sparse)
        self.assertEqual([], os.listdir(self.path))

    def test_a_cache_that_others_may_write_to_cannot_be_used(self) -> None:
        self.path.mkdir()
        self.path.chmod(0o777)
        self.assertIn("others may write", look_at_cache(self.path).problem)
        self.path.chmod(0o700)
        self.assertEqual("", look_at_cache(self.path).problem)

    def test_a_file_in_the_way_is_no_directory(self) -> None:
        self.path.write_text("")
        for look in (look_at_cache, look_at_state):
            for path in (self.path, self.path / "below"):
                self.assertIn("Not a directory", look(path).problem)

    def test_nor_is_a_link_that_leads_nowhere(self) -> None:
        self.path.symlink_to("/nowhere/at/all")
        for look in (look_at_cache, look_at_state):
            self.assertIn("Not a directory", look(self.path).problem)

    def test_a_state_directory_that_others_may_write_to_is_not_trusted(self) -> None:
        self.path.mkdir()
        self.path.chmod(0o770)
        self.assertIn("others may write", look_at_state(self.path).problem)
        self.path.chmod(0o700)
        self.assertEqual("", look_at_state(self.path).problem)
        self.assertEqual("", look_at_state(self.path / "made-yet").problem)

    def test_the_file_system_is_that_of_the_nearest_mount_above(self) -> None:
        self.assertEqual("proc", filesystem_of(Path("/proc/self")))
        self.assertNotEqual("proc", filesystem_of(Path("/process")))

    def test_without_modprobe_it_cannot_be_told_what_it_would_load(self) -> None:
        self.patch(os, "environ", {**os.environ, "PATH": "/nowhere"})
        self.assertIsNone(is_loadable("nbd"))

    def test_a_unit_that_starts_what_is_not_there_is_found_out(self) -> None:
        self.path.write_text("[Service]\nExecStart=/nowhere/twistd -n erofs-nbd\n")
        self.assertEqual("/nowhere/twistd", survey._missing_program(str(self.path)))
        self.path.write_text("[Service]\nExecStart=/bin/sh -c x\n")
        self.assertEqual("", survey._missing_program(str(self.path)))
