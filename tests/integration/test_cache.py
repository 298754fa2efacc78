"""The cache between real processes: shared, kept, limited, damaged. Programs are run as users run them."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import signal
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

from twisted.trial.unittest import SynchronousTestCase

from erofs_twisted.blocks.cached import FLUSH_SECONDS
from tests.daemon import DaemonTestCase, registry
from tests.images import Layout, push
from tests.processes import BIN, run, until, until_serving
from tests.scenery import BIG, contents, scenery, sha256
from tests.servers import DockerRegistry, tool

RANGE = re.compile(r"bytes=(\d+)-(\d+)")
QUIET = ("--fill", "off", "--trace", "off")


class CacheTestCase(SynchronousTestCase):
    tag = "plain"

    def setUp(self) -> None:
        self.registry = registry()
        self.directory = Path(tempfile.mkdtemp(prefix="cache-"))
        self.addCleanup(shutil.rmtree, self.directory)
        self.cache = self.directory / "cache"
        self.layer = scenery().layer_file(self.tag)
        self.size = self.layer.stat().st_size

    def serve(self, image: str, *options: str, name: str = "a") -> tuple[subprocess.Popen[str], Path]:
        """A server, once it is ready, and its socket."""
        path = self.directory / f"socket-{name}"
        words = ("--socket", str(path), "--cache-dir", str(self.cache), *options)
        server = subprocess.Popen(
            [BIN / "erofs-nbd", "serve", image, *words], stderr=subprocess.PIPE, text=True, cwd=self.directory
        )
        assert server.stderr is not None
        self.addCleanup(server.stderr.close)
        self.addCleanup(server.wait)
        self.addCleanup(server.kill)
        until_serving(server)
        return server, path

    def end(self, server: subprocess.Popen[str]) -> None:
        server.terminate()
        self.assertEqual(0, server.wait(20))

    def copying(self, path: Path, name: str = "copy") -> subprocess.Popen[bytes]:
        copied = self.directory / name
        client = subprocess.Popen([tool("nbdcopy"), f"nbd+unix:///?socket={path}", copied])
        self.addCleanup(client.wait)
        self.addCleanup(client.kill)
        return client

    def assert_copies(self, path: Path) -> None:
        self.assertEqual(0, self.copying(path).wait(60))
        self.assert_right("copy")

    def assert_right(self, name: str) -> None:
        copied = self.directory / name
        os.truncate(copied, self.size)
        self.assertEqual(sha256(self.layer), sha256(copied))

    def blob_file(self) -> Path:
        return self.cache / scenery().layers[self.tag]["digest"].replace(":", "/")

    def asked_for(self, repository: str) -> int:
        """Bytes of blobs that the registry was asked for."""
        asked = [r["range"] for r in self.registry.requests(repository) if r["kind"] == "blobs"]
        return sum(int(m[2]) - int(m[1]) + 1 for m in map(RANGE.fullmatch, asked) if m)

    def kinds(self, repository: str) -> list[str]:
        return [request["kind"] for request in self.registry.requests(repository)]

    def cache_command(self, *words: str) -> subprocess.CompletedProcess[str]:
        return run(BIN / "erofs-nbd", "cache", *words, "--cache-dir", self.cache)

    def listed(self) -> dict[str, Any]:
        (blob,) = json.loads(self.cache_command("ls", "--json").stdout)["blobs"]
        return dict(blob)


class SharedTests(CacheTestCase):
    def test_two_servers_that_fill_the_same_blob_at_once_fetch_each_byte_once(self) -> None:
        image, words = self.registry.image("filled", "plain"), ("--fill", "full", "--trace", "off")
        cache = ("--cache-dir", str(self.cache))
        servers = []
        for name in "ab":
            command = [
                BIN / "erofs-nbd",
                "serve",
                image,
                "--socket",
                str(self.directory / name),
                *cache,
                *words,
            ]
            servers.append(subprocess.Popen(command, stderr=subprocess.PIPE, text=True))
            self.addCleanup(servers[-1].wait)
            self.addCleanup(servers[-1].kill)
        for server, name in zip(servers, "ab", strict=True):
            assert server.stderr is not None
            with server.stderr:
                until_serving(server)
            self.assert_copies(self.directory / name)
        self.assertEqual(self.size, self.asked_for("filled"))

    def test_two_servers_that_read_the_same_at_once_fetch_hardly_anything_twice(self) -> None:
        # What a reader waits for is asked for once more if it is far behind in what comes as a guess.
        image = self.registry.image("shared", "plain")
        servers = [self.serve(image, *QUIET, name=name) for name in "ab"]
        copies = [self.copying(path, f"copy{number}") for number, (_, path) in enumerate(servers)]
        self.assertEqual([0, 0], [client.wait(60) for client in copies])
        for number in range(2):
            self.assert_right(f"copy{number}")
        self.assertLessEqual(self.asked_for("shared"), self.size * 1.2)
        for server, _ in servers:
            self.end(server)

    def test_what_one_has_fetched_the_other_reads_while_the_registry_is_down(self) -> None:
        image = self.registry.image("handed", "plain")
        (_, one), (_, other) = (self.serve(image, *QUIET, name=name) for name in "ab")
        self.assert_copies(one)
        self.registry.go_down()
        self.addCleanup(self.registry.come_back)
        self.assert_copies(other)

    def test_a_server_that_is_killed_loses_nothing_of_what_it_fetched(self) -> None:
        image = self.registry.image("killed", "plain")
        server, path = self.serve(image, *QUIET)
        self.assert_copies(path)
        server.kill()
        server.wait()
        before = self.asked_for("killed")
        _, path = self.serve(image, *QUIET, name="b")
        self.assert_copies(path)
        self.assertEqual(before, self.asked_for("killed"))

    def test_a_server_that_is_killed_while_it_fetches_leaves_the_rest_to_another(self) -> None:
        image = self.registry.image("stuck", "plain")
        server, path = self.serve(image, *QUIET)
        self.registry.set("stuck", {"kind": "blobs", "stall": True})
        before = len(self.kinds("stuck"))
        client = self.copying(path)
        until("request for a blob", lambda: "blobs" in self.kinds("stuck")[before:])
        _, other = self.serve(image, *QUIET, name="b")
        server.kill()
        client.wait(60)
        self.registry.set("stuck")
        self.assert_copies(other)


class WarmTests(CacheTestCase):
    def fill(self, image: str) -> None:
        server, path = self.serve(image, *QUIET)
        self.assert_copies(path)
        self.end(server)

    def test_a_tag_asks_for_its_manifest_and_for_no_blob(self) -> None:
        image = self.registry.image("warm", "plain")
        self.fill(image)
        before = len(self.kinds("warm"))
        server, path = self.serve(image, name="b")
        self.assert_copies(path)
        self.end(server)
        self.assertEqual(["manifests"], [kind for kind in self.kinds("warm")[before:] if kind != "referrers"])

    def test_a_digest_asks_for_nothing(self) -> None:
        digest = scenery().manifests["plain"]["digest"]
        image = f"{self.registry.image('pinned-warm', 'plain')}@{digest}"
        self.fill(image)
        before = len(self.kinds("pinned-warm"))
        server, path = self.serve(image, name="b")
        self.assert_copies(path)
        self.end(server)
        self.assertEqual([], self.kinds("pinned-warm")[before:])

    def test_a_digest_is_served_though_the_registry_is_down(self) -> None:
        layout = Layout(self.directory / "layout")
        layer = layout.blob(self.layer, scenery().layers["plain"]["mediaType"])
        with DockerRegistry() as server:
            digest = push(layout, layout.manifest([layer]), server.url, "app:1")
            image = f"{server.authority}/app:1@{digest}"
            self.fill(image)
            server.stop()
            again, path = self.serve(image, name="b")
            self.assert_copies(path)
            self.end(again)


class DamagedTests(CacheTestCase):
    def test_a_file_that_is_cut_short_while_in_use_never_becomes_zeros(self) -> None:
        server, path = self.serve(self.registry.image("cut", "plain"), *QUIET)
        self.assert_copies(path)
        os.truncate(self.blob_file(), self.size // 2)
        client = self.copying(path)
        if client.wait(60) == 0:
            self.assert_right("copy")
        time.sleep(FLUSH_SECONDS + 1)
        self.assert_copies(path)
        self.assertFalse(self.blob_file().exists())
        self.end(server)

    def test_a_file_that_was_cut_short_is_fetched_anew(self) -> None:
        image = self.registry.image("cut-before", "plain")
        server, path = self.serve(image, *QUIET)
        self.assert_copies(path)
        self.end(server)
        os.truncate(self.blob_file(), self.size // 2)
        _, path = self.serve(image, *QUIET, name="b")
        self.assert_copies(path)

    def test_noise_in_a_files_map_is_fetched_anew(self) -> None:
        image = self.registry.image("noise", "plain")
        server, path = self.serve(image, *QUIET)
        self.assert_copies(path)
        self.end(server)
        with self.blob_file().open("r+b") as file:
            file.seek(-100, os.SEEK_END)
            file.write(random.Random(0).randbytes(50))
        self.assertEqual("damaged", self.listed()["state"])
        _, path = self.serve(image, *QUIET, name="b")
        self.assert_copies(path)

    def test_a_flipped_bit_is_found_by_verify_and_the_server_stops_serving_it(self) -> None:
        server, path = self.serve(self.registry.image("flipped", "plain"), *QUIET)
        self.assert_copies(path)
        until("verification", lambda: self.listed()["state"] == "verified")
        with self.blob_file().open("r+b") as file:
            file.seek(self.size // 2)
            byte = file.read(1)[0]
            file.seek(self.size // 2)
            file.write(bytes((byte ^ 4,)))
        verified = self.cache_command("verify")
        self.assertEqual(1, verified.returncode)
        self.assertIn("CORRUPT, dropped", verified.stdout)
        self.assertNotIn("Traceback", verified.stderr)
        time.sleep(FLUSH_SECONDS + 1)
        self.assertEqual(1, self.copying(path).wait(60))
        self.assertIsNone(server.poll())
        again, path = self.serve(self.registry.image("flipped", "plain"), *QUIET, name="b")
        self.assert_copies(path)
        self.end(again)

    def test_a_directory_that_cannot_be_made_is_an_error_that_names_the_option(self) -> None:
        words = ("serve", self.registry.image("app"), "--socket", str(self.directory / "s"))
        done = run(BIN / "erofs-nbd", *words, "--cache-dir", "/proc/cache")
        self.assertEqual(1, done.returncode)
        self.assertIn("choose another with --cache-dir", done.stderr)
        self.assertNotIn("Traceback", done.stderr)


class PruneTests(CacheTestCase):
    def test_what_a_server_uses_stays_until_it_has_ended(self) -> None:
        server, path = self.serve(self.registry.image("pruned", "plain"), *QUIET)
        self.assert_copies(path)
        self.assertTrue(self.listed()["in_use"])
        pruned = self.cache_command("prune", "--all")
        self.assertEqual((0, ""), (pruned.returncode, pruned.stderr))
        self.assertTrue(self.blob_file().exists())
        self.end(server)
        self.cache_command("prune", "--all")
        self.assertFalse(self.blob_file().exists())


class SmallDiskTests(DaemonTestCase):
    """A cache on a file system of 8 MiB."""

    attach = "fuse"

    def disk(self, options: str = "size=8m,mode=0700") -> Path:
        path = self.directory / "disk"
        path.mkdir()
        mounted = run("mount", "-t", "tmpfs", "-o", options, "tmpfs", path)
        self.assertEqual(0, mounted.returncode, mounted.stderr)
        self.addCleanup(run, "umount", "-l", path)
        return path

    def test_a_full_disk_is_no_error_and_the_log_says_so(self) -> None:
        daemon = self.daemon(self.registry.image("small", "plain"), *QUIET)
        daemon.cache_dir = self.disk()
        daemon.start()
        daemon.ready()
        self.assert_same(contents(scenery().tree), contents(daemon.mountpoint))
        daemon.says("is full")
        free = os.statvfs(daemon.cache_dir)
        self.assertGreater(free.f_bavail, 0)
        run("umount", daemon.mountpoint)
        self.assertEqual(0, daemon.ended(), daemon.log)
        self.assertNotIn("Traceback", daemon.log)

    def test_a_disk_that_others_fill_to_the_last_byte_is_no_error(self) -> None:
        disk = self.disk()
        with (disk / "filler").open("wb") as filler:
            for size in (1 << 16, 1):
                while True:
                    try:
                        os.write(filler.fileno(), bytes(size))
                    except OSError:
                        break
        daemon = self.daemon(self.registry.image("smallest", "plain"), *QUIET)
        daemon.cache_dir = disk / "cache"
        daemon.start()
        daemon.ready()
        self.assertEqual(sha256(scenery().tree / BIG), sha256(daemon.mountpoint / BIG))
        daemon.says("no space is left")
        run("umount", daemon.mountpoint)
        self.assertEqual(0, daemon.ended(), daemon.log)

    def test_the_blob_of_an_ended_mount_makes_room(self) -> None:
        disk = self.disk()
        daemons = []
        for name, tag, file in (("one", "lz4", "executable"), ("two", "plain", BIG)):
            daemon = self.daemon(self.registry.image("turns", tag), *QUIET, name=name)
            daemon.cache_dir = disk
            daemon.start()
            daemon.ready()
            self.assertEqual(sha256(scenery().tree / file), sha256(daemon.mountpoint / file))
            run("umount", daemon.mountpoint)
            self.assertEqual(0, daemon.ended(), daemon.log)
            daemons.append(daemon)
        blobs = os.listdir(disk / "sha256")
        self.assertEqual([scenery().layers["plain"]["digest"].partition(":")[2]], blobs)

    def test_a_disk_that_cannot_be_written_to_is_an_error_that_names_the_option(self) -> None:
        daemon = self.daemon(self.registry.image("readonly"), foreground=True)
        daemon.cache_dir = self.disk("ro")
        daemon.start()
        waited = daemon.erofs_nbd("wait")
        self.assertEqual(1, daemon.ended())
        self.assertEqual(1, waited.returncode)
        self.assertIn("choose another with --cache-dir", waited.stderr)
        self.assertNotIn("Traceback", daemon.log)


class LimitTests(CacheTestCase):
    def test_the_files_never_take_more_than_the_limit(self) -> None:
        limit = 4 << 20
        server, path = self.serve(self.registry.image("limited", "plain"), *QUIET, "--cache-size", "4M")
        client = self.copying(path)
        most = 0
        while client.poll() is None:
            most = max(most, self.blob_file().stat().st_blocks * 512)
        self.assertEqual(0, client.returncode)
        self.assert_right("copy")
        self.assertLessEqual(most, limit)
        self.assertGreater(most, limit // 2)
        server.send_signal(signal.SIGINT)
        self.assertEqual(0, server.wait(20))
