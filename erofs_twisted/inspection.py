"""What an image is, for people and for programs."""

from __future__ import annotations

from typing import Any

import attrs
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from erofs_twisted.image import is_erofs, resolved_in_store
from erofs_twisted.options import ImageConfig
from erofs_twisted.registry.manifest import ResolvedImage
from erofs_twisted.registry.probe import Probe

WIDTH = 240
"""Columns: the longest media type, a SHA-512 digest, and the rest."""


async def resolve(reactor: Any, config: ImageConfig) -> ResolvedImage:
    """Ask the image's origin. Raises what its store raises."""
    async with resolved_in_store(reactor, config) as (_, resolved):
        return resolved


async def look_at(reactor: Any, config: ImageConfig) -> tuple[ResolvedImage, Probe | None]:
    """`resolve`; for who wants to know more, also how the layer that would be mounted can be had from its
    registry."""
    async with resolved_in_store(reactor, config) as (store, resolved):
        layers = resolved.layers
        if not config.verbose or not layers:
            return resolved, None
        return resolved, await store.probe(next(filter(is_erofs, layers), layers[0]))


def as_dict(image: ResolvedImage, probe: Probe | None = None) -> dict[str, Any]:
    """For JSON: sizes in bytes, times in seconds, layers in the manifest's order, the lowest first."""
    return {
        **({} if probe is None else {"probe": attrs.asdict(probe)}),
        "reference": str(image.reference),
        "digest": image.digest,
        "index_digest": image.index_digest,
        "platform": str(image.platform) if image.platform else None,
        "platforms": [str(platform) for platform in image.platforms],
        "layers": [
            {
                "index": index,
                "media_type": layer.media_type,
                "size": layer.size,
                "digest": layer.digest,
                "erofs": is_erofs(layer),
            }
            for index, layer in enumerate(image.layers)
        ],
    }


def show(image: ResolvedImage, probe: Probe | None = None, console: Console | None = None) -> None:
    """Print a table, as wide as it takes: a digest that is cut short is of no use."""
    console = console or Console(width=WIDTH, highlight=False)
    facts = [("image", str(image.reference)), ("digest", image.digest)]
    if image.index_digest:
        facts.append(("index", image.index_digest))
    if image.platform:
        facts.append(("platform", str(image.platform)))
    if image.platforms:
        facts.append(("platforms", ", ".join(map(str, image.platforms))))
    if probe is not None:
        facts += _facts(probe)
    for name, value in facts:
        console.print(f"[bold]{name:<10}[/bold] {escape(value)}")
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("layer", justify="right")
    table.add_column("EROFS")
    table.add_column("size", justify="right")
    table.add_column("media type", no_wrap=True)
    table.add_column("digest", no_wrap=True)
    for index, layer in enumerate(image.layers):
        erofs = "[green]yes[/green]" if is_erofs(layer) else "no"
        table.add_row(str(index), erofs, f"{layer.size:,}", escape(layer.media_type), layer.digest)
    console.print()
    console.print(table)


def _facts(probe: Probe) -> list[tuple[str, str]]:
    facts = [
        ("server", probe.host),
        ("blobs from", probe.origin),
        ("ranges", "yes" if probe.has_ranges else "no: each read of a large layer fetches all of it"),
    ]
    if probe.round_trip is not None:
        facts.append(("round trip", f"{1000 * probe.round_trip:.1f} ms"))
    if probe.throughput is not None:
        facts.append(("throughput", f"{probe.throughput / 1e6:.1f} MB/s ({probe.sample:,} bytes)"))
    return facts
