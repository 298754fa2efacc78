"""Makes an OCI layout with one image of one EROFS layer, from a directory tree.

    python examples/pack.py TREE LAYOUT [--tag 1.2]

``skopeo copy oci:LAYOUT:TAG docker://…`` pushes it; ``twistd erofs-nbd --image oci:LAYOUT:TAG`` mounts it.
Needs mkfs.erofs (Debian: erofs-utils).
"""

from __future__ import annotations

import argparse
import hashlib
import json
import platform
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from erofs_twisted.registry.platform import Platform

EROFS = "application/vnd.erofs"
CONFIG = "application/vnd.oci.image.config.v1+json"
MANIFEST = "application/vnd.oci.image.manifest.v1+json"
REF_NAME = "org.opencontainers.image.ref.name"


def pack(tree: Path, layout: Path, tag: str) -> dict[str, Any]:
    """Write the layout, a new directory; the descriptor of its layer."""
    blobs = layout / "blobs" / "sha256"
    blobs.mkdir(parents=True)
    layer = _add_layer(tree, blobs)
    here = Platform.of_host(platform.machine())
    config = _add(
        blobs,
        CONFIG,
        {
            "os": here.os,
            "architecture": here.architecture,
            "rootfs": {"type": "layers", "diff_ids": [layer["digest"]]},
        },
    )
    manifest = _add(
        blobs, MANIFEST, {"schemaVersion": 2, "mediaType": MANIFEST, "config": config, "layers": [layer]}
    )
    index = {"schemaVersion": 2, "manifests": [{**manifest, "annotations": {REF_NAME: tag}}]}
    (layout / "index.json").write_text(json.dumps(index))
    (layout / "oci-layout").write_text('{"imageLayoutVersion": "1.0.0"}')
    return layer


def _add_layer(tree: Path, blobs: Path) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(dir=blobs.parent) as work:
        image = Path(work, "image.erofs")
        # The same tree gives the same image, and the same digest: no times and no identifier of this run.
        identifier = "00000000-0000-0000-0000-000000000000"
        subprocess.run(
            ["mkfs.erofs", "--quiet", "-zlz4hc", "-T0", f"-U{identifier}", image, tree], check=True
        )
        with image.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        size = image.stat().st_size
        image.rename(blobs / digest)
    return {"mediaType": EROFS, "digest": f"sha256:{digest}", "size": size}


def _add(blobs: Path, media_type: str, value: dict[str, Any]) -> dict[str, Any]:
    data = json.dumps(value).encode()
    digest = hashlib.sha256(data).hexdigest()
    (blobs / digest).write_bytes(data)
    return {"mediaType": media_type, "digest": f"sha256:{digest}", "size": len(data)}


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("tree", type=Path, help="directory to make the image of")
    parser.add_argument("layout", type=Path, help="directory for the layout, not there yet")
    parser.add_argument("--tag", default="latest", help="the image's tag [%(default)s]")
    options = parser.parse_args(arguments)
    layer = pack(options.tree, options.layout, options.tag)
    print(f"oci:{options.layout}:{options.tag}  {layer['size']} bytes  {layer['digest']}")


if __name__ == "__main__":
    main(sys.argv[1:])
