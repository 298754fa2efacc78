"""What a registry may do wrong to a blob: a client gets right bytes or an error, and none of it is kept."""

from __future__ import annotations

import json
import os
from pathlib import Path

from tests.images import EROFS, Layout, build_erofs
from tests.integration.test_cache import QUIET, CacheTestCase
from tests.processes import BIN, run, until
from tests.servers import Nginx, tool

GIB = 1 << 30
MIB = 1 << 20


class FaultTests(CacheTestCase):
    """The fault begins once the server is ready; what was read till then is little."""

    def check(self, *, fails: bool, **fault: object) -> str:
        """Copy the image while the registry has a fault, and again afterwards; what the first copy said."""
        repository = str(self.id()).rsplit("_", 1)[1]
        patience = "3" if fails else "60"
        _, path = self.serve(self.registry.image(repository, "plain"), *QUIET, "--io-timeout", patience)
        self.registry.set(repository, {"kind": "blobs", **fault})
        first = run(tool("nbdcopy"), f"nbd+unix:///?socket={path}", self.directory / "copy")
        if fails:
            self.assertNotEqual(0, first.returncode)
            self.registry.set(repository)
            self.assert_copies(path)
        else:
            self.assertEqual(0, first.returncode, first.stderr)
            self.assert_right("copy")
        return first.stderr

    def test_bodies_that_end_early_are_resumed(self) -> None:
        self.check(fails=False, cut_after=100_000)

    def test_bodies_of_another_place_are_refused(self) -> None:
        self.assertIn("Input/output error", self.check(fails=True, shift=4096))

    def test_bodies_that_are_too_long_are_refused(self) -> None:
        self.assertIn("Input/output error", self.check(fails=True, surplus=1))

    def test_all_of_a_small_blob_for_a_part_of_it_is_of_use(self) -> None:
        self.check(fails=False, whole=True)

    def test_wrong_bytes_are_found_when_all_is_there_and_none_is_served_from_then_on(self) -> None:
        server, path = self.serve(self.registry.image("wrong", "plain"), *QUIET)
        self.registry.set("wrong", {"kind": "blobs", "tamper": True, "times": 1})
        run(tool("nbdcopy"), f"nbd+unix:///?socket={path}", "null:")
        for _ in range(50):
            again = run(tool("nbdcopy"), f"nbd+unix:///?socket={path}", "null:")
            if again.returncode:
                break
        self.assertIn("Input/output error", again.stderr)
        until("it is dropped from the cache", lambda: not self.blob_file().exists())
        self.end(server)
        _, path = self.serve(self.registry.image("right", "plain"), *QUIET, name="b")
        self.assert_copies(path)

    def test_wrong_bytes_are_never_served_with_a_full_fill(self) -> None:
        self.registry.set("never", {"kind": "blobs", "tamper": True, "times": 1})
        said = run(
            *(BIN / "erofs-nbd", "serve", self.registry.image("never", "plain"), "--fill", "full"),
            *("--socket", self.directory / "socket", "--cache-dir", self.cache),
        )
        self.assertEqual(1, said.returncode)
        self.assertIn("is corrupt: its bytes have the digest", said.stderr)
        self.assertFalse(self.blob_file().exists())
        self.assertFalse((self.directory / "socket").exists())


class WholeOnlyTests(CacheTestCase):
    """A server without ranges, and a large blob."""

    def setUp(self) -> None:
        super().setUp()
        (self.directory / "tree").mkdir()
        self.layer = build_erofs(self.directory / "tree", self.directory / "image")
        os.truncate(self.layer, GIB)
        layout = Layout(self.directory / "layout")
        descriptor = layout.blob(self.layer, EROFS)
        manifest = layout.manifest([descriptor])
        blobs = layout.directory / "blobs" / "sha256"
        named = {"1": manifest["digest"], manifest["digest"]: manifest["digest"]}
        locations = "".join(
            f"location = /v2/large/manifests/{name} {{ default_type {manifest['mediaType']}; "
            f"alias {blobs / digest.removeprefix('sha256:')}; }} "
            for name, digest in named.items()
        )
        self.nginx = self.enterContext(
            Nginx(
                f"max_ranges 0; {locations} location ~ ^/v2/large/blobs/sha256:(.*)$ {{ alias {blobs}/$1; }}"
            )
        )
        self.size = GIB

    def blob_requests(self) -> list[int]:
        """Bytes that each was answered with."""
        lines = [line for line in self.nginx.accesses if "/blobs/" in line]
        return [int(line.rsplit('" 200 ', 1)[1].split()[0]) for line in lines]

    def test_it_is_fetched_once_and_memory_stays_small(self) -> None:
        server, path = self.serve(f"{self.nginx.authority}/large:1", *QUIET)
        self.assertEqual(0, run(tool("nbdcopy"), f"nbd+unix:///?socket={path}", "null:").returncode)
        status = Path(f"/proc/{server.pid}/status").read_text()
        (peak,) = [int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM")]
        self.assertLess(peak >> 10, 110, "MiB")
        self.end(server)
        *given_up, whole = sorted(self.blob_requests())
        self.assertEqual(GIB, whole)
        self.assertLess(sum(given_up), 64 * MIB, "what was in the sockets of those that were left at once")
        (blob,) = json.loads(self.cache_command("ls", "--json").stdout)["blobs"]
        self.assertEqual(GIB, blob["present"] if "present" in blob else blob["there"])
