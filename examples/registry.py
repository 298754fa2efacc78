"""A read-only OCI registry in a page: serves the images of an OCI layout on loopback, for demo and trials.

    python examples/registry.py LAYOUT [--port 5000] [--name demo/stdlib]

prints the port once it listens. Real registries do more; what a lazy mount needs of one is all here:
manifests by tag and digest, and blobs with Range requests, which `twisted.web.static.File` answers.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from twisted.internet import reactor as global_reactor
from twisted.internet.endpoints import serverFromString
from twisted.web.http import Request
from twisted.web.pages import notFound
from twisted.web.resource import IResource, Resource
from twisted.web.server import Site
from twisted.web.static import Data, File

REF_NAME = "org.opencontainers.image.ref.name"


class Registry(Resource):
    """``/v2/NAME/manifests/REFERENCE`` and ``/v2/NAME/blobs/DIGEST`` for one repository."""

    def __init__(self, layout: Path, name: str) -> None:
        super().__init__()
        self._layout = layout
        self._name = name

    def getChild(self, path: bytes, request: Request) -> IResource:
        words = [path.decode(), *(word.decode() for word in request.postpath)]
        request.postpath[:] = []
        if words[0] != "v2" or "/".join(words[1:-2]) != self._name:
            return Data(b"{}", "application/json") if words == ["v2", ""] else notFound()
        kind, reference = words[-2:]
        return {"manifests": self._manifest, "blobs": self._blob}.get(kind, lambda _: notFound())(reference)

    def _manifest(self, reference: str) -> IResource:
        index = json.loads((self._layout / "index.json").read_bytes())
        for entry in index["manifests"]:
            if reference in (entry["digest"], entry.get("annotations", {}).get(REF_NAME)):
                return self._blob(entry["digest"], entry["mediaType"])
        return notFound()

    def _blob(self, digest: str, media_type: str = "application/octet-stream") -> IResource:
        algorithm, _, encoded = digest.partition(":")
        if not (algorithm.isalnum() and encoded.isalnum()):
            return notFound()
        return File(str(self._layout / "blobs" / algorithm / encoded), defaultType=media_type)


def main(arguments: list[str], reactor: Any = global_reactor) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("layout", type=Path, help="directory with an OCI layout")
    parser.add_argument("--port", type=int, default=0, help="TCP port on 127.0.0.1 [one that is free]")
    parser.add_argument("--name", default="demo/stdlib", help="the repository's name [%(default)s]")
    options = parser.parse_args(arguments)
    listening = serverFromString(reactor, f"tcp:{options.port}:interface=127.0.0.1").listen(
        Site(Registry(options.layout, options.name))
    )
    listening.addCallback(lambda port: print(port.getHost().port, flush=True))
    listening.addErrback(lambda failure: (failure.printBriefTraceback(), reactor.stop()))
    reactor.run()


if __name__ == "__main__":
    main(sys.argv[1:])
