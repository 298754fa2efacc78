"""The plan for what a daemon that was killed has left: each combination of what may be seen."""

from __future__ import annotations

import itertools

import attrs
from twisted.trial.unittest import SynchronousTestCase

from erofs_twisted.errors import MountError
from erofs_twisted.interfaces import Connected
from erofs_twisted.state.records import MountRecord, Status
from erofs_twisted.state.takeover import AFRESH, Plan, Seen, Step, make_plan

RECORD = MountRecord(
    mountpoint="/mnt",
    image="registry.example/app",
    pid=1,
    pid_started=2,
    boot="now",
    status=Status.READY,
    backend="nbd",
    identifier="ours",
    device="/dev/nbd3",
    size=8192,
    mount_id=77,
)
DEVICE = Connected(path="/dev/nbd3", size=8192, identifier="ours", is_held=True)
SEEN = Seen(boot="now", devices=[DEVICE], source="/dev/nbd3", mount_id=77)


def record(**changes: object) -> MountRecord:
    return attrs.evolve(RECORD, **changes)  # type: ignore[arg-type]


def seen(**changes: object) -> Seen:
    return attrs.evolve(SEEN, **changes)  # type: ignore[arg-type]


class PlanTests(SynchronousTestCase):
    def plan(self, record: MountRecord | None, seen: Seen) -> tuple[Step, ...]:
        return make_plan(record, seen).steps

    def test_a_mount_on_its_device_goes_on(self) -> None:
        self.assertEqual(Plan((Step.ADOPT, Step.KEEP), "/dev/nbd3", 77), make_plan(RECORD, SEEN))

    def test_where_nothing_is_on_record_all_begins_anew(self) -> None:
        self.assertEqual(AFRESH, make_plan(None, SEEN))

    def test_what_another_boot_has_on_record_is_forgotten(self) -> None:
        self.assertEqual((Step.FORGET, Step.START), self.plan(record(boot="before"), SEEN))

    def test_a_device_that_is_not_mounted_is_mounted(self) -> None:
        for is_held in (False, True):
            device = attrs.evolve(DEVICE, is_held=is_held)
            self.assertEqual(
                (Step.ADOPT, Step.MOUNT), self.plan(RECORD, seen(devices=[device], source="", mount_id=0))
            )

    def test_one_that_was_killed_before_it_knew_its_device_finds_it_by_what_that_says(self) -> None:
        early = record(device="", mount_id=0, status=Status.STARTING)
        self.assertEqual((Step.ADOPT, Step.MOUNT), self.plan(early, seen(source="", mount_id=0)))
        self.assertEqual(AFRESH, make_plan(early, seen(devices=[], source="", mount_id=0)))

    def test_one_that_was_killed_before_its_mount_was_on_record_keeps_it(self) -> None:
        self.assertEqual(Plan((Step.ADOPT, Step.KEEP), "/dev/nbd3", 77), make_plan(record(mount_id=0), SEEN))

    def test_another_mount_in_its_place_is_left_alone_and_the_device_is_not(self) -> None:
        other = {"source": "tmpfs", "mount_id": 5}
        free = attrs.evolve(DEVICE, is_held=False)
        self.assertEqual((Step.DISCONNECT, Step.START), self.plan(RECORD, seen(devices=[free], **other)))
        self.assertEqual((Step.START,), self.plan(RECORD, seen(**other)))

    def test_a_mount_without_its_device_is_taken_away(self) -> None:
        self.assertEqual((Step.UNMOUNT, Step.START), self.plan(RECORD, seen(devices=[])))

    def test_a_device_of_somebody_else_is_left_alone(self) -> None:
        for change in ({"identifier": "theirs"}, {"size": 4096}, {"path": "/dev/nbd4"}):
            devices = [attrs.evolve(DEVICE, **change)]
            self.assertEqual(AFRESH, make_plan(RECORD, seen(devices=devices, source="", mount_id=0)), change)

    def test_two_that_may_be_it_are_for_a_person_to_tell_apart(self) -> None:
        devices = [DEVICE, attrs.evolve(DEVICE, path="/dev/nbd4")]
        early = record(device="", mount_id=0)
        error = self.assertRaises(MountError, make_plan, early, seen(devices=devices, source="", mount_id=0))
        self.assertIn("/dev/nbd3, /dev/nbd4", str(error))
        self.assertEqual((Step.ADOPT, Step.KEEP), self.plan(RECORD, seen(devices=devices)))

    def test_a_mount_by_fuse_does_not_outlive_its_daemon(self) -> None:
        fuse = record(backend="fuse", device="/run/x/image", identifier="")
        there = seen(devices=[], source="/run/x/image")
        self.assertEqual((Step.UNMOUNT, Step.START), self.plan(fuse, there))
        self.assertEqual((Step.UNMOUNT, Step.START), self.plan(attrs.evolve(fuse, mount_id=0), there))
        for nothing in (seen(devices=[], source="", mount_id=0), seen(source="tmpfs", mount_id=5)):
            self.assertEqual(AFRESH, make_plan(fuse, nothing))
            self.assertEqual(AFRESH, make_plan(attrs.evolve(fuse, device="", mount_id=0), nothing))

    def test_one_that_was_unmounted_is_served_for_who_uses_it_and_ends(self) -> None:
        over = record(status=Status.UNMOUNTED, mount_id=0)
        free = attrs.evolve(DEVICE, is_held=False)
        for source, mount_id in (("", 0), ("tmpfs", 5)):
            there = seen(source=source, mount_id=mount_id)
            self.assertEqual(Plan((Step.ADOPT, Step.LINGER), "/dev/nbd3"), make_plan(over, there, False))
            there = attrs.evolve(there, devices=[free])
            self.assertEqual(Plan((Step.DISCONNECT, Step.FORGET), "/dev/nbd3"), make_plan(over, there, False))
            there = attrs.evolve(there, devices=[])
            self.assertEqual(Plan((Step.FORGET,)), make_plan(over, there, False))
        self.assertEqual(Plan((Step.FORGET,)), make_plan(over, seen(boot="later"), False))

    def test_one_that_was_mounted_again_before_that_was_on_record_stays(self) -> None:
        over = record(status=Status.UNMOUNTED, mount_id=0)
        self.assertEqual(Plan((Step.ADOPT, Step.KEEP), "/dev/nbd3", 77), make_plan(over, SEEN, False))

    def test_every_combination_has_a_plan_that_ends_in_a_whole_mount_and_touches_only_ours(self) -> None:
        records = [
            None,
            *(
                record(boot=boot, backend=backend, device=device, mount_id=mount_id)
                for boot, backend, device, mount_id in itertools.product(
                    ("now", "before"), ("", "nbd", "fuse"), ("", "/dev/nbd3"), (0, 77)
                )
            ),
        ]
        devices = [
            attrs.evolve(DEVICE, identifier=identifier, is_held=is_held)
            for identifier, is_held in itertools.product(("ours", "theirs"), (False, True))
        ]
        for one, found, (source, mount_id) in itertools.product(
            records, [[], *([each] for each in devices)], (("", 0), ("/dev/nbd3", 77), ("tmpfs", 5))
        ):
            plan = make_plan(one, Seen(boot="now", devices=found, source=source, mount_id=mount_id))
            self.assertIn(plan.steps[-1], (Step.KEEP, Step.MOUNT, Step.START))
            if {Step.ADOPT, Step.DISCONNECT} & {*plan.steps}:
                self.assertEqual("ours", found[0].identifier)
            if Step.UNMOUNT in plan.steps:
                self.assertEqual("/dev/nbd3", source)
            if Step.KEEP in plan.steps:
                self.assertTrue(source == plan.device and plan.mount_id == mount_id)

    def test_a_step_says_what_it_does(self) -> None:
        for step in Step:
            said = step.told(RECORD, "")
            self.assertTrue("/mnt" in said or "/dev/nbd3" in said)
