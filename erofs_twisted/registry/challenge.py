"""``WWW-Authenticate`` (RFC 9110, section 11.6.1): what a server accepts to let a client in.

A list of challenges whose separator, the comma, also separates the parameters inside each of them. Real
registries send several on one line or on several, unquoted URLs and empty values: all of that is read.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

import attrs

from erofs_twisted.registry.errors import InvalidHeader

MAX_LENGTH = 16 * 1024

_TOKEN = r"[!#$%&'*+.^_`|~0-9A-Za-z-]+"
_SEPARATORS = re.compile(r"[ \t,]*")
_SCHEME = re.compile(rf"({_TOKEN})(?=[ \t,]|\Z)[ \t]*")
_TOKEN68 = re.compile(r"([A-Za-z0-9._~+/-]+=*)[ \t]*(?=,|\Z)")
_PARAMETER = re.compile(
    rf'({_TOKEN})[ \t]*=[ \t]*(?:"((?:[^"\\]|\\.)*)"|([^ \t,"]*))[ \t]*(?=,|\Z)', re.DOTALL
)
_QUOTED_PAIR = re.compile(r"\\(.)", re.DOTALL)


@attrs.frozen
class Challenge:
    """One way in. ``scheme`` and the names of the parameters are lower case."""

    scheme: str
    parameters: Mapping[str, str] = attrs.field(factory=dict)
    token68: str | None = None


def parse_challenges(lines: Iterable[str]) -> list[Challenge]:
    """The challenges of all ``WWW-Authenticate`` lines of a response, in order. Raises `InvalidHeader`."""
    return [challenge for line in lines for challenge in _parse_line(line)]


def _parse_line(line: str) -> list[Challenge]:
    if len(line) > MAX_LENGTH:
        raise InvalidHeader(f"a WWW-Authenticate header of {len(line)} characters is too long")
    found: list[Challenge] = []
    parameters: dict[str, str] = {}
    position = _after(_SEPARATORS, line, 0)
    while position < len(line):
        parameter = _PARAMETER.match(line, position)
        if parameter and found:
            _reread_as_parameter(found, parameters)
            name, quoted, plain = parameter.groups()
            value = plain if quoted is None else _QUOTED_PAIR.sub(r"\1", quoted)
            parameters.setdefault(name.lower(), value)
            position = _after(_SEPARATORS, line, parameter.end())
            continue
        scheme = _SCHEME.match(line, position)
        if scheme is None:
            raise InvalidHeader(
                f"WWW-Authenticate: {line[:200]!r} cannot be read from {line[position:][:40]!r} on"
            )
        parameters = {}
        token68 = _TOKEN68.match(line, scheme.end())
        found.append(Challenge(scheme[1].lower(), parameters, token68[1] if token68 else None))
        position = _after(_SEPARATORS, line, token68.end() if token68 else scheme.end())
    return found


def _reread_as_parameter(found: list[Challenge], parameters: dict[str, str]) -> None:
    """``Bearer service=,realm="…"``: ``service=`` could be a token68, but no parameter may follow one."""
    last = found[-1]
    if last.token68 is None:
        return
    name, equals, rest = last.token68.partition("=")
    if equals and not rest:
        parameters[name.lower()] = ""
    found[-1] = attrs.evolve(last, token68=None)


def _after(pattern: re.Pattern[str], text: str, position: int) -> int:
    match = pattern.match(text, position)
    return match.end() if match else position
