"""A cold mount and what is done in it first, over a link: how long, how many requests, how many bytes."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import attrs

from benchmarks.content import Image
from benchmarks.lazy import Lazy, python_line
from benchmarks.registries import Counts, Link, Shaped
from benchmarks.served import curl
from benchmarks.stage import Stage
from erofs_twisted.syscalls import mount, umount

MS_RDONLY_NOSUID_NODEV = 1 | 2 | 4


@attrs.frozen
class Cold:
    """One run."""

    seconds: float
    """From the daemon's "starting up" to the end of what was done in the mount."""
    interpreter: float
    """From the command to that: Python's start, twistd's, and the imports."""
    mounted: float
    """From "starting up" to the mount."""
    counts: Counts


def cold(
    stage: Stage, registry: Shaped, link: Link, image: Image, action: Callable[[Path], None],
    *options: str, traces: Path | None = None,
) -> Cold:  # fmt: skip
    """Mount with an empty cache, which has only the ``traces`` of another one."""
    directory = stage.new("mount")
    cache = stage.new("cache")
    cache.mkdir(mode=0o700)
    if traces is not None:
        shutil.copytree(traces, cache / "traces")
    registry.set(link)
    with Lazy(directory, registry.reference(image), options, cache) as lazy:
        mounted = time.time()
        action(lazy.mountpoint)
        ended = time.time()
        counts = registry.set(link)
        began = lazy.began
    shutil.rmtree(cache)
    return Cold(ended - began, began - lazy.called, mounted - began, counts)


@attrs.frozen
class Whole:
    """What is done without lazy pulling; seconds."""

    download: float
    ready: float
    """From the start of the download to the line."""


def whole(stage: Stage, registry: Shaped, link: Link, image: Image) -> Whole:
    """Download the blob by curl, mount the file, run the line."""
    file, mountpoint = stage.new("whole"), stage.new("local")
    mountpoint.mkdir()
    registry.set(link)
    began = time.time()
    download = curl(registry.url + image.path, file).elapsed
    mount(os.fspath(file), os.fspath(mountpoint), "erofs", MS_RDONLY_NOSUID_NODEV, "")
    try:
        python_line(mountpoint)
        ended = time.time()
    finally:
        umount(os.fspath(mountpoint))
    file.unlink()
    mountpoint.rmdir()
    return Whole(download, ended - began)


def summary(runs: Sequence[Cold]) -> str:
    """Of what was asked for, in the last run."""
    counts = runs[-1].counts
    return f"{counts.requests} requests, {counts.bytes / 1e6:.1f} MB"
