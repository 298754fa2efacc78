"""The commands of ``erofs-nbd``, as it declares them."""

from __future__ import annotations

from collections.abc import Iterator

import click


def every_command(group: click.Group, before: str = "") -> Iterator[tuple[str, click.Command]]:
    """Each command that does something, and the words that lead to it."""
    for name, command in group.commands.items():
        if isinstance(command, click.Group):
            yield from every_command(command, f"{before}{name} ")
        else:
            yield f"{before}{name}", command
