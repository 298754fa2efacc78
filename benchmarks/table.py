"""The lines of the table: what was measured, against which bar, and was it met?"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Iterable, Sequence

import attrs
from rich.console import Console
from rich.table import Table

console = Console(highlight=False, width=None if sys.stdout.isatty() else 180)


@attrs.frozen
class Row:
    """``met`` is None for what is only reported."""

    what: str
    measured: str
    bar: str = ""
    met: bool | None = None
    details: str = ""


def at_least(what: str, ratios: Sequence[float], bar: float, details: str = "") -> Row:
    """The median of ratios (of reference to ours, each of one run), which has to reach ``bar``."""
    ratio = statistics.median(ratios)
    return Row(what, f"{ratio:.2f} x{spread(ratios)}", f">= {bar:.1f} x", ratio >= bar, details)


def at_most(what: str, seconds: Sequence[float], bar: float | None, details: str = "") -> Row:
    """The median of seconds, which may come to ``bar``."""
    median = statistics.median(seconds)
    measured = f"{median:.2f} s{spread(seconds)}"
    if bar is None:
        return Row(what, measured, details=details)
    return Row(what, measured, f"<= {bar:.2f} s", median <= bar, details)


def spread(values: Sequence[float]) -> str:
    """The least and the most."""
    return f" ({min(values):.2f}-{max(values):.2f})" if len(values) > 1 else ""


def medians(*columns: Iterable[float]) -> list[float]:
    return [statistics.median(column) for column in columns]


def show(rows: Sequence[Row]) -> bool:
    """Print the table; was every bar met?"""
    table = Table("", "measured", "bar", "", "seconds, counts", box=None, header_style="bold")
    for row in rows:
        verdict = {True: "[green]met[/green]", False: "[red]MISSED[/red]", None: ""}[row.met]
        table.add_row(row.what, row.measured, row.bar, verdict, row.details)
    console.print(table)
    missed = sum(row.met is False for row in rows)
    judged = sum(row.met is not None for row in rows)
    console.print(f"\n{judged - missed} of {judged} bars met")
    return not missed


def markdown(rows: Sequence[Row]) -> str:
    """The table, for the manual."""
    verdicts = {True: "met", False: "**missed**", None: ""}
    lines = ["| what | measured | bar | | seconds, counts |", "| --- | --- | --- | --- | --- |"]
    for row in rows:
        cells = (row.what, row.measured, row.bar, verdicts[row.met], row.details)
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join([*lines, ""])
