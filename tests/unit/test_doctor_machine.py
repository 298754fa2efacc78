"""What is to be said of a machine: each check, for all that it may see."""

from __future__ import annotations

import itertools
from typing import Any

import attrs
from hypothesis import given
from hypothesis import strategies as st
from twisted.trial.unittest import SynchronousTestCase

from erofs_twisted.doctor.finding import Finding, Level
from erofs_twisted.doctor.machine import BACKED_BY_FILE, COMPRESSORS, Machine, Place, findings_of
from erofs_twisted.doctor.survey import parse_config, parse_symbols

GIB = 1 << 30
CACHE = Place(path="/cache", is_there=True, filesystem="ext4", room=9 * GIB, is_sparse=True)
STATE = Place(path="/run/state", is_there=True, filesystem="tmpfs", room=GIB)
WHOLE = Machine(
    release="6.12",
    may_administer=True,
    nbd_loaded=True,
    nbd_loadable=True,
    nbd_family=True,
    nbd_connected=1,
    nbd_free=15,
    max_part=0,
    erofs_known=True,
    erofs_loadable=True,
    config={option: "y" for option, _ in COMPRESSORS.values()},
    symbols=None,
    fuse_known=True,
    fuse_loadable=True,
    missing_programs=(),
    has_systemd=True,
    unit="/etc/systemd/system/erofs-nbd@.service",
    unit_program="",
    has_udev=True,
    udev_rule="/etc/udev/rules.d/60-erofs-twisted.rules",
    cache=CACHE,
    state=STATE,
)
WITHOUT_NBD = {"nbd_loaded": False, "nbd_loadable": False, "nbd_family": False}
WITHOUT_FUSE = {"missing_programs": ("nbdfuse (Debian: libnbd-bin)",)}


class MachineTests(SynchronousTestCase):
    def found(self, subject: str, **changes: Any) -> list[Finding]:
        machine = attrs.evolve(WHOLE, **changes)
        return [finding for finding in findings_of(machine) if finding.subject == subject]

    def assert_level(self, level: Level, subject: str, text: str = "", **changes: Any) -> None:
        finding = self.found(subject, **changes)[-1]
        self.assertEqual((level, True), (finding.level, text in finding.text + finding.cure), finding)
        self.assertTrue(level is Level.OK or finding.cure)

    def test_a_machine_that_has_all_is_well(self) -> None:
        self.assertEqual({Level.OK}, {finding.level for finding in findings_of(WHOLE)})

    def test_who_may_not_mount_is_told(self) -> None:
        self.assert_level(Level.BAD, "privileges", "run as root", may_administer=False)

    def test_erofs_is_there_or_can_be_loaded_or_cannot_be_told(self) -> None:
        for known, loadable, level in (
            (True, False, Level.OK),
            (True, None, Level.OK),
            (False, True, Level.OK),
            (False, None, Level.UNKNOWN),
            (False, False, Level.BAD),
        ):
            self.assert_level(level, "erofs", erofs_known=known, erofs_loadable=loadable)

    def test_compressors_are_told_from_the_configuration_or_from_symbols(self) -> None:
        names = list(COMPRESSORS)
        for chosen in itertools.product((False, True), repeat=len(names)):
            has = [name for name, there in zip(names, chosen, strict=True) if there]
            level = Level.OK if all(chosen) else Level.WARNING
            config = {COMPRESSORS[name][0]: "y" for name in has}
            symbols = frozenset(COMPRESSORS[name][1] for name in has)
            for seen in ({"config": config}, {"config": None, "symbols": symbols}):
                self.assert_level(level, "compression", ", ".join(has) or "not compressed", **seen)
        self.assert_level(Level.UNKNOWN, "compression", config=None, symbols=None)

    def test_without_nbd_there_is_fuse_and_without_both_nothing(self) -> None:
        self.assert_level(Level.WARNING, "nbd", "there is fuse", **WITHOUT_NBD)
        self.assert_level(Level.BAD, "nbd", **WITHOUT_NBD, **WITHOUT_FUSE)
        self.assert_level(Level.BAD, "fuse", "nbdfuse", **WITHOUT_NBD, **WITHOUT_FUSE)
        self.assert_level(Level.OK, "fuse", "nor needed", **WITHOUT_FUSE)

    def test_a_driver_without_netlink_is_of_no_use(self) -> None:
        self.assert_level(Level.WARNING, "nbd", "namespace", nbd_family=False)
        self.assert_level(Level.BAD, "nbd", "namespace", nbd_family=False, **WITHOUT_FUSE)

    def test_nbd_that_is_not_loaded_yet_is_well_or_cannot_be_told(self) -> None:
        self.assert_level(Level.OK, "nbd", nbd_loaded=False, nbd_family=False)
        unclear = {"nbd_loaded": False, "nbd_family": False, "nbd_loadable": None}
        self.assert_level(Level.UNKNOWN, "nbd", "kmod", **unclear)
        self.assert_level(Level.BAD, "nbd", "kmod", **unclear, **WITHOUT_FUSE)

    def test_a_driver_that_looks_for_partitions_is_slow(self) -> None:
        self.assert_level(Level.WARNING, "nbd", "max_part=0", max_part=16)

    def test_fuse_takes_its_device(self) -> None:
        for known, loadable, level in (
            (True, None, Level.OK),
            (False, True, Level.OK),
            (False, False, Level.BAD),
            (False, None, Level.BAD),
        ):
            self.assert_level(level, "fuse", fuse_known=known, fuse_loadable=loadable, **WITHOUT_NBD)

    def test_how_erofs_takes_files_is_told_where_it_can_be(self) -> None:
        self.assert_level(Level.OK, "fuse", "mounts its files", config={BACKED_BY_FILE: "y"})
        self.assert_level(Level.OK, "fuse", "loop devices", config={})
        self.assert_level(Level.OK, "fuse", "cannot be told", config=None)

    def test_a_cache_that_cannot_be_used_or_is_small_or_shared_is_told(self) -> None:
        for change, level in (
            ({"problem": "Permission denied"}, Level.BAD),
            ({"filesystem": "nfs4"}, Level.WARNING),
            ({"room": 0}, Level.WARNING),
            ({"room": -5}, Level.WARNING),
            ({"room": 1 << 20}, Level.WARNING),
            ({"is_sparse": False}, Level.WARNING),
            ({"is_there": False}, Level.OK),
        ):
            self.assert_level(level, "cache", cache=attrs.evolve(CACHE, **change))

    def test_a_state_directory_that_cannot_be_used_is_told_and_what_it_is_on(self) -> None:
        for change, level, text in (
            ({"problem": "Permission denied"}, Level.BAD, "--state-dir"),
            ({"path": "/" + 80 * "x"}, Level.WARNING, "shorter"),
            ({"filesystem": "ext4"}, Level.OK, "earlier boots"),
            ({"is_there": False}, Level.OK, "made when needed"),
        ):
            self.assert_level(level, "state", text, state=attrs.evolve(STATE, **change))

    def test_the_unit_is_looked_for_only_where_systemd_runs(self) -> None:
        self.assert_level(Level.WARNING, "systemd", "not installed", unit="")
        self.assert_level(Level.BAD, "systemd", "/opt/gone", unit_program="/opt/gone")
        self.assert_level(Level.OK, "systemd", has_systemd=False, unit="")

    def test_the_rule_is_looked_for_only_where_udev_and_nbd_are(self) -> None:
        self.assert_level(Level.WARNING, "udev", "no rule", udev_rule="")
        self.assertEqual([], self.found("udev", udev_rule="", has_udev=False))
        self.assertEqual([], self.found("udev", udev_rule="", **WITHOUT_NBD))


class ParserTests(SynchronousTestCase):
    def test_a_configuration_is_its_options_that_are_set(self) -> None:
        text = '#\n# CONFIG_A is not set\nCONFIG_B=y\nCONFIG_C=m\nCONFIG_D="a=b"\n\nother=y\n'
        self.assertEqual({"CONFIG_B": "y", "CONFIG_C": "m", "CONFIG_D": '"a=b"'}, parse_config(text))

    @given(st.text())
    def test_any_text_is_a_configuration(self, text: str) -> None:
        self.assertTrue(all(name.startswith("CONFIG_") for name in parse_config(text)))

    def test_symbols_tell_the_decompressors_if_erofs_is_among_them(self) -> None:
        erofs = "000000011cdee4e4 t erofs_init_fs_context\t[erofs]"
        lz4 = "000000011cdf2a57 t z_erofs_lz4_decompress\t[erofs]"
        other = "000000011cdf2a58 t ext4_mount"
        self.assertEqual(frozenset({"z_erofs_lz4_decompress"}), parse_symbols([other, erofs, lz4]))
        self.assertEqual(frozenset(), parse_symbols([erofs]))
        self.assertIsNone(parse_symbols([other]))

    @given(st.lists(st.text(alphabet="erofs_ z\t", max_size=30)))
    def test_no_lines_make_it_fail(self, lines: list[str]) -> None:
        self.assertIn(parse_symbols(lines), (None, frozenset()))
