"""Images to test with: OCI layouts made by hand, and a pusher that changes nothing in them."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import urllib.error
import urllib.request
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urljoin

import attrs

EROFS = "application/vnd.erofs"
OCI_CONFIG = "application/vnd.oci.image.config.v1+json"
OCI_MANIFEST = "application/vnd.oci.image.manifest.v1+json"
OCI_INDEX = "application/vnd.oci.image.index.v1+json"
OCI_LAYER = "application/vnd.oci.image.layer.v1.tar"
TAG = "org.opencontainers.image.ref.name"

Described = dict[str, Any]
"""A descriptor, as it stands in a manifest."""


def build_erofs(tree: Path, image: Path, *options: str) -> Path:
    """Make an EROFS image of ``tree`` with mkfs.erofs; ``options`` such as ``-zlz4hc``."""
    mkfs = shutil.which("mkfs.erofs")
    if mkfs is None:
        raise RuntimeError("mkfs.erofs is missing: apt-get install erofs-utils")
    subprocess.run([mkfs, "--quiet", *options, str(image), str(tree)], check=True, capture_output=True)
    return image


@attrs.define
class Layout:
    """An OCI layout in ``directory``, written as it grows."""

    directory: Path
    entries: list[Described] = attrs.field(factory=list)

    def __attrs_post_init__(self) -> None:
        (self.directory / "blobs" / "sha256").mkdir(parents=True)
        (self.directory / "oci-layout").write_text('{"imageLayoutVersion": "1.0.0"}')
        self._write_index()

    def blob(self, content: bytes | Path, media_type: str, **more: Any) -> Described:
        """Add a blob, from memory or from a file."""
        data = content.read_bytes() if isinstance(content, Path) else content
        encoded = hashlib.sha256(data).hexdigest()
        (self.directory / "blobs" / "sha256" / encoded).write_bytes(data)
        return {"mediaType": media_type, "digest": f"sha256:{encoded}", "size": len(data), **more}

    def manifest(
        self,
        layers: Sequence[Described],
        *,
        platform: str = "linux/amd64",
        annotations: Mapping[str, str] | None = None,
        os_features: Sequence[str] = (),
    ) -> Described:
        """Add an image of ``layers``; its descriptor is ready for an index."""
        fields: dict[str, Any] = dict(
            zip(("os", "architecture", "variant"), platform.split("/"), strict=False)
        )
        rootfs = {"type": "layers", "diff_ids": [layer["digest"] for layer in layers]}
        config = self.blob(json.dumps({**fields, "rootfs": rootfs}).encode(), OCI_CONFIG)
        document = {
            "schemaVersion": 2,
            "mediaType": OCI_MANIFEST,
            "config": config,
            "layers": list(layers),
            "annotations": dict(annotations or {}),
        }
        if os_features:
            fields["os.features"] = list(os_features)
        return self.blob(json.dumps(document).encode(), OCI_MANIFEST, platform=fields)

    def attestation(self, subject: Described) -> Described:
        """What BuildKit puts beside an image in its index."""
        entry = self.manifest([self.blob(b"{}", "application/vnd.in-toto+json")], platform="unknown/unknown")
        marks = {
            "vnd.docker.reference.type": "attestation-manifest",
            "vnd.docker.reference.digest": subject["digest"],
        }
        return {**entry, "annotations": marks}

    def index(self, manifests: Iterable[Described]) -> Described:
        """Add an index."""
        document = {"schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": list(manifests)}
        return self.blob(json.dumps(document).encode(), OCI_INDEX)

    def tag(self, entry: Described, tag: str | None) -> Described:
        """Name an image or an index in the layout itself, where ``tag`` is None without a name."""
        annotations = {**entry.get("annotations", {}), **({TAG: tag} if tag else {})}
        self.entries.append({**entry, "annotations": annotations} if annotations else entry)
        self._write_index()
        return entry

    def read(self, digest: str) -> bytes:
        """A blob's content."""
        return (self.directory / "blobs" / digest.replace(":", "/")).read_bytes()

    def _write_index(self) -> None:
        document = {"schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": self.entries}
        (self.directory / "index.json").write_text(json.dumps(document))


def push(
    layout: Layout, entry: Described, registry: str, name: str, *, headers: Mapping[str, str] | None = None
) -> str:
    """Push ``entry`` and all below it to ``registry`` (``http://127.0.0.1:5000``) as ``repository:tag``.

    Returns the digest. ``headers`` go with each request, for authorization.
    """
    repository, _, tag = name.partition(":")
    base = f"{registry}/v2/{repository}"
    _push_below(layout, entry, base, headers or {})
    _put_manifest(layout, entry, f"{base}/manifests/{tag or 'latest'}", headers or {})
    return str(entry["digest"])


def _push_below(layout: Layout, entry: Described, base: str, headers: Mapping[str, str]) -> None:
    document = json.loads(layout.read(entry["digest"]))
    for child in document.get("manifests", []):
        _push_below(layout, child, base, headers)
        _put_manifest(layout, child, f"{base}/manifests/{child['digest']}", headers)
    for blob in [*document.get("layers", []), *filter(None, [document.get("config")])]:
        _put_blob(layout.read(blob["digest"]), blob["digest"], base, headers)


def _put_manifest(layout: Layout, entry: Described, url: str, headers: Mapping[str, str]) -> None:
    _request("PUT", url, layout.read(entry["digest"]), {**headers, "Content-Type": entry["mediaType"]})


def _put_blob(data: bytes, digest: str, base: str, headers: Mapping[str, str]) -> None:
    location = urljoin(base, _request("POST", f"{base}/blobs/uploads/", b"", headers)["Location"])
    joint = "&" if "?" in location else "?"
    _request(
        "PUT",
        f"{location}{joint}digest={digest}",
        data,
        {**headers, "Content-Type": "application/octet-stream"},
    )


def _request(method: str, url: str, body: bytes, headers: Mapping[str, str]) -> Mapping[str, str]:
    request = urllib.request.Request(url, body, dict(headers), method=method)
    try:
        with urllib.request.urlopen(request, timeout=60) as response:
            return dict(response.headers)
    except urllib.error.HTTPError as error:
        raise RuntimeError(f"{method} {url}: {error.code} {error.read()[:500]!r}") from error
