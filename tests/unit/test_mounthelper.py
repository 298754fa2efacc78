"""What mount(8) and fstab say, as options of ours."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st
from twisted.trial.unittest import SynchronousTestCase

from erofs_twisted.errors import MountError
from erofs_twisted.mounthelper import parse_options
from erofs_twisted.options import OPTIONS


class OptionTests(SynchronousTestCase):
    def test_ours_go_by_their_names_with_and_without_values(self) -> None:
        self.assertEqual(
            {"fill": "full", "mkdir": True, "io-timeout": "60"},
            parse_options(["fill=full,mkdir,io-timeout=60"]),
        )

    def test_those_of_erofs_utils_are_other_names(self) -> None:
        self.assertEqual(
            {"platform": "linux/arm64", "layer": "1", "username": "alice", "password": "a=b"},
            parse_options(["oci.platform=linux/arm64,oci.layer=1,oci.username=alice,oci.password=a=b"]),
        )

    def test_what_is_fstabs_own_says_nothing(self) -> None:
        text = (
            "rw,_netdev,nofail,noauto,user,defaults,x-systemd.automount,x-systemd.idle-timeout=1min,comment=x"
        )
        self.assertEqual({}, parse_options([text]))

    def test_what_is_not_ours_is_for_the_kernel(self) -> None:
        self.assertEqual(
            {"options": "ro,noexec,cache_strategy=readaround", "fill": "off"},
            parse_options(["ro,noexec", "fill=off,cache_strategy=readaround"]),
        )

    def test_sloppily_it_is_left_out(self) -> None:
        self.assertEqual({"fill": "off"}, parse_options(["fill=off,strange=1"], sloppy=True))

    def test_several_are_taken_together_and_the_last_one_holds(self) -> None:
        self.assertEqual({"fill": "off", "layer": "0"}, parse_options(["fill=full,,layer=0", "fill=off"]))

    def test_a_value_that_is_missing_or_too_much_is_said(self) -> None:
        self.assertIn("-o fill: has no value; write fill=auto|off|full", self.refusal("fill"))
        self.assertIn("-o oci.layer: has no value", self.refusal("oci.layer="))
        self.assertIn("-o mkdir: takes no value", self.refusal("mkdir=yes"))

    def refusal(self, text: str) -> str:
        return str(self.assertRaises(MountError, parse_options, [text]))

    @given(st.lists(st.text()))
    def test_any_text_is_options_or_is_refused(self, texts: list[str]) -> None:
        try:
            found = parse_options(texts)
        except MountError as error:
            self.assertTrue(str(error).startswith("-o "))
        else:
            self.assertLessEqual(found.keys(), OPTIONS.keys() | {"password"})
