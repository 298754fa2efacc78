"""What the tests of the whole daemon mount: a real tree, as images of many kinds in one OCI layout.

It is made once a process, at first use.
"""

from __future__ import annotations

import atexit
import functools
import hashlib
import os
import random
import shutil
import struct
import sysconfig
import tempfile
from pathlib import Path

import attrs

from tests.images import EROFS, Described, Layout, build_erofs

PACKAGES = ("asyncio", "email", "encodings", "json", "unittest", "xml")
GZIPPED_TAR = "application/vnd.oci.image.layer.v1.tar+gzip"
BLOCK = 4096
SUPERBLOCK = 1024
SUPERBLOCK_HAS_CHECKSUM = 1
BIG = "big"
"""A file of `BIG_SIZE` random bytes at the tree's root."""
BIG_SIZE = 6 * 1024 * 1024

Entry = tuple[str, int, str]
"""A file's kind, its permissions, and its SHA-256 or its link's target."""


@attrs.frozen
class Scenery:
    """``tree`` is what every sound image holds; ``layout`` has the images, by these tags:

    ``lz4`` and ``plain`` (not compressed), sound; ``index`` leads to ``lz4`` for linux/amd64 and to ``plain``
    for linux/arm64; ``two`` has ``plain`` as layer 1 above a tar. Not to be mounted: ``tar``, ``zstd``,
    ``torn`` (no superblock), ``rootless`` (a good superblock, but what it calls its root directory is none).
    ``far`` can be mounted but not read: its root directory is 2 MiB behind its superblock.
    """

    tree: Path
    layout: Path
    layers: dict[str, Described]
    manifests: dict[str, Described]

    def layer_file(self, tag: str) -> Path:
        """The EROFS image of a tag, as it is in the layout."""
        return self.layout / "blobs" / self.layers[tag]["digest"].replace(":", "/")


@functools.cache
def scenery() -> Scenery:
    """It goes with the process."""
    directory = Path(tempfile.mkdtemp(prefix="erofs-twisted-scenery-"))
    atexit.register(shutil.rmtree, directory, ignore_errors=True)
    tree = directory / "tree"
    make_tree(tree)
    layout = Layout(directory / "layout")
    lz4 = layout.blob(build_erofs(tree, directory / "lz4.erofs", "-zlz4hc"), EROFS)
    plain_image = build_erofs(tree, directory / "plain.erofs").read_bytes()
    plain = layout.blob(plain_image, "application/vnd.erofs.layer.v1")
    tar = layout.blob(b"not really a tar", GZIPPED_TAR)
    layers = {
        "lz4": [lz4],
        "plain": [plain],
        "two": [tar, plain],
        "tar": [tar],
        "zstd": [layout.blob(b"not really zstd", f"{EROFS}+zstd")],
        "torn": [layout.blob(bytes(2 * SUPERBLOCK) + plain_image[2 * SUPERBLOCK :], EROFS)],
        "rootless": [layout.blob(without_root(plain_image), EROFS)],
        "far": [layout.blob(with_root_far_away(plain_image), EROFS)],
    }
    manifests = {tag: layout.tag(layout.manifest(of), tag) for tag, of in layers.items()}
    for_arm = layout.manifest([plain], platform="linux/arm64")
    manifests["index"] = layout.tag(
        layout.index([manifests["lz4"], for_arm, layout.attestation(manifests["lz4"])]), "index"
    )
    return Scenery(tree, layout.directory, {tag: of[-1] for tag, of in layers.items()}, manifests)


def make_tree(tree: Path) -> None:
    """Packages of the standard library, and what a file system may get wrong."""
    tree.mkdir()
    stdlib = Path(sysconfig.get_path("stdlib"))
    for package in PACKAGES:
        shutil.copytree(stdlib / package, tree / package, symlinks=True)
    noise = random.Random(0)
    (tree / BIG).write_bytes(noise.randbytes(BIG_SIZE))
    sizes = tree / "sizes"
    sizes.mkdir()
    for size in (0, 1, 31, 4095, 4096, 4097, 65537, 1024 * 1024 + 1):
        (sizes / str(size)).write_bytes(noise.randbytes(size))
    (sizes / "zeros").write_bytes(bytes(3 * 1024 * 1024 + 5))
    with (sizes / "sparse").open("wb") as sparse:
        sparse.write(b"head")
        sparse.seek(2 * 1024 * 1024)
        sparse.write(b"tail")
    names = tree / "names with spaces, ünïcode \n and newlines"
    names.mkdir()
    (names / ("long" * 63)).write_text("a name of 252 bytes")
    os.link(sizes / "4097", names / "hard link")
    (names / "link").symlink_to("../sizes/4096")
    (names / "dangling").symlink_to("nowhere")
    (names / "directory").symlink_to("..")
    crowded = tree / "crowded"
    crowded.mkdir(mode=0o711)
    for number in range(300):
        (crowded / f"file-{number:04}").write_text(str(number))
    deep = tree.joinpath(*(["deep"] * 30))
    deep.mkdir(parents=True)
    (deep / "down").write_text("here")
    (tree / "empty").mkdir()
    executable = tree / "executable"
    executable.write_text("#!/bin/sh\necho it runs\n")
    executable.chmod(0o755)


def without_root(image: bytes) -> bytes:
    """An EROFS image whose root directory's inode has a layout that no version of EROFS has."""
    root_nid = struct.unpack_from("<H", image, SUPERBLOCK + 14)[0]
    meta_blkaddr = struct.unpack_from("<I", image, SUPERBLOCK + 40)[0]
    damaged = bytearray(image)
    struct.pack_into("<H", damaged, meta_blkaddr * BLOCK + root_nid * 32, 0xFFFF)
    leave_out_checksum(damaged)
    return bytes(damaged)


def with_root_far_away(image: bytes, blocks: int = 512) -> bytes:
    """An EROFS image with that many blocks of zeros between superblock and inodes; files are lost."""
    moved = bytearray(image[:BLOCK] + bytes(blocks * BLOCK) + image)
    for offset in (SUPERBLOCK + 36, SUPERBLOCK + 40):  # all blocks, and the first one with inodes
        number = struct.unpack_from("<I", moved, offset)[0]
        struct.pack_into("<I", moved, offset, number + blocks + 1)
    leave_out_checksum(moved)
    return bytes(moved)


def leave_out_checksum(image: bytearray) -> None:
    """The superblock's, which also covers the rest of its block."""
    features = struct.unpack_from("<I", image, SUPERBLOCK + 8)[0]
    struct.pack_into("<I", image, SUPERBLOCK + 8, features & ~SUPERBLOCK_HAS_CHECKSUM)


def contents(root: Path) -> dict[str, Entry]:
    """Everything below a directory, by its path there. Raises OSError where something cannot be read."""
    found = {}
    for directory, names, files in os.walk(root, onerror=_raise):
        for name in (*names, *files):
            path = Path(directory, name)
            found[str(path.relative_to(root))] = _entry(path)
    return found


def _entry(path: Path) -> Entry:
    mode = path.lstat().st_mode & 0o7777
    if path.is_symlink():
        return ("link", mode, os.readlink(path))
    if path.is_dir():
        return ("directory", mode, "")
    return ("file", mode, sha256(path))


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _raise(error: OSError) -> None:
    raise error
