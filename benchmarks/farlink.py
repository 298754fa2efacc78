"""A mount over 25 ms and 100 Mbit/s: ``find``, a line of Python with and without a trace, every file; and a
warm remount."""

from __future__ import annotations

import statistics
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

from benchmarks.cold import Cold, cold, summary
from benchmarks.content import Image, Www
from benchmarks.lazy import BIN, LINE, Lazy, find, python_line, tar
from benchmarks.registries import FAR, UNSHAPED, Counts, Shaped
from benchmarks.served import curl
from benchmarks.stage import Stage
from benchmarks.table import Row, at_most
from erofs_twisted.blocks.trace import MEDIA_TYPE, Trace
from erofs_twisted.erofs.superblock import Superblock
from erofs_twisted.erofs.walk import Walk
from erofs_twisted.tracing import LAYER_ANNOTATION

BLOCK = 4096
PATIENCE = 120.0


def measure(stage: Stage) -> Iterator[Row]:
    """Each run with nothing cached."""
    image, runs = stage.python, range(stage.effort.runs)
    with Shaped(root=stage.www) as registry:
        traces = record(stage, registry, image)
        content = next(path for path in traces.rglob("*") if path.is_file()).read_bytes()
        traced = Trace.decode(content).length
        annotations = {LAYER_ANNOTATION: image.digest}
        referred = Www(stage.www).refer(image, "python-traced", MEDIA_TYPE, content, annotations)
        metadata = metadata_bytes(image)
        found, line, with_trace, by_referrer, read, download = [], [], [], [], [], []
        for _ in runs:
            found.append(cold(stage, registry, FAR, image, find))
            line.append(cold(stage, registry, FAR, image, python_line))
            with_trace.append(cold(stage, registry, FAR, image, python_line, traces=traces))
            by_referrer.append(cold(stage, registry, FAR, referred, python_line))
            read.append(cold(stage, registry, FAR, image, tar))
            registry.set(FAR)
            download.append(curl(registry.url + image.path).elapsed)
        yield _row("find", found, FAR.seconds(12, metadata) * 1.5, f"metadata {metadata / 1e6:.2f} MB")
        bar = FAR.seconds(4, traced) * 1.3
        yield _row("python3 line, with a trace", with_trace, bar, f"trace {traced / 1e6:.2f} MB")
        yield _row("the same, trace from the registry", by_referrer, None, "")
        yield _row("python3 line, without a trace", line, bar * 2.5, "")
        whole = statistics.median(download)
        yield _row("every file, by tar", read, whole * 1.15, f"curl of all {whole:.2f} s")
        yield from _remount(stage, registry, image)


def _row(what: str, runs: list[Cold], bar: float | None, of: str) -> Row:
    mounted = statistics.median(run.mounted for run in runs)
    interpreter = statistics.median(run.interpreter for run in runs)
    parts = [
        f"mounted after {mounted:.2f} s",
        summary(runs),
        of,
        f"interpreter and imports {interpreter:.2f} s",
    ]
    details = "; ".join(filter(None, parts))
    return at_most(f"{FAR.name}: mount + {what}", [run.seconds for run in runs], bar, details)


def record(stage: Stage, registry: Shaped, image: Image) -> Path:
    """Record a trace of the line: the directory of a cache's traces."""
    registry.set(UNSHAPED)
    cache = stage.new("recorded")
    cache.mkdir(mode=0o700)
    places = [f"--cache-dir={cache}", f"--state-dir={stage.new('state')}"]
    line = ["chroot", "{}", "/usr/bin/python3", "-c", LINE]
    command = [str(BIN / "erofs-nbd"), "trace", "record", *places, registry.reference(image), "--", *line]
    subprocess.run(command, check=True, timeout=PATIENCE, capture_output=True)
    return cache / "traces"


def metadata_bytes(image: Image) -> int:
    """What blocks with inodes, directories and shared attributes come to: what `find` needs."""
    data = image.blob.read_bytes()
    walk = Walk(Superblock.parse(data[:BLOCK], image.size), image.size, BLOCK)
    blocks: set[int] = set()
    while (looked_at := walk.look()) is not None:
        start, end = looked_at
        blocks.update(range(start // BLOCK, -(-end // BLOCK)))
        walk.take(data[start:end])
    if walk.trouble:
        raise AssertionError(walk.trouble)
    return len(blocks) * BLOCK


def _remount(stage: Stage, registry: Shaped, image: Image) -> Iterator[Row]:
    """The line, with what a mount of which every file was read has left in the cache."""
    cache = stage.new("kept")
    by_digest = f"{registry.authority}/{image.name}@{image.manifest}"
    for name, reference in (("by tag", registry.reference(image)), ("by digest", by_digest)):
        _once(stage, registry, reference, cache, tar)
        counts = _once(stage, registry, reference, cache, python_line)
        asked = counts.blob_requests if name == "by tag" else counts.requests
        kind = "blob requests" if name == "by tag" else "requests of any kind"
        yield Row(f"warm remount {name}, {kind}", str(asked), "0", asked == 0)


def _once(
    stage: Stage, registry: Shaped, reference: str, cache: Path, action: Callable[[Path], None]
) -> Counts:
    registry.set(UNSHAPED)
    with Lazy(stage.new("remount"), reference, ["--fill=off"], cache) as lazy:
        action(lazy.mountpoint)
    return registry.set(UNSHAPED)
