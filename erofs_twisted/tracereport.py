"""The trace of an image, for people and for programs, and for its registry."""

from __future__ import annotations

from typing import Any

import click

from erofs_twisted.blocks.trace import Trace
from erofs_twisted.blocks.tracefile import TraceFiles
from erofs_twisted.errors import MountError
from erofs_twisted.image import choose_layer, resolved_in_store
from erofs_twisted.options import ImageConfig
from erofs_twisted.registry.digest import Digest
from erofs_twisted.tracing import find_trace, publish_trace

REQUEST = 1024 * 1024
"""Bytes that one request asks for at the least, where there are as many: over a fast link it is more."""


async def find(reactor: Any, config: ImageConfig) -> Trace:
    """The trace that a mount would use. Raises `MountError` where there is none."""
    async with resolved_in_store(reactor, config) as (store, resolved):
        layer = choose_layer(resolved, config.layer)
        trace = await find_trace(store, str(config.cache_dir), resolved, layer)
    if trace is None:
        raise MountError(
            f"there is no trace of {layer.digest}, neither below {config.cache_dir} nor beside "
            f"{config.reference}; 'erofs-nbd trace record' makes one"
        )
    return trace


async def push(reactor: Any, config: ImageConfig) -> Digest:
    """Push the trace in the cache; the digest of its manifest. Raises `MountError`, `RegistryError`."""
    files = TraceFiles(str(config.cache_dir))
    async with resolved_in_store(reactor, config) as (store, resolved):
        layer = choose_layer(resolved, config.layer)
        trace = files.load(layer.digest, layer.size)
        if trace is None:
            raise MountError(
                f"there is no {files.path(layer.digest)} (--cache-dir); 'erofs-nbd trace record' makes it"
            )
        return await publish_trace(store, resolved, trace, files.saved_at(layer.digest))


def summary(trace: Trace, path: str) -> str:
    """One line about what was recorded."""
    return f"recorded {_amount(trace)}: {path}"


def as_dict(trace: Trace) -> dict[str, Any]:
    """For JSON: ``ranges`` are [start, end) in bytes, in the order in which they were first read."""
    return {
        "digest": trace.digest,
        "size": trace.size,
        "bytes": trace.length,
        "requests": trace.requests(REQUEST),
        "ranges": [list(pair) for pair in trace.ranges],
    }


def show(trace: Trace) -> None:
    """Print what it comes to, then a line a range: where it starts, where it ends, its length."""
    click.echo(f"layer   {trace.digest}, {trace.size:,} bytes")
    click.echo(f"trace   {_amount(trace)}, at most {trace.requests(REQUEST)} requests")
    width = len(f"{trace.size:,}")
    for start, end in trace.ranges:
        click.echo(f"{start:>{width},}  {end:>{width},}  {end - start:>{width},}")


def _amount(trace: Trace) -> str:
    share = trace.length / trace.size if trace.size else 0.0
    return f"{trace.length:,} bytes ({share:.1%} of the layer) in {len(trace.ranges)} ranges"
