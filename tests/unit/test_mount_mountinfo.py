"""/proc/PID/mountinfo."""

from __future__ import annotations

import re

from hypothesis import given
from hypothesis import strategies as st
from twisted.trial.unittest import SynchronousTestCase

from erofs_twisted.mount.mountinfo import Mount, is_trapped, mount_at, mounts_below, parse_mountinfo

SAMPLE = rb"""
23 1 254:0 / / rw,relatime shared:1 - ext4 /dev/vda rw
24 23 0:22 / /proc rw,nosuid - proc proc rw
25 23 43:0 / /mnt/a\040b\134c ro,nosuid,nodev shared:5 master:1 - erofs /dev/nbd0 ro,user_xattr
26 25 0:40 / /mnt/a\040b\134c/sub rw - tmpfs tmpfs rw
""".strip()

numbers = st.integers(1, 2**31)
words = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), min_size=1, max_size=20)
mount_values = st.builds(
    Mount,
    mount_id=numbers,
    parent_id=numbers,
    device=st.from_regex(r"[0-9]{1,3}:[0-9]{1,6}", fullmatch=True),
    root=words,
    path=words,
    fstype=words,
    source=words,
)


def as_the_kernel_writes(mount: Mount, tags: list[str]) -> bytes:
    def escaped(text: str) -> str:
        return re.sub(r"[ \t\n\\#]", lambda match: f"\\{ord(match[0]):03o}", text)

    fields = [mount.mount_id, mount.parent_id, mount.device, escaped(mount.root), escaped(mount.path), "ro"]
    after = ["-", escaped(mount.fstype), escaped(mount.source), "ro"]
    return " ".join(map(str, [*fields, *tags, *after])).encode() + b"\n"


class MountinfoTests(SynchronousTestCase):
    def test_a_mount_has_its_source_and_its_place(self) -> None:
        wanted = Mount(25, 23, "43:0", "/", "/mnt/a b\\c", "erofs", "/dev/nbd0")
        self.assertEqual(wanted, parse_mountinfo(SAMPLE)[2])

    def test_a_path_leads_to_the_topmost_mount(self) -> None:
        stacked = SAMPLE + b"\n30 25 0:50 / /mnt/a\\040b\\134c rw - tmpfs second rw\n"
        for lines in (stacked, b"\n".join(reversed(stacked.split(b"\n")))):
            top = mount_at(parse_mountinfo(lines), "/mnt/a b\\c")
            self.assertEqual("second", top.source if top else None)

    def test_a_path_that_is_no_mount_point_leads_to_none(self) -> None:
        self.assertIsNone(mount_at(parse_mountinfo(SAMPLE), "/mnt"))

    def test_the_trap_of_an_automount_is_no_mount(self) -> None:
        trap = b"30 23 0:50 / /auto rw - autofs systemd-1 rw,fd=9,direct"
        self.assertTrue(is_trapped(parse_mountinfo(trap), "/auto"))
        self.assertFalse(is_trapped(parse_mountinfo(SAMPLE), "/mnt"))
        self.assertIsNone(mount_at(parse_mountinfo(trap), "/auto"))
        both = parse_mountinfo(trap + b"\n31 30 43:0 / /auto ro - erofs /dev/nbd0 ro")
        self.assertEqual(31, mount_at(both, "/auto").mount_id)

    def test_mounts_below_stand_on_it(self) -> None:
        below = mounts_below(parse_mountinfo(SAMPLE), 25)
        self.assertEqual(["/mnt/a b\\c/sub"], [mount.path for mount in below])

    def test_a_root_that_is_its_own_parent_is_not_below_itself(self) -> None:
        (root,) = parse_mountinfo(b"1 1 0:2 / / rw - rootfs rootfs rw")
        self.assertEqual([], mounts_below([root], 1))

    @given(
        st.lists(st.tuples(mount_values, st.lists(st.sampled_from(["shared:1", "master:2", "unbindable"]))))
    )
    def test_what_the_kernel_writes_is_read_back(self, mounts: list[tuple[Mount, list[str]]]) -> None:
        content = b"".join(as_the_kernel_writes(mount, tags) for mount, tags in mounts)
        self.assertEqual([mount for mount, _ in mounts], parse_mountinfo(content))

    @given(st.binary(max_size=300))
    def test_any_bytes_can_be_read(self, content: bytes) -> None:
        parse_mountinfo(content)

    @given(st.binary(min_size=1, max_size=30).filter(lambda path: not set(path) & set(b" \t\n\\#\0")))
    def test_a_path_that_is_not_utf_8_is_kept(self, path: bytes) -> None:
        (mount,) = parse_mountinfo(b"9 1 0:9 / /" + path + b" rw - tmpfs tmpfs rw")
        self.assertEqual(b"/" + path, mount.path.encode("utf-8", "surrogateescape"))
