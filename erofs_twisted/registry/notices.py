"""What a registry wants its users to know: ``Warning`` headers (distribution specification, "Warnings")."""

from __future__ import annotations

import re
from collections.abc import Iterable

MAX_TEXT = 300
MAX_TEXTS = 32
"""Different ones that are remembered; more are not passed on."""

_WARNING = re.compile(r'(?:^|[\s,])299 +(\S+) +"((?:[^"\\]|\\.)*)"', re.DOTALL)
_QUOTED_PAIR = re.compile(r"\\(.)", re.DOTALL)


def parse_warnings(lines: Iterable[str]) -> list[str]:
    """The texts of those that are meant for users (``299 - "…"``), as they may be shown; '' is none."""
    texts = (_shown(match[2]) for line in lines for match in _WARNING.finditer(line))
    return [text for text in texts if text]


def _shown(quoted: str) -> str:
    text = _QUOTED_PAIR.sub(r"\1", quoted)
    return "".join(character if character.isprintable() else " " for character in text).strip()[:MAX_TEXT]


class Notices:
    """Tells what is new from what was said before."""

    def __init__(self) -> None:
        self._seen: set[str] = set()

    def new(self, lines: Iterable[str]) -> list[str]:
        """The texts in ``Warning`` headers that none of those before them held."""
        new = [text for text in dict.fromkeys(parse_warnings(lines)) if text not in self._seen]
        new = new[: MAX_TEXTS - len(self._seen)]
        self._seen.update(new)
        return new
