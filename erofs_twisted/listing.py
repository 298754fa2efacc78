"""The mounts on record, for people and for programs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from erofs_twisted.state.journal import daemon_runs
from erofs_twisted.state.records import TOLD, MountRecord, Status

WIDTH = 400


def as_dicts(records: Sequence[MountRecord]) -> list[dict[str, Any]]:
    """For JSON: their fields, and what `state` says."""
    return [
        {**{name: getattr(record, name) for name in (*TOLD, "pid")}, "status": state(record)}
        for record in records
    ]


def state(record: MountRecord) -> str:
    """How far a mount has come, also where its daemon can say nothing any more: then it is 'orphaned'."""
    is_failed = record.status is Status.FAILED
    return str(record.status) if is_failed or daemon_runs(record) else "orphaned"


def show(records: Sequence[MountRecord]) -> None:
    """Print a table, as wide as it takes."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("mount point", "image", "device", "status"):
        table.add_column(name, no_wrap=True)
    table.add_column("daemon", justify="right")
    for record in records:
        told = state(record) + (f": {record.reason}" if record.reason else "")
        table.add_row(
            escape(record.mountpoint),
            escape(record.image),
            record.device or "-",
            escape(told),
            str(record.pid),
        )
    Console(width=WIDTH, highlight=False).print(table)
