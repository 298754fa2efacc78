"""Records of mounts, and the state directory that holds them."""

from __future__ import annotations

import errno
import os
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st
from twisted.trial.unittest import SynchronousTestCase

from erofs_twisted.errors import MountError
from erofs_twisted.files import UNFINISHED
from erofs_twisted.state.journal import Journal, MountState, daemon_runs, process_started
from erofs_twisted.state.records import MountRecord, RecordError, Status, record_name

texts = st.text(max_size=20)
records = st.builds(
    MountRecord,
    mountpoint=texts,
    image=texts,
    pid=st.integers(1, 2**22),
    pid_started=st.integers(0),
    status=st.sampled_from(Status),
    reason=texts,
    digest=texts,
    backend=texts,
    device=texts,
)


class RecordTests(SynchronousTestCase):
    @given(records)
    def test_a_record_survives_being_written_and_read(self, record: MountRecord) -> None:
        self.assertEqual(record, MountRecord.from_json(record.to_json()))

    @given(st.binary())
    def test_no_bytes_raise_anything_but_a_record_error(self, data: bytes) -> None:
        self.assertRaises(RecordError, MountRecord.from_json, data)

    @given(records, st.data())
    def test_a_record_without_one_of_its_fields_is_refused(
        self, record: MountRecord, data: st.DataObject
    ) -> None:
        field = data.draw(st.sampled_from(sorted(MountRecord.__annotations__)))
        damaged = record.to_json().replace(f'"{field}"'.encode(), b'"other"', 1)
        self.assertRaises(RecordError, MountRecord.from_json, damaged)

    def test_a_record_of_another_version_is_refused(self) -> None:
        record = MountRecord(mountpoint="/mnt", image="a", pid=1, pid_started=2)
        newer = record.to_json().replace(b'"version": 2', b'"version": 3')
        self.assertRaises(RecordError, MountRecord.from_json, newer)

    @given(st.text(), st.text())
    def test_a_name_is_a_short_file_name_of_one_mount_point(self, one: str, other: str) -> None:
        name = record_name(one)
        self.assertLessEqual(len(name), 33)
        self.assertNotIn("/", name)
        self.assertNotIn(name, ("", ".", ".."))
        self.assertEqual(one == other, name == record_name(other))


class DurabilityTests(SynchronousTestCase):
    """What is on disk when a call returns, as far as it is asked for."""

    def setUp(self) -> None:
        self.above = Path(self.mktemp()).absolute()
        self.above.mkdir()
        self.directory = self.above / "state"
        self.journal = Journal(self.directory)
        self.synced: list[str] = []
        self.patch(os, "fsync", lambda fd: self.synced.append(os.readlink(f"/proc/self/fd/{fd}")))

    def test_a_claim_is_on_disk_with_all_the_directories_that_lead_to_it(self) -> None:
        state = self.journal.claim("/mnt", "a")
        self.addCleanup(state.release)
        self.assertLessEqual({str(self.above), str(self.directory), str(state.path)}, {*self.synced})

    def test_a_mount_that_was_released_or_forgotten_is_not_on_record_again_after_a_crash(self) -> None:
        for give_up in (lambda state: state.release(), self.forget):
            state = self.journal.claim("/mnt", "a")
            self.synced.clear()
            give_up(state)
            self.assertEqual(str(self.directory), self.synced[-1])

    def forget(self, state: MountState) -> None:
        state.leave()
        self.journal.forget("/mnt")

    def test_after_an_update_that_was_not_safe_the_one_before_it_is_written_again(self) -> None:
        state = self.journal.claim("/mnt", "a")
        self.addCleanup(state.release)
        state.update(size=1)
        fsync, self.failing = os.fsync, True

        def fail_for_directories(fd: int) -> None:
            if self.failing and os.path.isdir(f"/proc/self/fd/{fd}"):
                raise OSError(errno.EIO, "no")
            fsync(fd)

        self.patch(os, "fsync", fail_for_directories)
        self.assertRaises(MountError, state.update, size=2)
        self.failing = False
        state.update(size=1)
        self.assertEqual(1, self.journal.read("/mnt").size)


class JournalTests(SynchronousTestCase):
    def setUp(self) -> None:
        self.directory = Path(self.mktemp())
        self.journal = Journal(self.directory)

    def test_a_claimed_mount_is_on_record_as_starting(self) -> None:
        state = self.journal.claim("/mnt", "registry.example/app")
        self.addCleanup(state.release)
        record = self.journal.read("/mnt")
        self.assertEqual(
            (Status.STARTING, os.getpid(), "registry.example/app"), (record.status, record.pid, record.image)
        )
        self.assertTrue(daemon_runs(record))

    def test_a_mount_point_can_be_claimed_only_once(self) -> None:
        state = self.journal.claim("/mnt", "registry.example/app")
        self.addCleanup(state.release)
        error = self.assertRaises(MountError, self.journal.claim, "/mnt", "registry.example/other")
        self.assertIn(f"process {os.getpid()} (registry.example/app)", str(error))

    def test_two_mount_points_do_not_disturb_each_other(self) -> None:
        for mountpoint in ("/mnt", "/mnt/inner"):
            self.addCleanup(self.journal.claim(mountpoint, "a").release)
        self.assertEqual("/mnt/inner", self.journal.read("/mnt/inner").mountpoint)

    def test_an_update_replaces_only_what_it_names(self) -> None:
        state = self.journal.claim("/mnt", "a")
        self.addCleanup(state.release)
        state.update(status=Status.READY, device="/dev/nbd7")
        record = self.journal.read("/mnt")
        self.assertEqual((Status.READY, "/dev/nbd7", "a"), (record.status, record.device, record.image))

    def test_a_released_mount_leaves_nothing(self) -> None:
        self.journal.claim("/mnt", "a").release()
        self.assertEqual([], list(self.directory.iterdir()))
        self.assertIsNone(self.journal.read("/mnt"))

    def test_a_failed_mount_leaves_its_reason_until_it_is_forgotten(self) -> None:
        self.journal.claim("/mnt", "a").release("no such image")
        record = self.journal.read("/mnt")
        self.assertEqual((Status.FAILED, "no such image"), (record.status, record.reason))
        self.journal.forget("/mnt")
        self.assertEqual([], list(self.directory.iterdir()))

    def test_a_failed_mount_can_be_claimed_again(self) -> None:
        self.journal.claim("/mnt", "a").release("no such image")
        self.addCleanup(self.journal.claim("/mnt", "b").release)
        self.assertEqual(("b", ""), (self.journal.read("/mnt").image, self.journal.read("/mnt").reason))

    def test_the_device_of_a_daemon_that_was_killed_stays_on_record(self) -> None:
        killed = self.journal.claim("/mnt", "a")
        killed.update(status=Status.READY, backend="nbd", device="/dev/nbd7")
        os.close(killed._lock)
        self.journal.claim("/mnt", "b").release("/mnt is a mount point already")
        record = self.journal.read("/mnt")
        self.assertEqual(
            (Status.FAILED, "a", "nbd", "/dev/nbd7"),
            (record.status, record.image, record.backend, record.device),
        )

    def test_one_that_was_unmounted_stays_so_until_it_is_known_if_it_is_wanted(self) -> None:
        for status, then in ((Status.UNMOUNTED, Status.UNMOUNTED), (Status.STOPPING, Status.STARTING)):
            state = self.journal.claim("/mnt", "a")
            state.update(status=status, reason="it is in use", backend="nbd", device="/dev/nbd7")
            state.leave()
            state = self.journal.claim("/mnt", "a")
            self.assertEqual(then, self.journal.read("/mnt").status)
            state.release()

    def test_a_damaged_record_is_replaced(self) -> None:
        self.journal.claim("/mnt", "a").release("no such image")
        (self.journal.directory("/mnt") / "record.json").write_text("{")
        self.assertRaises(RecordError, self.journal.read, "/mnt")
        self.addCleanup(self.journal.claim("/mnt", "b").release)
        self.assertEqual("b", self.journal.read("/mnt").image)

    def test_who_claims_a_mount_removes_what_was_left_half_written(self) -> None:
        self.journal.claim("/mnt", "a").leave()
        left = self.journal.directory("/mnt") / f"{UNFINISHED}x"
        left.touch()
        self.addCleanup(self.journal.claim("/mnt", "a").release)
        self.assertFalse(left.exists())

    def test_tidying_removes_what_has_no_record(self) -> None:
        self.journal.claim("/whole", "a").leave()
        for mountpoint in ("/whole", "/half", "/empty"):
            self.journal.directory(mountpoint).mkdir(exist_ok=True)
        for mountpoint in ("/whole", "/half"):
            (self.journal.directory(mountpoint) / f"{UNFINISHED}x").touch()
        self.journal.tidy()
        self.assertEqual([self.journal.directory("/whole")], list(self.directory.iterdir()))
        self.assertEqual(["record.json"], os.listdir(self.journal.directory("/whole")))

    def test_tidying_leaves_alone_what_a_daemon_has_and_what_is_not_ours(self) -> None:
        state = self.journal.claim("/mnt", "a")
        self.addCleanup(state.release)
        (state.path / f"{UNFINISHED}x").touch()
        with_more = self.journal.directory("/more")
        with_more.mkdir()
        (with_more / "record.damaged").touch()
        (self.directory / "foreign").mkdir()
        self.journal.tidy()
        self.assertEqual({state.path, with_more, self.directory / "foreign"}, {*self.directory.iterdir()})
        self.assertEqual({"record.json", f"{UNFINISHED}x"}, {*os.listdir(state.path)})

    def test_what_a_daemon_holds_cannot_be_forgotten(self) -> None:
        self.addCleanup(self.journal.claim("/mnt", "a").release)
        self.assertRaises(OSError, self.journal.forget, "/mnt")

    def test_a_state_directory_that_cannot_be_made_is_named_with_its_option(self) -> None:
        file = Path(self.mktemp())
        file.touch()
        error = self.assertRaises(MountError, Journal(file / "state").claim, "/mnt", "a")
        self.assertIn("--state-dir", str(error))

    def test_the_state_is_for_its_owner_only(self) -> None:
        state = self.journal.claim("/mnt", "a")
        self.addCleanup(state.release)
        self.assertEqual(0o700, state.path.stat().st_mode & 0o777)
        self.assertEqual(0o600, (state.path / "record.json").stat().st_mode & 0o777)

    def test_a_process_that_has_ended_does_not_run(self) -> None:
        pid = os.fork()
        if pid == 0:
            os._exit(0)
        os.waitpid(pid, 0)
        self.assertIsNone(process_started(pid))
        gone = MountRecord(mountpoint="/mnt", image="a", pid=pid, pid_started=1)
        self.assertFalse(daemon_runs(gone))

    def test_a_process_id_used_again_is_not_the_daemon(self) -> None:
        other = MountRecord(mountpoint="/mnt", image="a", pid=os.getpid(), pid_started=1)
        self.assertFalse(daemon_runs(other))
