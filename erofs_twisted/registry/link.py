"""``Link`` (RFC 8288): where a list that came in part goes on."""

from __future__ import annotations

import re
from collections.abc import Iterable

MAX_LENGTH = 16 * 1024

# Possessive quantifiers: whoever writes the header is not to have us try again and again.
_TARGET = re.compile(r"[\s,]*+<([^<>]*+)>")
_PARAMETER = re.compile(r'\s*+;\s*+([^\s=;,"<>]*+)(?:\s*+=\s*+(?:"((?:[^"\\]|\\.)*+)"|([^\s;,"]*+)))?')
_END = re.compile(r"\s*+(?:,|\Z)")


def next_target(lines: Iterable[str]) -> str | None:
    """The target of the first link whose relation is ``next``, as it stands there; None where there is none.

    What cannot be read ends the search in its line.
    """
    for line in lines:
        position = 0
        while len(line) <= MAX_LENGTH and (target := _TARGET.match(line, position)) is not None:
            relation, position = _relation(line, target.end())
            if "next" in relation.lower().split():
                return target[1].strip()
            end = _END.match(line, position)
            if end is None:
                break
            position = end.end()
    return None


def _relation(line: str, position: int) -> tuple[str, int]:
    """The first ``rel`` (the others don't count), and where the parameters end."""
    relation: str | None = None
    while (parameter := _PARAMETER.match(line, position)) is not None:
        name, quoted, plain = parameter.groups()
        if relation is None and name.lower() == "rel":
            relation = re.sub(r"\\(.)", r"\1", quoted) if quoted is not None else plain or ""
        position = parameter.end()
    return relation or "", position
