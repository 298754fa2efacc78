"""What the registry's client lives through: ``python -m benchmarks.endurance [--quick] [NAME...]``.

Real servers, and faults in front of them. All figures but the times are to be met on any machine. The status
is 1 if a bar was missed.
"""

from __future__ import annotations

import argparse
import itertools
import os
import statistics
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable
from contextlib import ExitStack
from pathlib import Path
from random import Random, random
from typing import Any

import attrs
from twisted.internet.defer import Deferred, gatherResults
from twisted.internet.task import deferLater, react

from benchmarks.machine import machine
from benchmarks.table import Row, console, markdown, show
from erofs_twisted.registry.platform import Platform
from erofs_twisted.registry.reference import parse_reference
from erofs_twisted.registry.retry import Backoff
from erofs_twisted.registry.store import open_store
from tests.daemon import FaultRegistry
from tests.dialling import Dialling
from tests.faults import REFUSALS, REGISTRY_FAULTS, Fault
from tests.images import EROFS, Layout, push
from tests.ranges import Reads, read_one, read_ranges
from tests.servers import DockerRegistry, Nginx, SignedURLs, TokenServer

MIB = 1 << 20
AMD64 = Platform.parse("linux/amd64")
RATE = 0.2
REPOSITORY = "team/app"
LANES = 32
PIECE = 1 * MIB
CDN_RATE = "1m"
"""Bytes a second for each connection: so that a long read sees many URLs expire."""


@attrs.frozen
class Sizes:
    """How much to do."""

    seeds: int
    at_once: int
    """Seeds that are run beside each other: most of the time is waiting."""
    ranges: int
    stream: int
    """MiB."""
    outage: float
    """Seconds."""


FULL = Sizes(seeds=30, at_once=5, ranges=10_000, stream=1024, outage=30.0)
QUICK = Sizes(seeds=2, at_once=2, ranges=1_000, stream=128, outage=10.0)


@attrs.define
class Scene:
    """Servers, stores and files of one measurement; `close` ends all of them."""

    reactor: Any
    directory: Path
    _servers: ExitStack = attrs.field(factory=ExitStack)
    _stores: list[Any] = attrs.field(factory=list)
    _numbers: Any = attrs.field(factory=itertools.count)

    def run(self, server: Any) -> Any:
        return self._servers.enter_context(server)

    def layout(self, content: bytes) -> tuple[Layout, dict[str, Any]]:
        """A layout with one image, of one layer, and the image."""
        layout = Layout(self.directory / f"layout-{next(self._numbers)}")
        return layout, layout.manifest([layout.blob(content, EROFS)])

    def registry(self, content: bytes, **how: Any) -> DockerRegistry:
        """A docker-registry that has the content as the layer of `REPOSITORY`, with the tag 1."""
        registry: DockerRegistry = self.run(DockerRegistry(**how))
        layout, image = self.layout(content)
        push(layout, image, registry.url, f"{REPOSITORY}:1")
        return registry

    async def reader(self, authority: str, reactor: Any = None) -> Any:
        """The reader of the layer at a registry."""
        no_pool: Any = None
        store: Any = open_store(
            reactor or self.reactor, parse_reference(f"{authority}/{REPOSITORY}:1"), pool=no_pool
        )
        self._stores.append(store)
        return store.blob((await store.resolve(AMD64)).layers[0])

    async def close(self) -> None:
        for store in self._stores:
            await store.close()
        self._servers.close()


async def ranges(scene: Scene, sizes: Sizes) -> AsyncIterator[Row]:
    """Random ranges with faults, in every way but wrong bytes."""
    content = Random(0).randbytes(16 * MIB)
    registry = scene.registry(content)
    without = await one_seed(scene, registry.url, content, sizes, 0, [])
    yield reads_row("random ranges through the proxy, no faults", [without], 0, sizes)
    faults = [fault.fields() for fault in REGISTRY_FAULTS]
    found: list[Reads] = []
    seeds = iter(range(sizes.seeds))

    async def lane() -> None:
        for seed in seeds:
            found.append(await one_seed(scene, registry.url, content, sizes, seed, faults))
            console.print(
                f"[dim]seed {seed}: {found[-1].elapsed:.0f} s, {len(found[-1].errors)} errors[/dim]"
            )

    began = time.monotonic()
    await gatherResults([Deferred.fromCoroutine(lane()) for _ in range(sizes.at_once)])
    took = time.monotonic() - began
    yield reads_row(f"the same, {RATE:.0%} faults, {sizes.seeds} seeds", found, took, sizes)


async def one_seed(
    scene: Scene, url: str, content: bytes, sizes: Sizes, seed: int, faults: list[Any]
) -> Reads:
    with FaultRegistry(url) as proxy:
        reader = await scene.reader(proxy.authority)
        if faults:
            proxy.set(REPOSITORY, *faults, rate=RATE, seed=seed)
        reads = await read_ranges(reader, content, sizes.ranges, seed, lanes=LANES)
        for error in reads.errors[:3]:
            console.print(f"[red]seed {seed}: {error}[/red]")
        return reads


def reads_row(what: str, found: list[Reads], took: float, sizes: Sizes) -> Row:
    errors, wrong = sum(len(reads.errors) for reads in found), sum(reads.wrong for reads in found)
    count = sum(len(reads.seconds) for reads in found)
    each = statistics.median(reads.elapsed for reads in found)
    seconds = sorted(second for reads in found for second in reads.seconds)
    details = (
        f"{each:.0f} s for {sizes.ranges} ranges; a read: median {1000 * statistics.median(seconds):.0f} ms, "
        f"p99 {seconds[int(0.99 * count)]:.1f} s, worst {seconds[-1]:.1f} s"
    )
    if took:
        details += f"; {took:.0f} s in all, {sizes.at_once} seeds at once"
    measured = f"{count} reads, {errors} errors, {wrong} wrong"
    return Row(what, measured, "0 errors, 0 wrong", not (errors or wrong), details)


async def signed_ranges(scene: Scene, sizes: Sizes) -> AsyncIterator[Row]:
    """The same with signed URLs: the faults are the CDN's, which also refuses URLs that are good."""
    content = Random(0).randbytes(16 * MIB)
    registry = scene.registry(content)
    layout, _ = scene.layout(content)
    urls = scene.run(SignedURLs())
    cdn = scene.run(Nginx(urls.directives(layout.directory / "blobs" / "sha256")))
    front = scene.run(urls.front(registry.url))
    proxy = scene.run(FaultRegistry(cdn.url))
    urls.cdn = proxy.url
    reader = await scene.reader(front.authority)
    proxy.set("", *(fault.fields() for fault in (*REGISTRY_FAULTS, *REFUSALS)), rate=RATE, seed=1)
    reads = await read_ranges(reader, content, sizes.ranges, 1, lanes=LANES)
    for error in reads.errors[:3]:
        console.print(f"[red]{error}[/red]")
    yield reads_row(f"{RATE:.0%} faults of a CDN, its 401 and 403 too", [reads], 0, sizes)


async def signed(scene: Scene, sizes: Sizes) -> AsyncIterator[Row]:
    """A long read with tokens of 2 s and signed URLs of 1 to 2 s."""
    content = os.urandom(sizes.stream * MIB)
    tokens = scene.run(TokenServer(lifetime=2))
    layout, image = scene.layout(content)
    registry = scene.run(DockerRegistry(auth=tokens.registry_auth))
    push(layout, image, registry.url, f"{REPOSITORY}:1", headers=tokens.authorization(REPOSITORY))
    urls = scene.run(SignedURLs())
    blobs = layout.directory / "blobs" / "sha256"
    cdn = scene.run(Nginx(f"limit_rate {CDN_RATE}; {urls.directives(blobs)}"))
    urls.cdn = cdn.url
    front = scene.run(urls.front(registry.url, urls.LET_IN))
    reader = await scene.reader(front.authority)
    reads, left = Reads(), iter(range(0, len(content), PIECE))

    async def lane() -> None:
        for offset in left:
            await read_one(reader, content, offset, min(PIECE, len(content) - offset), reads)

    began = time.monotonic()
    await gatherResults([Deferred.fromCoroutine(lane()) for _ in range(LANES)])
    took = time.monotonic() - began
    bad = len(reads.errors) + reads.wrong
    refused = sum('" 403 ' in access for access in cdn.accesses)
    yield Row(
        f"{sizes.stream} MiB, tokens of 2 s, URLs of 1 to 2 s, {LANES} in flight",
        f"{len(reads.errors)} errors, {reads.wrong} wrong",
        "0, 0",
        not bad,
        f"{took:.0f} s, {len(reads.seconds)} reads; {refused} refused by the CDN",
    )
    yield per_life("tokens asked for", tokens.granted_at, 1.5, took)
    yield per_life("redirects asked for", urls.given_at, 0.75, took)


def per_life(what: str, given_at: list[float], renewed_after: float, took: float) -> Row:
    """Each is asked for at three quarters of the one before it, so never two within that time."""
    most = int(took / renewed_after) + 2
    nearest = min((after - before for before, after in itertools.pairwise(given_at)), default=took)
    return Row(
        what,
        f"{len(given_at)} in {took:.0f} s",
        f"<= {most}",
        len(given_at) <= most,
        f"the least time between two of them: {nearest:.2f} s",
    )


async def outage(scene: Scene, sizes: Sizes) -> AsyncIterator[Row]:
    """A registry that goes away in the middle of reads: killed, and answering 503.

    Whether one is back that cannot be connected to is found out without a request. One that answers 503 has
    to be asked, and 20 requests in 30 s cannot find it within a second: there the bar is the longest pause.
    Its 503 also count those requests that were under way when it went down.
    """
    content = Random(0).randbytes(16 * MIB)
    registry = scene.registry(content)
    for lanes in (1, LANES):
        dialling = Dialling(scene.reactor)
        reader = await scene.reader(registry.authority, dialling.reactor)
        before = registry.log.count("GET /v2/")

        def asked(before: int = before) -> int:
            return registry.log.count("GET /v2/") - before

        yield await one_outage(
            scene, f"killed, {lanes} in flight", reader, content, lanes, sizes.outage,
            registry.stop, registry.start, asked, lambda d=dialling: d.attempts, bar=1.0, most=20,
        )  # fmt: skip
        with FaultRegistry(registry.url) as proxy:
            dialling = Dialling(scene.reactor)
            reader = await scene.reader(proxy.authority, dialling.reactor)
            yield await one_outage(
                scene, f"503, {lanes} in flight", reader, content, lanes, sizes.outage,
                lambda proxy=proxy: proxy.set(REPOSITORY, Fault(status=503).fields()),
                lambda proxy=proxy: proxy.set(REPOSITORY),
                lambda proxy=proxy: proxy.counts(REPOSITORY).hits, lambda d=dialling: d.attempts,
                bar=Backoff(random=random).longest + 1.0, most=20 + lanes,
            )  # fmt: skip


async def one_outage(
    scene: Scene,
    what: str,
    reader: Any,
    content: bytes,
    lanes: int,
    seconds: float,
    go_down: Callable[[], Any],
    come_back: Callable[[], Any],
    asked: Callable[[], int],
    dialled: Callable[[], int],
    bar: float,
    most: int,
) -> Row:
    """Reads of `PIECE` go on until a while after the return; those that are under way at the return count."""
    reads, over = Reads(), False
    waiting: set[int] = set()
    numbers = itertools.count()

    async def lane() -> None:
        while not over:
            number = next(numbers)
            waiting.add(number)
            await read_one(reader, content, (number * PIECE) % (len(content) - PIECE), PIECE, reads)
            waiting.discard(number)

    running = gatherResults([Deferred.fromCoroutine(lane()) for _ in range(lanes)])
    await deferLater(scene.reactor, 1.0)
    before_dialled = dialled()
    go_down()
    before = asked()
    await deferLater(scene.reactor, seconds)
    requests, connections = asked() - before, dialled() - before_dialled
    held = set(waiting)
    come_back()
    back = time.monotonic()
    while waiting & held:
        await deferLater(scene.reactor, 0.01)
    ended = time.monotonic() - back
    over = True
    await running
    bad = len(reads.errors) + reads.wrong
    return Row(
        f"{seconds:.0f} s without a registry: {what}",
        f"{len(reads.errors)} errors, ends {ended:.2f} s after, {requests} requests",
        f"0, <= {bar:.0f} s, <= {most}",
        not bad and ended <= bar and requests <= most,
        f"{connections} connections tried meanwhile",
    )


MEASURES = {
    "outage": outage,
    "signed": signed,
    "signed_ranges": signed_ranges,
    "ranges": ranges,
}


async def measure(reactor: Any, names: list[str], sizes: Sizes, rows: list[Row]) -> None:
    for name in names:
        with tempfile.TemporaryDirectory(prefix="endurance-") as directory:
            scene = Scene(reactor, Path(directory))
            try:
                async for row in MEASURES[name](scene, sizes):
                    console.print(f"{row.what}: {row.measured}; {row.details}")
                    rows.append(row)
            finally:
                await scene.close()


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.endurance", description=(__doc__ or "").partition(":")[0]
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(MEASURES)} [all]")
    parser.add_argument("--quick", action="store_true", help="two seeds, smaller sizes")
    for field in attrs.fields(Sizes):
        parser.add_argument(f"--{field.name.replace('_', '-')}", type=field.type and float)
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="also write the table there")
    asked = parser.parse_args()
    unknown = set(asked.names) - set(MEASURES)
    if unknown:
        parser.error(f"there is no {', '.join(sorted(unknown))}")
    sizes = QUICK if asked.quick else FULL
    given = {field.name: getattr(asked, field.name) for field in attrs.fields(Sizes)}
    for name, value in given.items():
        if value is not None:
            sizes = attrs.evolve(sizes, **{name: type(getattr(sizes, name))(value)})
    rows: list[Row] = []
    names = asked.names or list(MEASURES)
    try:
        react(lambda reactor: Deferred.fromCoroutine(measure(reactor, names, sizes, rows)))
    except SystemExit as ended:
        if ended.code:
            raise
    console.print(f"\n{machine()}; load average {os.getloadavg()[0]:.1f} at the end\n")
    met = show(rows)
    if asked.markdown:
        asked.markdown.write_text(markdown(rows))
    sys.exit(0 if met else 1)


if __name__ == "__main__":
    main()
