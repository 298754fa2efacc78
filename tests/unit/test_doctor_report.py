"""How findings are shown, and what is said of an image's registry."""

from __future__ import annotations

import io
import json
from typing import Any
from uuid import UUID

import attrs
from click.testing import CliRunner, Result
from rich.console import Console
from twisted.trial.unittest import SynchronousTestCase

from erofs_twisted.cli import commands
from erofs_twisted.doctor import examination
from erofs_twisted.doctor.cures import Cures
from erofs_twisted.doctor.finding import DONE, Act, Finding, Level, Repair
from erofs_twisted.doctor.registry import Answers, findings_of
from erofs_twisted.doctor.report import Outcome, as_dict, show
from erofs_twisted.erofs.superblock import Superblock
from erofs_twisted.errors import ErofsTwistedError
from erofs_twisted.registry.probe import Probe

FORGET = Repair(act=Act.FORGET, target="/mnt")
GOOD = Finding(Level.OK, "erofs", "this kernel has it")
BAD = Finding(Level.BAD, "/mnt", "dead [bold]", "erofs-nbd umount /mnt", (FORGET,))
NAME = "registry.example/app:1"
DIGEST = "sha256:12"
SUPERBLOCK = Superblock(
    block_size=4096,
    blocks=1,
    root_nid=36,
    meta_block=0,
    xattr_block=0,
    inodes=1,
    built=None,
    uuid=UUID(int=1),
    volume_name="",
    features=(),
    compression=(),
)


class ReportTests(SynchronousTestCase):
    def shown(self, findings: list[Finding], outcomes: list[Outcome]) -> list[str]:
        console = Console(file=io.StringIO(), width=100)
        show(findings, outcomes, console)
        return [line.rstrip() for line in console.file.getvalue().splitlines()]  # type: ignore[attr-defined]

    def test_the_cure_stands_below_what_it_is_for(self) -> None:
        lines = ["bad  /mnt: dead [bold]", "     → erofs-nbd umount /mnt", "ok   erofs: this kernel has it"]
        self.assertEqual(lines, self.shown([BAD, GOOD], []))

    def test_what_was_done_comes_first(self) -> None:
        outcomes = [Outcome(FORGET), Outcome(FORGET, "/mnt is served")]
        lines = ["forgot what was on record of /mnt", "not repaired: /mnt is served", ""]
        self.assertEqual([*lines, "ok  erofs: this kernel has it"], self.shown([GOOD], outcomes))

    def test_every_act_has_words(self) -> None:
        self.assertEqual(set(Act), set(DONE))

    def test_programs_get_a_stable_form(self) -> None:
        found = as_dict([GOOD, BAD], [Outcome(FORGET), Outcome(FORGET, "served")])
        forget = {"act": "forget", "target": "/mnt"}
        self.assertEqual(
            {
                "version": 1,
                "bad": 1,
                "findings": [
                    {"level": "ok", "subject": "erofs", "text": GOOD.text, "cure": None, "can": []},
                    {
                        "level": "bad",
                        "subject": "/mnt",
                        "text": BAD.text,
                        "cure": BAD.cure,
                        "can": [forget],
                    },
                ],
                "repairs": [
                    {**forget, "done": True, "problem": None},
                    {**forget, "done": False, "problem": "served"},
                ],
            },
            json.loads(json.dumps(found)),
        )


class CommandTests(SynchronousTestCase):
    def run_doctor(self, *looks: list[Finding], words: tuple[str, ...] = ()) -> Result:
        """With what is found at the first look, and at the next one."""
        self.looks = [examination.Examination(look, {}) for look in looks]
        self.patch(examination, "examine", lambda state_dir, cache_dir: self.looks.pop(0))
        return CliRunner().invoke(commands, ["doctor", *words])

    def test_the_status_is_1_only_where_something_is_bad(self) -> None:
        warning = Finding(Level.WARNING, "nbd", "slow", "a cure")
        self.assertEqual(0, self.run_doctor([GOOD, warning]).exit_code)
        done = self.run_doctor([GOOD, BAD])
        self.assertEqual(1, done.exit_code)
        self.assertIsInstance(done.exception, ErofsTwistedError)
        self.assertIn("1 of 2 findings is bad", str(done.exception))

    def test_without_fix_nothing_is_done(self) -> None:
        done = self.run_doctor([BAD], words=("--json",))
        self.assertEqual([], json.loads(done.stdout)["repairs"])

    def test_after_repairs_it_looks_again(self) -> None:
        class Paper:
            def apply(self, findings: list[Finding]) -> list[Outcome]:
                return [Outcome(repair) for finding in findings for repair in finding.repairs]

        self.patch(Cures, "of", lambda state_dir: Paper())
        done = self.run_doctor([GOOD, BAD], [GOOD], words=("--fix", "--json"))
        self.assertEqual(0, done.exit_code)
        found = json.loads(done.stdout)
        self.assertEqual((0, 1, 1), (found["bad"], len(found["findings"]), len(found["repairs"])))
        self.assertEqual([], self.looks)

    def test_options_of_the_registry_are_about_an_image(self) -> None:
        for words in (("--username", "alice"), ("--layer", "1"), ("--plain-http",)):
            done = self.run_doctor([GOOD], words=words)
            self.assertEqual(1, done.exit_code)
            self.assertIn(words[0], str(done.exception))


class RegistryTests(SynchronousTestCase):
    def found(self, **answers: Any) -> list[tuple[Level, str]]:
        findings = findings_of(NAME, Answers(**answers), {"LZ4": True, "ZSTD": False})
        self.assertTrue(all(f.cure for f in findings if f.level is not Level.OK))
        return [(finding.level, finding.subject) for finding in findings]

    def test_a_registry_that_does_not_answer_is_bad(self) -> None:
        self.assertEqual([(Level.BAD, "image")], self.found(problem="refused"))

    def test_where_credentials_come_from_is_said_once_for_each_server(self) -> None:
        line = "credentials for registry.example: /root/.docker/config.json"
        lines = ("GET https://registry.example/v2/", line, line)
        answers = Answers(digest=DIGEST, lines=lines, probe=Probe("h", "https://h", True))
        texts = [f.text for f in findings_of(NAME, answers, {}) if f.subject == "credentials"]
        self.assertEqual(["registry.example: /root/.docker/config.json"], texts)

    def test_a_layer_that_cannot_be_mounted_is_bad(self) -> None:
        found = self.found(digest=DIGEST, layer_problem="tar\n  0 tar")
        self.assertEqual([(Level.OK, "image"), (Level.BAD, "layer")], found)

    def test_blobs_that_cannot_be_had_are_bad(self) -> None:
        found = self.found(digest=DIGEST, problem="403")
        self.assertEqual([(Level.OK, "image"), (Level.BAD, "layer")], found)

    def test_a_layer_is_compressed_in_a_way_that_the_kernel_has_or_has_not_or_may_have(self) -> None:
        for compression, level in (
            ((), Level.OK),
            (("lz4",), Level.OK),
            (("lz4", "zstd"), Level.BAD),
            (("lz4", "lzma"), Level.UNKNOWN),
            (("lzma", "zstd"), Level.BAD),
        ):
            superblock = attrs.evolve(SUPERBLOCK, compression=compression)
            found = self.found(digest=DIGEST, superblock=superblock, probe=Probe("h", "https://h", True))
            self.assertEqual([(Level.OK, "image"), (level, "layer"), (Level.OK, "ranges")], found)

    def test_ranges_are_answered_or_not_or_there_is_no_registry(self) -> None:
        for probe, level in (
            (Probe("h", "https://h", True, 0.01, 1e6, 4096), Level.OK),
            (Probe("h", "https://h", False), Level.WARNING),
            (None, Level.OK),
        ):
            found = self.found(digest=DIGEST, probe=probe)
            self.assertEqual([(Level.OK, "image"), (level, "ranges")], found)

    def test_a_text_is_one_line(self) -> None:
        for finding in findings_of(NAME, Answers(problem="one\n  two\n"), {}):
            self.assertEqual("one; two", finding.text)
