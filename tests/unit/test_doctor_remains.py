"""What is to be said of what daemons have left: each combination of what may be seen."""

from __future__ import annotations

import itertools
from typing import Any

import attrs
from twisted.trial.unittest import SynchronousTestCase

from erofs_twisted.doctor.finding import Act, Finding, Level
from erofs_twisted.doctor.remains import (
    Damaged,
    Device,
    FuseDirectory,
    OnRecord,
    Pidfile,
    Remains,
    findings_of,
    name_in,
)
from erofs_twisted.interfaces import Connected
from erofs_twisted.mount.mountinfo import Mount
from erofs_twisted.state.records import MountRecord, Status, record_name
from erofs_twisted.state.takeover import Seen, make_plan

STATE = "/run/erofs-twisted"
NAME = record_name("/mnt")
IDENTIFIER = f"application/vnd.erofs sha256:{64 * 'a'} {NAME}"
RECORD = MountRecord(
    mountpoint="/mnt",
    image="registry.example/app",
    pid=7,
    pid_started=2,
    boot="now",
    status=Status.READY,
    backend="nbd",
    identifier=IDENTIFIER,
    device="/dev/nbd3",
    size=8192,
    mount_id=77,
)
DEVICE = Device(path="/dev/nbd3", identifier=IDENTIFIER, is_bound=True, is_held=True)
IDLE = attrs.evolve(DEVICE, is_held=False)
MOUNT = Mount(77, 1, "43:3", "/", "/mnt", "erofs", "/dev/nbd3")
OTHER = Mount(78, 1, "0:9", "/", "/mnt", "tmpfs", "tmpfs")
HOME = f"{STATE}/{NAME}"
FUSE = FuseDirectory(path=f"{HOME}/fuse-abc", is_served=False)
FUSE_MOUNT = Mount(77, 1, "0:50", "/", "/mnt", "erofs", f"{FUSE.path}/image")


def remains(**seen: Any) -> Remains:
    devices = seen.get("devices", ())
    connected = frozenset(device.path for device in devices or ())
    return Remains(**{"state_dir": STATE, "boot": "now", "connected": connected, **seen})


def dead(record: MountRecord = RECORD, **seen: Any) -> Remains:
    """With a record that no daemon serves, and the plan that is made for it then."""
    connected = [
        Connected(path=device.path, size=8192, identifier=device.identifier, is_held=device.is_held)
        for device in seen.get("devices", ())
        if device.is_bound and device.identifier == record.identifier
    ]
    source, mount_id = next(((m.source, m.mount_id) for m in seen.get("mounts", ())), ("", 0))
    plan = make_plan(record, Seen(boot="now", devices=connected, source=source, mount_id=mount_id))
    return remains(records=[OnRecord(record=record, is_served=False, plan=plan)], **seen)


class RemainsTestCase(SynchronousTestCase):
    def found(self, seen: Remains) -> Finding:
        """The one thing that there is to say."""
        (finding,) = findings_of(seen)
        return finding

    def assert_found(self, seen: Remains, level: Level, subject: str, *acts: Act) -> Finding:
        finding = self.found(seen)
        self.assertEqual(
            (level, subject, acts), (finding.level, finding.subject, tuple(r.act for r in finding.repairs))
        )
        if level in (Level.WARNING, Level.BAD):
            self.assertTrue(finding.cure)
        return finding


class RecordTests(RemainsTestCase):
    def test_where_there_is_nothing_all_is_well(self) -> None:
        self.assert_found(remains(), Level.OK, "mounts")

    def test_a_mount_that_is_served_is_well_whatever_else_there_is(self) -> None:
        for devices, mounts in itertools.product([[], [DEVICE], [IDLE]], [[], [OTHER]]):
            served = OnRecord(record=RECORD, is_served=True)
            finding = self.assert_found(
                remains(records=[served], devices=devices, mounts=mounts), Level.OK, "/mnt"
            )
            self.assertIn("process 7", finding.text)

    def test_one_whose_daemon_was_stopped_says_how_it_goes_on(self) -> None:
        stopped = OnRecord(record=RECORD, is_served=True, is_stopped=True)
        finding = self.assert_found(remains(records=[stopped]), Level.BAD, "/mnt")
        self.assertEqual("kill -CONT 7", finding.cure)

    def test_one_that_waits_for_its_users_before_it_stops_says_for_whom(self) -> None:
        record = attrs.evolve(RECORD, status=Status.STOPPING, reason="in use by cat")
        served = OnRecord(record=record, is_served=True)
        finding = self.assert_found(remains(records=[served]), Level.WARNING, "/mnt")
        self.assertIn("in use by cat", finding.text)

    def test_a_mount_whose_daemon_died_gets_a_new_one(self) -> None:
        seen = dead(devices=[DEVICE], mounts=[MOUNT])
        finding = self.assert_found(seen, Level.BAD, "/mnt", Act.REATTACH)
        self.assertIn("erofs-nbd reattach /mnt", finding.cure)

    def test_a_device_that_nothing_uses_is_disconnected_and_forgotten(self) -> None:
        for mounts in ([], [OTHER]):
            seen = dead(devices=[IDLE], mounts=mounts)
            finding = self.assert_found(seen, Level.BAD, "/mnt", Act.DISCONNECT, Act.FORGET)
            disconnect, _ = finding.repairs
            self.assertEqual(("/dev/nbd3", IDENTIFIER), (disconnect.target, disconnect.identifier))

    def test_a_device_in_use_elsewhere_takes_a_person(self) -> None:
        opened = attrs.evolve(IDLE, users=("process 9",))
        for device, mounts in itertools.product([DEVICE, opened], [[], [OTHER]]):
            self.assert_found(dead(devices=[device], mounts=mounts), Level.BAD, "/mnt")

    def test_a_mount_whose_device_is_gone_is_unmounted_and_forgotten(self) -> None:
        unbound = attrs.evolve(DEVICE, is_bound=False)
        for devices in ([], [unbound]):
            seen = dead(devices=devices, mounts=[MOUNT])
            finding = self.assert_found(seen, Level.BAD, "/mnt", Act.UNMOUNT, Act.FORGET)
            unmount, _ = finding.repairs
            self.assertEqual((77, "/dev/nbd3"), (unmount.mount_id, unmount.source))

    def test_a_mount_of_the_fuse_back_end_is_gone_with_its_daemon(self) -> None:
        record = attrs.evolve(RECORD, backend="fuse", device=FUSE_MOUNT.source)
        seen = dead(record, mounts=[FUSE_MOUNT], fuse=[FUSE])
        self.assert_found(seen, Level.BAD, "/mnt", Act.UNMOUNT, Act.FORGET)

    def test_a_record_with_nothing_behind_it_is_forgotten(self) -> None:
        for record in (RECORD, attrs.evolve(RECORD, boot="before"), attrs.evolve(RECORD, device="")):
            self.assert_found(dead(record), Level.WARNING, "/mnt", Act.FORGET)

    def test_a_mount_that_failed_says_why(self) -> None:
        for boot in ("now", ""):
            failed = MountRecord(
                mountpoint="/mnt",
                image="a",
                pid=7,
                pid_started=2,
                boot=boot,
                status=Status.FAILED,
                reason="no such image",
            )
            finding = self.assert_found(dead(failed), Level.WARNING, "/mnt", Act.FORGET)
            self.assertIn("no such image", finding.text)

    def test_what_no_plan_can_be_made_for_takes_a_person(self) -> None:
        unclear = OnRecord(record=RECORD, is_served=False, problem="two devices")
        finding = self.assert_found(remains(records=[unclear]), Level.BAD, "/mnt")
        self.assertIn("two devices", finding.text)

    def test_who_may_not_look_at_devices_cannot_tell(self) -> None:
        unclear = OnRecord(record=RECORD, is_served=False, problem="takes root")
        levels = [each.level for each in findings_of(remains(records=[unclear], devices=None))]
        self.assertEqual([Level.UNKNOWN, Level.UNKNOWN], levels)


class DeviceTests(RemainsTestCase):
    """Those that are not on record."""

    def test_the_mounts_name_is_in_what_a_device_of_ours_says_of_its_server(self) -> None:
        self.assertEqual(NAME, name_in(IDENTIFIER))
        self.assertEqual("x", name_in(f"application/vnd.erofs.layer.v1 sha512:{128 * '0'} x"))
        for other in ("", "me", IDENTIFIER.removesuffix(f" {NAME}"), f"sha256:{64 * 'a'} {NAME}"):
            self.assertEqual("", name_in(other))

    def test_one_that_nobody_serves_or_uses_is_disconnected(self) -> None:
        finding = self.assert_found(remains(devices=[IDLE]), Level.BAD, "/dev/nbd3", Act.DISCONNECT)
        self.assertEqual(IDENTIFIER, finding.repairs[0].identifier)

    def test_one_that_a_daemon_of_another_state_directory_has_is_well(self) -> None:
        for is_held, is_bound in itertools.product((False, True), repeat=2):
            device = attrs.evolve(DEVICE, is_held=is_held, is_bound=is_bound, daemon=9)
            self.assert_found(remains(devices=[device]), Level.OK, "/dev/nbd3")

    def test_one_that_is_in_use_takes_a_person(self) -> None:
        opened = attrs.evolve(IDLE, users=("process 9",))
        for device, is_bound in itertools.product((DEVICE, opened), (False, True)):
            seen = remains(devices=[attrs.evolve(device, is_bound=is_bound)])
            self.assert_found(seen, Level.BAD, "/dev/nbd3")
        self.assert_found(remains(devices=[DEVICE], mounts=[MOUNT]), Level.BAD, "/mnt")

    def test_a_mount_of_one_that_was_disconnected_is_unmounted_if_it_is_ours(self) -> None:
        device = attrs.evolve(DEVICE, is_bound=False)
        self.assert_found(remains(devices=[device], mounts=[MOUNT]), Level.BAD, "/mnt", Act.UNMOUNT)
        moved = attrs.evolve(MOUNT, path="/elsewhere")
        self.assert_found(remains(devices=[device], mounts=[moved]), Level.BAD, "/elsewhere")

    def test_what_is_mounted_over_it_is_left_alone(self) -> None:
        device, over = attrs.evolve(DEVICE, is_bound=False), attrs.evolve(OTHER, parent_id=77)
        self.assert_found(remains(devices=[device], mounts=[MOUNT, over]), Level.BAD, "/mnt")

    def test_a_record_of_another_boot_or_another_device_does_not_count(self) -> None:
        for change in ({"boot": "before"}, {"device": "/dev/nbd4"}):
            served = OnRecord(record=attrs.evolve(RECORD, **change), is_served=True)
            levels = [f.level for f in findings_of(remains(records=[served], devices=[IDLE]))]
            self.assertEqual([Level.OK, Level.BAD], levels)

    def test_a_mount_of_a_device_without_a_connection_may_be_another_programs(self) -> None:
        self.assert_found(remains(mounts=[MOUNT]), Level.BAD, "/mnt")
        self.assert_found(remains(mounts=[MOUNT], connected=frozenset({"/dev/nbd3"})), Level.OK, "mounts")
        ext4 = attrs.evolve(MOUNT, fstype="ext4")
        self.assert_found(remains(mounts=[ext4]), Level.OK, "mounts")


class FuseTests(RemainsTestCase):
    def test_a_mount_that_is_not_on_record_is_taken_away(self) -> None:
        seen = remains(mounts=[FUSE_MOUNT], fuse=[FUSE])
        finding = self.assert_found(seen, Level.BAD, "/mnt", Act.UNMOUNT, Act.CLEAR)
        self.assertEqual(HOME, finding.repairs[1].target)

    def test_so_is_one_through_a_loop_device(self) -> None:
        mount = attrs.evolve(FUSE_MOUNT, source="/dev/loop1")
        backing = {"/dev/loop1": FUSE_MOUNT.source}
        seen = remains(mounts=[mount], fuse=[FUSE], backing=backing)
        finding = self.assert_found(seen, Level.BAD, "/mnt", Act.UNMOUNT, Act.CLEAR)
        self.assertEqual("/dev/loop1", finding.repairs[0].source)

    def test_what_is_mounted_over_it_is_left_alone(self) -> None:
        over = attrs.evolve(OTHER, parent_id=77)
        self.assert_found(remains(mounts=[FUSE_MOUNT, over], fuse=[FUSE]), Level.BAD, "/mnt")

    def test_one_that_is_served_is_well(self) -> None:
        served = attrs.evolve(FUSE, is_served=True)
        self.assert_found(remains(mounts=[FUSE_MOUNT], fuse=[served]), Level.OK, "mounts")

    def test_where_the_directory_was_removed_nobody_can_tell(self) -> None:
        gone = attrs.evolve(FUSE, is_served=None)
        self.assert_found(remains(mounts=[FUSE_MOUNT], fuse=[gone]), Level.UNKNOWN, "/mnt")

    def test_another_state_directory_is_another_matter(self) -> None:
        seen = remains(state_dir="/other", mounts=[FUSE_MOUNT], fuse=[FUSE])
        finding = self.assert_found(seen, Level.BAD, "/mnt")
        self.assertIn(f"--state-dir {STATE}", finding.cure)

    def test_somebody_elses_mount_of_such_a_name_is_left_alone(self) -> None:
        theirs = attrs.evolve(FUSE_MOUNT, path="/theirs")
        self.assert_found(remains(mounts=[theirs]), Level.OK, "mounts")

    def test_a_directory_that_is_left_over_is_removed(self) -> None:
        finding = self.assert_found(remains(fuse=[FUSE]), Level.WARNING, FUSE.path, Act.CLEAR)
        self.assertEqual(HOME, finding.repairs[0].target)
        served = attrs.evolve(FUSE, is_served=True)
        self.assert_found(remains(fuse=[served]), Level.OK, "mounts")


class FileTests(RemainsTestCase):
    def test_a_record_that_cannot_be_read_is_only_said(self) -> None:
        for is_aside, is_held in itertools.product((False, True), repeat=2):
            damaged = Damaged(path=HOME, reason="not JSON", is_aside=is_aside, is_held=is_held)
            finding = self.assert_found(remains(damaged=[damaged]), Level.WARNING, HOME)
            self.assertIn("not JSON", finding.text)
            self.assertEqual(is_held, "its daemon runs" in finding.cure)

    def test_directories_and_sockets_of_nobody_are_removed(self) -> None:
        self.assert_found(remains(vacant=[HOME]), Level.WARNING, HOME, Act.CLEAR)
        path = f"{HOME}/socket"
        self.assert_found(remains(sockets=[path]), Level.WARNING, path, Act.UNLINK)

    def test_what_is_in_the_directory_of_a_dead_mount_goes_with_its_record(self) -> None:
        seen = dead(fuse=[FUSE], sockets=[f"{HOME}/socket"])
        self.assert_found(seen, Level.WARNING, "/mnt", Act.FORGET)

    def test_a_pidfile_is_stale_unless_it_names_twistd(self) -> None:
        for command, is_twistd, level in (
            ("", False, Level.WARNING),
            ("bash", False, Level.WARNING),
            ("python3", True, None),
        ):
            pidfile = Pidfile(path="/twistd.pid", pid=5, command=command, is_twistd=is_twistd)
            seen = remains(pidfiles=[pidfile])
            if level is None:
                self.assert_found(seen, Level.OK, "mounts")
            else:
                self.assertIn("process 5", self.assert_found(seen, level, "/twistd.pid").text)
