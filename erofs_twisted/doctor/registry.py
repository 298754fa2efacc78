"""Can an image be had from its registry, as a mount would get it?"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from typing import Any

import attrs

from erofs_twisted.doctor.finding import Finding, Level
from erofs_twisted.erofs.superblock import Superblock, SuperblockError
from erofs_twisted.errors import ErofsTwistedError, RangesIgnored
from erofs_twisted.image import BLOCK, LayerError, choose_layer
from erofs_twisted.interfaces import IImageStore
from erofs_twisted.options import ImageConfig
from erofs_twisted.pool import SystemCallPool
from erofs_twisted.registry.manifest import Descriptor
from erofs_twisted.registry.probe import Probe
from erofs_twisted.registry.store import open_store

CREDENTIALS = "credentials for "
"""How the line begins that says where they come from."""


@attrs.frozen
class Answers:
    """What came of asking, as far as it came.

    ``digest`` is that of the image's manifest, '' where it cannot be had. ``layer_problem`` tells why none of
    its layers can be mounted, ``superblock`` is that of the one that can, None also where the server answers
    no ranges. ``problem`` is whatever else is wrong. ``lines`` are the steps.
    """

    digest: str = ""
    superblock: Superblock | None = None
    probe: Probe | None = None
    problem: str = ""
    layer_problem: str = ""
    lines: tuple[str, ...] = ()


async def ask_registry(reactor: Any, config: ImageConfig) -> Answers:
    """Resolve the image, and try for parts of the layer that would be mounted. It keeps nothing."""
    lines: list[str] = []
    answers = Answers()
    pool = SystemCallPool(reactor)
    try:
        store = open_store(reactor, config.reference, config.registry, pool=pool, tell=lines.append)
        try:
            image = await store.resolve(config.platform)
            answers = attrs.evolve(answers, digest=image.digest)
            layer = choose_layer(image, config.layer)
            answers = attrs.evolve(answers, probe=await store.probe(layer))
            with suppress(RangesIgnored):
                superblock = await _read_superblock(store, layer)
                answers = attrs.evolve(answers, superblock=superblock)
        finally:
            await store.close()
    except (LayerError, SuperblockError) as error:
        answers = attrs.evolve(answers, layer_problem=str(error))
    except ErofsTwistedError as error:
        answers = attrs.evolve(answers, problem=str(error))
    finally:
        await pool.stop()
    return attrs.evolve(answers, lines=tuple(lines))


async def _read_superblock(store: IImageStore, layer: Descriptor) -> Superblock:
    pieces: list[bytes] = []
    await store.blob(layer).read(0, min(layer.size, BLOCK), pieces.append)
    return Superblock.parse(b"".join(pieces), layer.size)


def findings_of(name: str, answers: Answers, compressors: Mapping[str, bool | None]) -> list[Finding]:
    """``name`` is the image's, as it was asked for; ``compressors`` whether this machine has each kind."""
    found = []
    digest, probe = answers.digest, answers.probe
    if not digest:
        found.append(Finding(Level.BAD, "image", _one_line(answers.problem), f"erofs-nbd inspect {name}"))
    else:
        found.append(Finding(Level.OK, "image", f"{name} is {digest}"))
    for line in dict.fromkeys(line for line in answers.lines if line.startswith(CREDENTIALS)):
        found.append(Finding(Level.OK, "credentials", line.removeprefix(CREDENTIALS)))
    if answers.layer_problem:
        cure = f"erofs-nbd inspect {name} lists the layers; --layer N names one"
        found.append(Finding(Level.BAD, "layer", _one_line(answers.layer_problem), cure))
    elif digest and answers.problem:
        found.append(
            Finding(Level.BAD, "layer", _one_line(answers.problem), f"erofs-nbd inspect --verbose {name}")
        )
    if answers.superblock is not None:
        found.append(_of_layer(answers.superblock, compressors))
    if probe is not None:
        found.append(_of_probe(probe))
    elif digest and not answers.problem and not answers.layer_problem:
        found.append(Finding(Level.OK, "ranges", "it is on a disk of this machine"))
    return found


def _of_layer(superblock: Superblock, compressors: Mapping[str, bool | None]) -> Finding:
    kinds = [kind.upper() for kind in superblock.compression]
    lacks = ", ".join(kind for kind in kinds if compressors.get(kind) is False)
    if lacks:
        return Finding(
            Level.BAD,
            "layer",
            f"it is compressed by {lacks}, which EROFS has not here",
            "build the image with mkfs.erofs -zlz4hc, or take a newer kernel",
        )
    used = ", ".join(kinds) or "nothing"
    if any(compressors.get(kind) is None for kind in kinds):
        return Finding(
            Level.UNKNOWN,
            "layer",
            f"it is EROFS, compressed by {used}; whether EROFS has that here cannot be told",
            "modprobe erofs, and ask again",
        )
    return Finding(Level.OK, "layer", f"it is EROFS, compressed by {used}")


def _of_probe(probe: Probe) -> Finding:
    if not probe.has_ranges:
        return Finding(
            Level.WARNING,
            "ranges",
            f"{probe.origin} answers none: the first read of a layer fetches all of it",
            "have the registry, or what is before it, answer Range requests",
        )
    speed = "" if probe.throughput is None else f", {probe.throughput / 1e6:.1f} MB/s"
    trip = "" if probe.round_trip is None else f", {1000 * probe.round_trip:.1f} ms a round trip"
    return Finding(Level.OK, "ranges", f"answered by {probe.origin}{trip}{speed}")


def _one_line(text: str) -> str:
    return "; ".join(line.strip() for line in text.splitlines() if line.strip())
