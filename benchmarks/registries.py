"""The servers that images are fetched from: one behind a shaped link, and nginx."""

from __future__ import annotations

import json
import sys
import urllib.request
from collections.abc import Sequence
from pathlib import Path

import attrs

from benchmarks.content import Image
from tests.servers import Nginx, Process

PROJECT = Path(__file__).resolve().parents[1]


@attrs.frozen
class Link:
    """Seconds to the first byte of an answer; bytes a second for all answers together, 0 for no limit."""

    delay: float
    rate: float
    name: str

    def seconds(self, round_trips: float, count: float) -> float:
        """That many round trips, and then so many bytes at full rate."""
        return round_trips * self.delay + (count / self.rate if self.rate else 0.0)


UNSHAPED = Link(0.0, 0.0, "unshaped")
NEAR = Link(0.005, 125e6, "5 ms, 1 Gbit/s")
FAR = Link(0.025, 12.5e6, "25 ms, 100 Mbit/s")
DELAYED = Link(0.025, 0.0, "25 ms")


@attrs.frozen
class Counts:
    """What a registry was asked for."""

    requests: int
    blob_requests: int
    bytes: int
    processor: float
    """Seconds that the registry has used since it began."""


@attrs.define(eq=False)
class Shaped(Process):
    """`benchmarks.shaped` with the files of a directory."""

    root: Path = attrs.field(kw_only=True)

    def command(self) -> Sequence[str]:
        return [sys.executable, str(PROJECT / "benchmarks" / "shaped.py"), str(self.root), str(self.port)]

    def set(self, link: Link) -> Counts:
        """The link from now on. What was asked for since the last time."""
        url = f"{self.url}/-/link/{link.delay}/{link.rate}"
        with urllib.request.urlopen(url, timeout=30) as answer:
            counted = json.load(answer)
        return Counts(
            counted.get("requests", 0),
            counted.get("blobs requests", 0),
            counted.get("bytes", 0),
            counted["processor"],
        )

    def reference(self, image: Image) -> str:
        return f"{self.authority}/{image.name}:latest"


def nginx(root: Path) -> Nginx:
    """With the files of a directory."""
    return Nginx(
        f"root {root}; sendfile on; tcp_nopush on; location ~ /manifests/ {{"
        " default_type application/vnd.oci.image.manifest.v1+json; }"
    )
