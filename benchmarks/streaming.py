"""Cold streaming of a blob from nginx on loopback, against curl of it; and what it takes of the processor."""

from __future__ import annotations

from collections.abc import Iterator

from benchmarks.machine import Ran
from benchmarks.registries import nginx
from benchmarks.served import NbdkitCurl, Ours, copy, curl
from benchmarks.stage import Stage
from benchmarks.table import Row, at_least, medians
from tests.nbd_tools import Nbdkit

OPTIONS = ("--request-size=1048576", "--requests=16")


def measure(stage: Stage) -> Iterator[Row]:
    """One copy each by turns; ours is read again from its cache."""
    image, runs = stage.stream, range(stage.effort.runs)
    taken: dict[str, list[Ran]] = {
        name: [] for name in ("curl", "file", "cold", "cached", "plugin", "nbdkit")
    }
    with nginx(stage.www) as server, Nbdkit(str(image.blob)) as nbdkit:
        url = server.url + image.path
        for _ in runs:
            taken["curl"].append(curl(url))
            downloaded = stage.new("downloaded")
            taken["file"].append(curl(url, downloaded))
            downloaded.unlink()
            with Ours(f"{server.authority}/{image.name}", "--fill=off") as ours:
                taken["cold"].append(copy(ours, *OPTIONS))
                taken["cached"].append(copy(ours, *OPTIONS))
            with NbdkitCurl(url) as plugin:
                taken["plugin"].append(copy(plugin, *OPTIONS))
            taken["nbdkit"].append(copy(nbdkit, *OPTIONS))
    seconds = {name: medians(r.elapsed for r in results)[0] for name, results in taken.items()}
    processor = {name: medians(r.processor for r in results)[0] for name, results in taken.items()}
    size = f"{stage.effort.stream} MiB"
    ratios = [
        theirs.elapsed / ours.elapsed for theirs, ours in zip(taken["curl"], taken["cold"], strict=True)
    ]
    yield at_least(
        f"cold streaming of {size} from nginx, against curl",
        ratios,
        1.0,
        f"ours {seconds['cold']:.2f} s, "
        f"curl to /dev/null {seconds['curl']:.2f} s, to a file {seconds['file']:.2f} s",
    )
    yield Row(
        f"processor, {size} cold",
        f"{processor['cold']:.2f} s",
        details=f"curl {processor['curl']:.2f} s, to a file {processor['file']:.2f} s, "
        f"nbdkit's curl plugin {processor['plugin']:.2f} s",
    )
    yield Row(
        f"processor, {size} cached",
        f"{processor['cached']:.2f} s",
        details=f"nbdkit file {processor['nbdkit']:.2f} s",
    )
