"""Can an image be had from its registry, as a mount would get it?"""

from __future__ import annotations

from typing import Any

import attrs

from erofs_twisted.doctor.finding import Finding, Level
from erofs_twisted.errors import ErofsTwistedError
from erofs_twisted.image import LayerError, choose_layer
from erofs_twisted.options import ImageConfig
from erofs_twisted.pool import SystemCallPool
from erofs_twisted.registry.probe import Probe
from erofs_twisted.registry.store import open_store

CREDENTIALS = "credentials for "
"""How the line begins that says where they come from."""


@attrs.frozen
class Answers:
    """What came of asking. ``digest`` is the image's manifest's, '' where it cannot be had; ``layer_problem``
    tells why none of its layers can be mounted, ``problem`` whatever else is wrong. ``lines`` are the steps.
    """

    digest: str = ""
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
        finally:
            await store.close()
    except LayerError as error:
        answers = attrs.evolve(answers, layer_problem=str(error))
    except ErofsTwistedError as error:
        answers = attrs.evolve(answers, problem=str(error))
    finally:
        await pool.stop()
    return attrs.evolve(answers, lines=tuple(lines))


def findings_of(name: str, answers: Answers) -> list[Finding]:
    """``name`` is the image's, as it was asked for."""
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
    if probe is not None:
        found.append(_of_probe(probe))
    elif digest and not answers.problem and not answers.layer_problem:
        found.append(Finding(Level.OK, "ranges", "it is on a disk of this machine"))
    return found


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
