"""What the doctor does, and what it leaves alone because it has changed meanwhile."""

from __future__ import annotations

import fcntl
import os
import socket
from collections.abc import Sequence
from pathlib import Path

from twisted.trial.unittest import SynchronousTestCase

from erofs_twisted.device.driver import Attached, NBDDriver
from erofs_twisted.doctor import cures
from erofs_twisted.doctor.cures import Cures
from erofs_twisted.doctor.finding import Act, Finding, Level, Repair
from erofs_twisted.doctor.report import Outcome
from erofs_twisted.doctor.search import Opened
from erofs_twisted.errors import MountError
from erofs_twisted.interfaces import Connected
from erofs_twisted.state.journal import Journal
from erofs_twisted.state.records import record_name

IDENTIFIER = f"application/vnd.erofs sha256:{64 * 'a'} {record_name('/mnt')}"
DEVICE = Connected(path="/dev/nbd977", size=8192, identifier=IDENTIFIER, is_held=False)
DISCONNECT = Repair(act=Act.DISCONNECT, target=DEVICE.path, identifier=IDENTIFIER)
FORGET = Repair(act=Act.FORGET, target="/mnt")


class PaperDriver(NBDDriver):
    """``serves``: the device has a server, so the driver drops what it is given."""

    def __init__(self, *devices: Connected, serves: bool = False) -> None:
        self.devices = devices
        self.serves = serves
        self.kept: list[socket.socket] = []
        self.detached: list[Attached] = []

    def connected(self, identifier: str) -> list[Connected]:
        return [device for device in self.devices if device.identifier == identifier]

    def reconfigure(self, path: str, sockets: Sequence[int], identifier: str) -> Attached:
        if not self.serves:
            self.kept += [socket.socket(fileno=os.dup(descriptor)) for descriptor in sockets]
        return Attached(977, path, 1, False)

    def detach(self, attached: Attached) -> None:
        self.detached.append(attached)


class CuresTestCase(SynchronousTestCase):
    def setUp(self) -> None:
        self.patch(cures, "open_files", lambda: iter(self.opened))
        self.opened: list[Opened] = []
        self.driver = PaperDriver(DEVICE)
        self.journal = Journal(Path(self.mktemp()).absolute())
        self.addCleanup(lambda: [kept.close() for kept in self.driver.kept])

    def apply(self, *repairs: Repair) -> list[Outcome]:
        findings = [Finding(Level.BAD, "subject", "text", "cure", repairs)]
        return list(Cures(self.journal, self.driver).apply(findings))

    def assert_done(self, *repairs: Repair) -> None:
        self.assertEqual([Outcome(repair) for repair in repairs], self.apply(*repairs))

    def assert_refused(self, reason: str, repair: Repair) -> None:
        (outcome,) = self.apply(repair)
        self.assertIn(reason, outcome.problem)

    def leave_record(self, mountpoint: str = "/mnt", *, lives: bool = False) -> Path:
        """Its directory."""
        state = self.journal.claim(mountpoint, "registry.example/app")
        if not lives:
            state.update(pid_started=state.record.pid_started - 1)
        os.close(state._lock)
        return state.path


class DisconnectTests(CuresTestCase):
    def test_a_device_that_nobody_serves_or_uses_is_disconnected(self) -> None:
        self.assert_done(DISCONNECT)
        self.assertEqual([DEVICE.path], [attached.path for attached in self.driver.detached])

    def test_one_that_has_gone_meanwhile_needs_nothing(self) -> None:
        self.driver.devices = ()
        self.assert_done(DISCONNECT)
        self.assertEqual([], self.driver.detached)

    def test_one_that_has_come_into_use_or_is_served_is_left_alone(self) -> None:
        held = Connected(path=DEVICE.path, size=8192, identifier=IDENTIFIER, is_held=True)
        for driver, opened, reason in (
            (PaperDriver(held), [], "is in use"),
            (PaperDriver(DEVICE), [Opened(9, DEVICE.path)], "is in use"),
            (PaperDriver(DEVICE), [Opened(9, f"/else/where/{record_name('/mnt')}")], "process 9"),
            (PaperDriver(DEVICE, serves=True), [], "is served by somebody else"),
        ):
            self.driver, self.opened = driver, opened
            self.assert_refused(reason, DISCONNECT)
            self.assertEqual([], driver.detached)

    def test_the_same_device_with_another_server_is_left_alone(self) -> None:
        self.driver.devices = (Connected(path=DEVICE.path, size=1, identifier="theirs", is_held=False),)
        self.assert_done(DISCONNECT)
        self.assertEqual([], self.driver.detached)


class MountTests(CuresTestCase):
    def test_what_is_mounted_there_meanwhile_is_left_alone(self) -> None:
        unmount = Repair(act=Act.UNMOUNT, target="/proc", mount_id=1, source="/dev/nbd977")
        self.assert_refused("meanwhile", unmount)
        self.assertTrue(os.path.exists("/proc/self"))

    def test_what_is_unmounted_already_needs_nothing(self) -> None:
        self.assert_done(Repair(act=Act.UNMOUNT, target="/nowhere", mount_id=1, source="/dev/nbd977"))

    def test_a_daemon_is_started_only_where_none_has_come_meanwhile(self) -> None:
        started: list[str] = []
        self.patch(cures, "start", lambda journal, record, *_: started.append(record.mountpoint))
        reattach = Repair(act=Act.REATTACH, target="/mnt")
        self.assert_refused("not on record", reattach)
        self.leave_record(lives=True)
        self.assert_done(reattach)
        self.assertEqual([], started)
        self.leave_record()
        self.assert_done(reattach)
        self.assertEqual(["/mnt"], started)

    def test_the_words_of_a_daemon_that_does_not_start_are_told(self) -> None:
        def fail(*_: object) -> None:
            raise MountError("/mnt: the registry wants a password")

        self.patch(cures, "start", fail)
        self.leave_record()
        self.assert_refused("wants a password", Repair(act=Act.REATTACH, target="/mnt"))


class FileTests(CuresTestCase):
    def test_a_dead_record_is_forgotten_and_what_nbdfuse_left_goes_with_it(self) -> None:
        directory = self.leave_record()
        (directory / "fuse-abc").mkdir()
        (directory / "fuse-abc" / "image").touch()
        self.assert_done(FORGET)
        self.assertFalse(directory.exists())

    def made(self, made: bool) -> tuple[Path, Repair]:
        """A mount point on record as made for it or not, and what forgets that."""
        mountpoint = Path(self.mktemp()).absolute()
        mountpoint.mkdir()
        state = self.journal.claim(str(mountpoint), "registry.example/app")
        state.update(pid_started=state.record.pid_started - 1, made=made)
        state.leave()
        return mountpoint, Repair(act=Act.FORGET, target=str(mountpoint))

    def test_a_directory_that_was_made_for_the_mount_goes_with_its_record(self) -> None:
        mountpoint, forget = self.made(True)
        self.assert_done(forget)
        self.assertFalse(mountpoint.exists())

    def test_one_that_was_there_before_or_is_not_empty_stays(self) -> None:
        there_before, forget = self.made(False)
        self.assert_done(forget)
        self.assertTrue(there_before.exists())
        used, forget = self.made(True)
        (used / "file").touch()
        self.assert_done(forget)
        self.assertEqual(["file"], os.listdir(used))
        self.assertIsNone(self.journal.read(str(used)))

    def test_it_stays_where_a_daemon_has_just_taken_it(self) -> None:
        mountpoint, forget = self.made(True)
        lock = os.open(self.journal.directory(str(mountpoint)), os.O_RDONLY)
        self.addCleanup(os.close, lock)
        fcntl.flock(lock, fcntl.LOCK_EX)
        self.assert_refused("just started", forget)
        self.assertTrue(mountpoint.exists())

    def test_the_record_of_a_daemon_that_runs_is_left_alone(self) -> None:
        directory = self.leave_record(lives=True)
        self.assert_refused(f"process {os.getpid()}", FORGET)
        self.assertTrue((directory / "record.json").exists())

    def test_one_that_a_daemon_has_just_taken_is_left_alone(self) -> None:
        directory = self.leave_record()
        descriptor = lock(directory)
        self.addCleanup(os.close, descriptor)
        self.assert_refused("just started", FORGET)
        self.assertTrue((directory / "record.json").exists())

    def test_a_record_stays_while_nbdfuses_file_is_in_use(self) -> None:
        self.patch(cures, "RELEASE", 0.0)
        directory = self.leave_record()
        # As what is mounted, it keeps the directory from being removed.
        (directory / "fuse-abc" / "more").mkdir(parents=True)
        self.assert_refused("in use still", FORGET)
        self.assertTrue((directory / "record.json").exists())

    def test_an_empty_directory_is_removed_and_one_with_a_record_is_not(self) -> None:
        directory = self.leave_record()
        clear = Repair(act=Act.CLEAR, target=str(directory))
        self.assert_done(clear)
        self.assertTrue(directory.exists())
        (directory / "record.json").unlink()
        self.assert_done(clear)
        self.assertFalse(directory.exists())
        self.assert_done(clear)

    def test_what_a_daemon_has_stays_when_what_another_left_is_removed(self) -> None:
        directory = self.leave_record(lives=True)
        for name in ("fuse-dead", "fuse-alive"):
            (directory / name).mkdir()
        self.addCleanup(os.close, lock(directory / "fuse-alive"))
        self.assert_done(Repair(act=Act.CLEAR, target=str(directory)))
        self.assertEqual(["fuse-alive", "record.json"], sorted(os.listdir(directory)))

    def test_after_what_fails_the_rest_of_a_finding_is_left_but_other_findings_are_not(self) -> None:
        self.driver = PaperDriver(DEVICE, serves=True)
        directory = self.leave_record()
        other = self.leave_record("/other")
        findings = [
            Finding(Level.BAD, "one", "text", "cure", (DISCONNECT, FORGET)),
            Finding(Level.BAD, "two", "text", "cure", (Repair(act=Act.FORGET, target="/other"),)),
        ]
        outcomes = list(Cures(self.journal, self.driver).apply(findings))
        self.assertEqual([False, True], [not outcome.problem for outcome in outcomes])
        self.assertEqual((True, False), (directory.exists(), other.exists()))


def lock(directory: Path) -> int:
    """As a daemon holds it."""
    descriptor = os.open(directory, os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    return descriptor
