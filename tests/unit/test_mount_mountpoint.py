"""A mount point before and after the mount, with as much of the kernel as any user has."""

from __future__ import annotations

import os
from pathlib import Path
from unittest.mock import patch

from twisted.internet.defer import CancelledError, Deferred
from twisted.trial.unittest import SynchronousTestCase

from erofs_twisted.errors import MountError
from erofs_twisted.mount import mountpoint as module
from erofs_twisted.mount.mountpoint import Busy, Holder, Mountpoint
from erofs_twisted.mount.options import MountOptions
from tests.unit.threadless import HeldPool, ThreadlessReactor

SCENERY = "1 0 0:1 / / rw - ext4 /dev/sda rw\n"


class MountpointTestCase(SynchronousTestCase):
    def setUp(self) -> None:
        self.pool = HeldPool(held=False)
        self.directory = os.path.realpath(self.mktemp())
        os.mkdir(self.directory)
        self.path = os.path.join(self.directory, "target")

    def at(self, path: str | None = None) -> Mountpoint:
        return Mountpoint(ThreadlessReactor(), self.pool, path or self.path)

    def run_to(self, coroutine: object) -> object:
        return self.successResultOf(Deferred.fromCoroutine(coroutine))

    def refusal(self, coroutine: object) -> str:
        return str(self.failureResultOf(Deferred.fromCoroutine(coroutine), MountError).value)


class CheckTests(MountpointTestCase):
    def test_an_empty_directory_is_fit(self) -> None:
        os.mkdir(self.path)
        self.run_to(self.at().check())

    def test_symbolic_links_are_followed(self) -> None:
        os.mkdir(self.path)
        link = os.path.join(self.directory, "link")
        os.symlink("target", link)
        mountpoint = self.at(link)
        self.run_to(mountpoint.check())
        self.assertEqual(self.path, mountpoint.path)

    def test_where_another_way_leads_to_it_its_name_is_not_looked_up(self) -> None:
        os.mkdir(self.path)
        descriptor = os.open(self.path, os.O_PATH)
        self.addCleanup(os.close, descriptor)
        reach = f"/proc/{os.getpid()}/fd/{descriptor}"
        mountpoint = Mountpoint(ThreadlessReactor(), self.pool, self.path, reach)
        with (
            patch.object(module.os, "lstat", side_effect=AssertionError),
            patch.object(module.os.path, "lexists", side_effect=AssertionError),
        ):
            self.assertFalse(self.run_to(mountpoint.is_missing()))
            self.run_to(mountpoint.check(make=True))
        self.assertEqual(self.path, mountpoint.path)

    def test_another_way_that_leads_elsewhere_or_to_a_file_is_refused(self) -> None:
        os.mkdir(self.path)
        file = Path(self.path, "file")
        file.touch()
        for path, opened in ((self.path, self.directory), (str(file), str(file)), (self.path, "")):
            descriptor = os.open(opened, os.O_PATH) if opened else 1_000_000
            reach = f"/proc/self/fd/{descriptor}"
            refusal = self.refusal(Mountpoint(ThreadlessReactor(), self.pool, path, reach).check())
            self.assertIn(path, refusal)
            if opened:
                os.close(descriptor)

    def test_a_missing_directory_is_named_with_the_option_that_makes_it(self) -> None:
        reason = self.refusal(self.at().check())
        self.assertIn(self.path, reason)
        self.assertIn("--mkdir", reason)

    def test_a_missing_directory_is_made_and_removed_on_request(self) -> None:
        mountpoint = self.at()
        self.run_to(mountpoint.check(make=True))
        self.assertTrue(os.path.isdir(self.path))
        self.run_to(mountpoint.remove_if_made())
        self.assertFalse(os.path.exists(self.path))
        self.run_to(mountpoint.remove_if_made())

    def test_a_directory_that_was_there_is_not_removed(self) -> None:
        os.mkdir(self.path)
        mountpoint = self.at()
        self.run_to(mountpoint.check(make=True))
        self.run_to(mountpoint.remove_if_made())
        self.assertTrue(os.path.isdir(self.path))

    def test_one_that_an_earlier_process_made_is_removed_too(self) -> None:
        mountpoint = self.at()
        self.assertTrue(self.run_to(mountpoint.is_missing()))
        os.mkdir(self.path)
        self.assertFalse(self.run_to(mountpoint.is_missing()))
        mountpoint.adopt(0, made=True)
        self.run_to(mountpoint.remove_if_made())
        self.assertFalse(os.path.exists(self.path))

    def test_a_made_directory_that_is_in_use_stays(self) -> None:
        mountpoint = self.at()
        self.run_to(mountpoint.check(make=True))
        Path(self.path, "file").touch()
        self.run_to(mountpoint.remove_if_made())
        self.assertTrue(os.path.isdir(self.path))

    def test_only_the_last_part_of_a_path_is_made(self) -> None:
        reason = self.refusal(self.at(os.path.join(self.path, "deeper")).check(make=True))
        self.assertIn(f"no directory {self.path}:", reason)
        self.assertFalse(os.path.exists(self.path))

    def test_a_file_is_refused(self) -> None:
        Path(self.path).touch()
        self.assertIn("not a directory", self.refusal(self.at().check(make=True)))

    def test_a_mount_point_is_refused_with_what_is_mounted(self) -> None:
        reason = self.refusal(self.at("/proc").check())
        self.assertIn("is a mount point already, of proc (type proc)", reason)

    def test_a_directory_that_was_made_for_a_start_that_is_cancelled_goes(self) -> None:
        self.pool.held = True
        checking = Deferred.fromCoroutine(self.at().check(make=True))
        checking.cancel()
        self.pool.run()
        self.failureResultOf(checking, CancelledError)
        self.assertFalse(os.path.exists(self.path))


class MountTests(MountpointTestCase):
    """With a kernel of paper: ``mountinfo`` is what is mounted, ``calls`` the system calls."""

    def setUp(self) -> None:
        super().setUp()
        self.mountinfo = Path(self.directory, "mountinfo")
        self.mountinfo.write_text(SCENERY)
        self.calls: list[tuple[object, ...]] = []
        self.refuses: OSError | None = None
        for name, stand_in in (
            ("MOUNTINFO", self.mountinfo),
            ("mount", self.mount),
            ("umount", self.umount),
            ("find_holders", lambda mount: [Holder(42, "cat")]),
        ):
            patcher = patch.object(module, name, stand_in)
            patcher.start()
            self.addCleanup(patcher.stop)

    def becomes(self, *mounts: tuple[int, int, str, str]) -> None:
        lines = [
            f"{own} {parent} 43:0 / {path} ro - erofs {source} ro\n" for own, parent, path, source in mounts
        ]
        self.mountinfo.write_text(SCENERY + "".join(lines))

    def mount(self, *arguments: object) -> None:
        self.calls.append(("mount", *arguments))
        if self.refuses:
            raise self.refuses
        self.becomes((7, 1, self.path, "/dev/nbd0"))

    def umount(self, path: str, flags: int) -> None:
        self.calls.append(("umount", path, flags))
        if self.refuses:
            raise self.refuses
        self.becomes()

    def mounted(self) -> Mountpoint:
        mountpoint = self.at()
        self.run_to(mountpoint.mount("/dev/nbd0", "erofs", MountOptions(data="user_xattr")))
        self.calls.clear()
        return mountpoint

    def test_mount_passes_on_what_it_was_given(self) -> None:
        self.run_to(self.at().mount("/dev/nbd0", "erofs", MountOptions(data="user_xattr")))
        self.assertEqual([("mount", "/dev/nbd0", self.path, "erofs", 7, "user_xattr")], self.calls)

    def test_it_is_mounted_by_the_way_that_leads_there(self) -> None:
        mountpoint = Mountpoint(ThreadlessReactor(), self.pool, self.path, "/proc/1/fd/2")
        self.run_to(mountpoint.mount("/dev/nbd0", "erofs", MountOptions()))
        self.assertEqual("/proc/1/fd/2", self.calls[0][2])
        self.assertEqual(7, mountpoint.mount_id)

    def test_a_refused_mount_says_why_and_what_to_do(self) -> None:
        causes = {
            1: "root",
            19: "modprobe erofs",
            15: "BACKED_BY_FILE",
            22: "dmesg",
            95: "support",
            117: "damaged",
        }
        for number, hint in {**causes, 5: "log", 16: "in use", 12: "dmesg"}.items():
            self.refuses = OSError(number, os.strerror(number))
            reason = self.refusal(self.at().mount("/dev/nbd0", "erofs", MountOptions()))
            self.assertIn(os.strerror(number), reason)
            self.assertIn(hint, reason)

    def test_a_mount_that_is_cancelled_is_undone_when_it_has_ended(self) -> None:
        self.pool.held = True
        mounting = Deferred.fromCoroutine(self.at().mount("/dev/nbd0", "erofs", MountOptions()))
        mounting.cancel()
        self.assertNoResult(mounting)
        self.pool.run()
        self.failureResultOf(mounting, CancelledError)
        self.assertEqual(["mount", "umount"], [call[0] for call in self.calls])

    def test_unmount_takes_no_symbolic_link_and_may_be_lazy(self) -> None:
        self.run_to(self.mounted().unmount())
        self.assertEqual([("umount", self.path, 8)], self.calls)
        self.run_to(self.mounted().unmount(lazy=True))
        self.assertEqual([("umount", self.path, 8 | 2)], self.calls)

    def test_what_is_unmounted_already_is_left_alone(self) -> None:
        mountpoint = self.mounted()
        self.becomes()
        self.run_to(mountpoint.unmount())
        self.becomes((8, 1, self.path, "/dev/other"))
        self.run_to(mountpoint.unmount())
        self.assertEqual([], self.calls)

    def test_what_is_mounted_over_it_is_left_alone(self) -> None:
        mountpoint = self.mounted()
        self.becomes((7, 1, self.path, "/dev/nbd0"), (8, 7, self.path, "/dev/other"))
        self.assertIn("/dev/other (type erofs) is mounted over it", self.refusal(mountpoint.unmount()))
        self.assertEqual([], self.calls)

    def test_a_mount_that_somebody_else_made_is_unmounted_on_request(self) -> None:
        self.becomes((8, 1, self.path, "/dev/other"))
        self.run_to(self.at().unmount())
        self.assertEqual([("umount", self.path, 8)], self.calls)

    def test_a_busy_mount_names_who_uses_it(self) -> None:
        mountpoint = self.mounted()
        self.becomes((7, 1, self.path, "/dev/nbd0"), (8, 7, f"{self.path}/sub", "/dev/other"))
        self.refuses = OSError(16, "busy")
        busy = self.failureResultOf(Deferred.fromCoroutine(mountpoint.unmount()), Busy).value
        self.assertEqual([Holder(42, "cat")], busy.holders)
        self.assertEqual(
            f"{self.path} is in use by cat (process 42), the mount on {self.path}/sub", str(busy)
        )

    def test_an_unmount_that_somebody_else_was_faster_with_is_one(self) -> None:
        mountpoint = self.mounted()
        self.refuses = OSError(22, "not mounted")
        self.run_to(mountpoint.unmount())

    def test_any_other_refusal_to_unmount_is_said(self) -> None:
        mountpoint = self.mounted()
        self.refuses = OSError(1, "Operation not permitted")
        self.assertIn("Operation not permitted", self.refusal(mountpoint.unmount()))

    def test_holders_are_those_of_the_mount_on_top(self) -> None:
        self.assertEqual([], self.run_to(self.at().holders()))
        self.assertEqual([Holder(42, "cat")], self.run_to(self.mounted().holders()))
