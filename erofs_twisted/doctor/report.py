"""What the doctor found and did, for people and for programs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import attrs
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from erofs_twisted.doctor.finding import Finding, Level, Repair

WIDTH = 240
STYLES = {Level.OK: "green", Level.UNKNOWN: "cyan", Level.WARNING: "yellow", Level.BAD: "bold red"}
VERSION = 1
"""Of the form of `as_dict`: it changes with what a program that knows it would stumble over."""


@attrs.frozen
class Outcome:
    """Of a repair; ``problem`` tells why it was not done."""

    repair: Repair
    problem: str = ""


def bad_among(findings: Sequence[Finding]) -> int:
    """How many are bad."""
    return sum(finding.level is Level.BAD for finding in findings)


def as_dict(findings: Sequence[Finding], outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """For JSON: the findings are those after the repairs, ``can`` tells what ``--fix`` would do now."""
    return {
        "version": VERSION,
        "bad": bad_among(findings),
        "findings": [
            {
                "level": finding.level.value,
                "subject": finding.subject,
                "text": finding.text,
                "cure": finding.cure or None,
                "can": [_named(repair) for repair in finding.repairs],
            }
            for finding in findings
        ],
        "repairs": [
            {**_named(outcome.repair), "done": not outcome.problem, "problem": outcome.problem or None}
            for outcome in outcomes
        ],
    }


def show(
    findings: Sequence[Finding], outcomes: Sequence[Outcome] = (), console: Console | None = None
) -> None:
    """Print what was done, and a table of what there is, the cure of each below it."""
    console = console or Console(width=WIDTH, highlight=False)
    for outcome in outcomes:
        if outcome.problem:
            console.print(f"[bold red]not repaired[/bold red]: {escape(outcome.problem)}")
        else:
            console.print(escape(outcome.repair.told()))
    if outcomes:
        console.print()
    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_column(no_wrap=True)
    table.add_column()
    for finding in findings:
        style = STYLES[finding.level]
        table.add_row(
            f"[{style}]{finding.level.value}[/{style}]", escape(f"{finding.subject}: {finding.text}")
        )
        if finding.cure:
            table.add_row("", escape(f"→ {finding.cure}"))
    console.print(table)


def _named(repair: Repair) -> dict[str, str]:
    return {"act": repair.act.value, "target": repair.target}
