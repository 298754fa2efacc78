"""Mount options, as mount(8) takes them."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st
from twisted.trial.unittest import SynchronousTestCase

from erofs_twisted.mount.options import (
    FLAGS,
    MS_NOATIME,
    MS_NODEV,
    MS_NOEXEC,
    MS_NOSUID,
    MS_RDONLY,
    MountOptions,
)

ALWAYS = MS_RDONLY | MS_NOSUID | MS_NODEV


class MountOptionsTests(SynchronousTestCase):
    def test_a_mount_is_read_only_without_devices_and_set_user_id(self) -> None:
        self.assertEqual((ALWAYS, ""), (MountOptions().flags, MountOptions().data))
        self.assertEqual(ALWAYS, MountOptions(0).flags)

    def test_flags_are_the_kernels_and_the_rest_is_the_file_systems(self) -> None:
        options = MountOptions.parse("noexec,cache_strategy=readaround, noatime,user_xattr")
        self.assertEqual(ALWAYS | MS_NOEXEC | MS_NOATIME, options.flags)
        self.assertEqual("cache_strategy=readaround,user_xattr", options.data)

    def test_what_is_so_anyway_may_be_said(self) -> None:
        self.assertEqual(MountOptions(), MountOptions.parse("ro,nosuid,nodev,defaults"))

    def test_what_cannot_be_is_refused_by_name(self) -> None:
        for text in ("rw", "noatime,suid", "dev", "remount", "bind"):
            error = self.assertRaises(ValueError, MountOptions.parse, text)
            self.assertIn(repr(text.split(",")[-1]), str(error))

    def test_an_empty_option_is_refused(self) -> None:
        for text in ("", "noatime,", ",", "a,,b"):
            self.assertRaises(ValueError, MountOptions.parse, text)

    def test_more_than_the_kernel_takes_is_refused(self) -> None:
        MountOptions.parse("x" * 4095)
        self.assertRaises(ValueError, MountOptions.parse, "x" * 4096)
        self.assertRaises(ValueError, MountOptions.parse, "é" * 2048)

    @given(st.text())
    def test_whatever_is_accepted_is_safe(self, text: str) -> None:
        try:
            options = MountOptions.parse(text)
        except ValueError:
            return
        self.assertEqual(ALWAYS, options.flags & ALWAYS)
        self.assertNotIn("\0", options.data)
        self.assertFalse(set(options.data.split(",")) & set(FLAGS))
