"""What is read: images, and the directory from which a server of files is a registry for them."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import attrs

from tests.images import EROFS, OCI_CONFIG, OCI_INDEX, OCI_MANIFEST, build_erofs

MIB = 1 << 20
EMPTY = "application/vnd.oci.empty.v1+json"
SYSTEM_PYTHON = Path("/usr/bin/python3").resolve()
LIBRARY = re.compile(r"(/\S+) \(0x")


@attrs.frozen
class Image:
    """One in the tree of `Www`: its only layer lies in ``blob``."""

    name: str
    digest: str
    """Of the layer."""
    manifest: str
    """The manifest's digest."""
    blob: Path
    size: int

    @property
    def path(self) -> str:
        """Of the blob's URL."""
        return f"/v2/{self.name}/blobs/{self.digest}"


@attrs.define
class Www:
    """A directory whose paths are those of a registry's API."""

    root: Path

    def add(self, name: str, layer: Path) -> Image:
        """``NAME:latest``, an image of this one layer, which is moved here."""
        with layer.open("rb") as file:
            digest = f"sha256:{hashlib.file_digest(file, 'sha256').hexdigest()}"
        blobs = self.root / "v2" / name / "blobs"
        blobs.mkdir(parents=True)
        (self.root / "v2" / name / "manifests").mkdir()
        blob = layer.rename(blobs / digest)
        size = blob.stat().st_size
        config = self._document(
            name,
            "blobs",
            {"os": "linux", "architecture": "amd64", "rootfs": {"type": "layers", "diff_ids": [digest]}},
        )
        manifest = {
            "schemaVersion": 2,
            "mediaType": OCI_MANIFEST,
            "config": {"mediaType": OCI_CONFIG, **config},
            "layers": [{"mediaType": EROFS, "digest": digest, "size": size}],
        }
        described = self._document(name, "manifests", manifest)
        manifests = self.root / "v2" / name / "manifests"
        os.link(manifests / described["digest"], manifests / "latest")
        image = Image(name, digest, described["digest"], blob, size)
        self._referrers(image, [])
        return image

    def refer(
        self, image: Image, name: str, media_type: str, content: bytes, annotations: Mapping[str, str]
    ) -> Image:
        """The same image in another repository, where an artifact with ``content`` refers to it."""
        there = attrs.evolve(image, name=name)
        repository = self.root / "v2" / name
        shutil.copytree(self.root / "v2" / image.name, repository, copy_function=os.link)
        subject = (repository / "manifests" / image.manifest).stat().st_size
        layer = {"mediaType": media_type, **self._document(name, "blobs", content)}
        artifact = {
            "schemaVersion": 2,
            "mediaType": OCI_MANIFEST,
            "artifactType": media_type,
            "config": {"mediaType": EMPTY, **self._document(name, "blobs", {})},
            "layers": [layer],
            "subject": {"mediaType": OCI_MANIFEST, "digest": image.manifest, "size": subject},
            "annotations": dict(annotations),
        }
        listed = {
            "mediaType": OCI_MANIFEST,
            "artifactType": media_type,
            "annotations": dict(annotations),
            **self._document(name, "manifests", artifact),
        }
        self._referrers(there, [listed])
        return there

    def _referrers(self, image: Image, listed: Sequence[Mapping[str, Any]]) -> None:
        directory = self.root / "v2" / image.name / "referrers"
        directory.mkdir(exist_ok=True)
        index = {"schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": listed}
        (directory / image.manifest).unlink(missing_ok=True)
        (directory / image.manifest).write_text(json.dumps(index))

    def _document(self, name: str, kind: str, value: dict[str, Any] | bytes) -> dict[str, Any]:
        data = value if isinstance(value, bytes) else json.dumps(value).encode()
        digest = f"sha256:{hashlib.sha256(data).hexdigest()}"
        (self.root / "v2" / name / kind / digest).write_bytes(data)
        return {"digest": digest, "size": len(data)}


def python_image(www: Www, work: Path) -> Image:
    """Debian's Python with its whole library and what it is linked with: one can chroot(2) into it."""
    tree = work / "python-tree"
    stdlib = Path(f"/usr/lib/{SYSTEM_PYTHON.name}")
    shutil.copytree(stdlib, tree / stdlib.relative_to("/"), symlinks=True, ignore_dangling_symlinks=True)
    extensions = [str(path) for path in (stdlib / "lib-dynload").glob("*.so")]
    linked = subprocess.run(
        ["ldd", str(SYSTEM_PYTHON), *extensions], capture_output=True, text=True, check=True
    ).stdout
    for path in map(Path, {str(SYSTEM_PYTHON), *LIBRARY.findall(linked)}):
        if path.is_relative_to("/usr") or path.is_relative_to("/lib") or path.is_relative_to("/lib64"):
            copy = tree / path.relative_to("/")
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(path, copy)
    (tree / "usr/bin/python3").symlink_to(SYSTEM_PYTHON.name)
    layer = build_erofs(tree, work / "python.erofs", "-zlz4hc")
    shutil.rmtree(tree)
    return www.add("python", layer)


def large_image(www: Www, work: Path, name: str, size: int, *, sparse: bool = False) -> Image:
    """A small EROFS image, and behind it noise (or, where ``sparse``, holes) up to ``size`` bytes."""
    (work / "empty").mkdir(exist_ok=True)
    layer = build_erofs(work / "empty", work / f"{name}.erofs")
    if not sparse:
        noise = os.urandom(MIB)
        with layer.open("ab") as file:
            while file.tell() + MIB <= size:
                file.write(noise)
    os.truncate(layer, size)
    return www.add(name, layer)
