"""README.md and docs/ say what the program says: the words of its options, the names of its commands."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import click
from twisted.trial.unittest import SynchronousTestCase

from erofs_twisted.cli import commands
from erofs_twisted.options import OPTIONS, Option
from tests.commands import every_command

PROJECT = Path(__file__).parents[2]
README = PROJECT / "README.md"
PAGES = sorted((PROJECT / "docs").glob("*.md"))
TABLE = re.compile(r"<!-- options -->\n(.*?)<!-- /options -->", re.DOTALL)
LINK = re.compile(r"\]\(([^)#:\s]+)(?:#[^)]*)?\)")
CODE_BLOCK = re.compile(r"^```(sh|console)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
HEADING = re.compile(r"^### `(--.+)`\n\n(.+?)\n\n", re.MULTILINE)


def spelling(option: Option) -> str:
    return f"--{option.name}" + (f" {option.metavar}" if option.metavar else "")


def expected_table() -> str:
    cells = [(f"`{spelling(option)}`", option.help) for option in OPTIONS.values()]
    rows = ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in cells]
    return "\n".join(["| option | meaning |", "| --- | --- |", *rows, ""])


def command_lines(text: str) -> Iterator[list[str]]:
    """The words of each command in a page's code blocks: sh has comments, console has prompts."""
    for language, block in CODE_BLOCK.findall(text):
        for line in block.replace("\\\n", " ").splitlines():
            yield shlex.split(line[2:] if language == "console" else line, comments=language == "sh")


class OptionTests(SynchronousTestCase):
    maxDiff = None

    def test_the_table_in_the_readme_has_the_words_of_help(self) -> None:
        (table,) = TABLE.findall(README.read_text())
        self.assertEqual(expected_table(), table)

    def test_the_manual_explains_each_option_under_its_own_words(self) -> None:
        text = (PROJECT / "docs" / "options.md").read_text()
        found = [(name, " ".join(words.split())) for name, words in HEADING.findall(text)]
        self.assertEqual([(spelling(option), option.help) for option in OPTIONS.values()], found)


class ExampleTests(SynchronousTestCase):
    """Commands in code blocks are such that the program would take them."""

    def test_the_options_of_the_plugin_exist(self) -> None:
        known = {f"--{option.name}" for option in OPTIONS.values()} | {"--help"}
        for page in (README, *PAGES):
            for words in command_lines(page.read_text()):
                if any(word.endswith("twistd") for word in words) and "erofs-nbd" in words:
                    given = self.options_among(words[words.index("erofs-nbd") :])
                    self.assertEqual(set(), given - known, f"{page.name}: {shlex.join(words)}")

    def test_the_commands_and_their_options_exist(self) -> None:
        known = dict(every_command(commands))
        seen = set()
        for page in (README, *PAGES):
            for words in command_lines(page.read_text()):
                if not words or not re.fullmatch(r"(.*/)?erofs-nbd", words[0]):
                    continue
                where = f"{page.name}: {shlex.join(words)}"
                name = next((n for n in known if words[1 : 1 + len(n.split())] == n.split()), None)
                self.assertTrue(name or words[1] in ("--help", "--version"), where)
                if name:
                    seen.add(name)
                    ours = words[: words.index("--")] if "--" in words else words
                    given = self.options_among(ours)
                    self.assertEqual(set(), given - self.options_of(known[name]), where)
        self.assertEqual(set(known), seen)

    def options_among(self, words: list[str]) -> set[str]:
        return {word.partition("=")[0] for word in words if word.startswith("--")}

    def options_of(self, command: click.Command) -> set[str]:
        parameters = command.params
        return {"--help"} | {name for p in parameters if isinstance(p, click.Option) for name in p.opts}


class LinkTests(SynchronousTestCase):
    def test_links_between_files_lead_somewhere(self) -> None:
        missing = [
            f"{page.name}: {target}"
            for page in (README, *PAGES)
            for target in LINK.findall(page.read_text())
            if not (page.parent / target).exists()
        ]
        self.assertEqual([], missing)
