"""Who keeps a mount busy, as procfs tells."""

from __future__ import annotations

import os
from pathlib import Path

from twisted.trial.unittest import SynchronousTestCase

from erofs_twisted.mount.holders import Holder, find_holders
from erofs_twisted.mount.mountinfo import Mount, mount_at, parse_mountinfo

MOUNT = Mount(77, 1, "43:16", "/", "/mnt", "erofs", "/dev/nbd1")


class PaperProcTests(SynchronousTestCase):
    """With a /proc of paper."""

    def setUp(self) -> None:
        self.proc = Path(self.mktemp())
        (self.proc / "self").mkdir(parents=True)

    def process(self, pid: int, command: str, *, mnt_id: int = 1, maps: str = "") -> Path:
        process = self.proc / str(pid)
        (process / "fdinfo").mkdir(parents=True)
        (process / "comm").write_text(f"{command}\n")
        (process / "fdinfo" / "3").write_text(f"pos:\t0\nflags:\t02\nmnt_id:\t{mnt_id}\nino:\t5\n")
        (process / "maps").write_text(maps)
        return process

    def test_a_process_with_an_open_file_on_it_holds_it(self) -> None:
        self.process(12, "other", mnt_id=7)
        self.process(9, "cat", mnt_id=77)
        self.assertEqual([Holder(9, "cat")], find_holders(MOUNT, self.proc))

    def test_a_process_with_a_mapped_file_of_it_holds_it(self) -> None:
        line = "7f0000000000-7f0000001000 r--p 00000000 {} 40 /mnt/lib/libc.so\n"
        self.process(9, "python", maps=line.format("2b:10"))
        self.process(10, "other", maps=line.format("2b:11"))
        self.assertEqual([Holder(9, "python")], find_holders(MOUNT, self.proc))

    def test_holders_come_by_process_number(self) -> None:
        for pid in (100, 20, 3):
            self.process(pid, "cat", mnt_id=77)
        self.assertEqual([3, 20, 100], [holder.pid for holder in find_holders(MOUNT, self.proc)])

    def test_a_process_that_ends_meanwhile_holds_nothing(self) -> None:
        (self.proc / "55").mkdir()
        self.assertEqual([], find_holders(MOUNT, self.proc))


class RealProcTests(SynchronousTestCase):
    def test_this_process_holds_the_mounts_that_it_works_on(self) -> None:
        mounts = parse_mountinfo(Path("/proc/self/mountinfo").read_bytes())
        root = mount_at(mounts, "/")
        assert root is not None
        self.assertIn(os.getpid(), [holder.pid for holder in find_holders(root)])

    def test_no_process_holds_a_mount_that_is_not(self) -> None:
        self.assertEqual([], find_holders(Mount(2**31 - 1, 1, "4095:1", "/", "/none", "erofs", "none")))

    def test_a_holder_says_its_name_and_number(self) -> None:
        self.assertEqual("cat (process 7)", str(Holder(7, "cat")))
