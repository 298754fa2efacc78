"""How a blob can be had from a server: by ranges or not, how soon, how fast."""

from __future__ import annotations

import attrs

from erofs_twisted.registry.answers import status_error
from erofs_twisted.registry.body import abandon, receive
from erofs_twisted.registry.host import RegistryHost
from erofs_twisted.registry.manifest import Descriptor
from erofs_twisted.registry.session import Answer
from erofs_twisted.registry.urls import Origin, redacted

SAMPLE = 4 << 20
"""Bytes from which the throughput is told."""
ROUND_TRIPS = 3
PATIENCE = 15.0


@attrs.frozen
class Probe:
    """What one server did.

    ``origin`` is where the bytes come from, after all redirects. ``round_trip`` is in seconds, the shortest
    of a few requests on a connection that was open; ``throughput`` in bytes a second, of ``sample`` bytes.
    Both are None where ranges are not answered.
    """

    host: str
    origin: str
    has_ranges: bool
    round_trip: float | None = None
    throughput: float | None = None
    sample: int = 0


async def probe_blob(host: RegistryHost, descriptor: Descriptor) -> Probe:
    """Ask ``host`` for a few parts of a blob. Raises `RegistryError`."""
    clock = host.transport.clock
    answer = await _ask(host, host.url(f"blobs/{descriptor.digest}"), 1)
    url, has_ranges = answer.url, answer.response.code == 206
    origin = Origin.of(url)
    where = f"{origin.scheme}://{redacted(url).split('/')[2]}"
    if not has_ranges:
        abandon(answer.response)
        return Probe(str(host), where, has_ranges)
    await receive(answer.response, _ignore, clock, PATIENCE)
    times = []
    for _ in range(ROUND_TRIPS):
        began = clock.seconds()
        await receive((await _ask(host, url, 1)).response, _ignore, clock, PATIENCE)
        times.append(clock.seconds() - began)
    sample = min(descriptor.size, SAMPLE)
    began = clock.seconds()
    await receive((await _ask(host, url, sample)).response, _ignore, clock, PATIENCE)
    took = clock.seconds() - began
    return Probe(str(host), where, has_ranges, min(times), sample / took if took else None, sample)


async def _ask(host: RegistryHost, url: str, length: int) -> Answer:
    """For the first bytes."""
    answer = await host.session.get(url, {"Range": f"bytes=0-{length - 1}"}, PATIENCE)
    if answer.response.code not in (200, 206):
        raise await status_error(answer.response, answer.url, host.transport.clock, PATIENCE)
    return answer


def _ignore(data: bytes) -> bool:
    return True
