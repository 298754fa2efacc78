"""Traces that travel: recorded here, pushed to registries of both kinds, and found by a mount elsewhere."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import urllib.request
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from erofs_twisted.blocks.trace import MEDIA_TYPE, Trace
from erofs_twisted.registry.digest import Digest
from erofs_twisted.registry.referrers import fallback_tag
from tests.daemon import DaemonTestCase
from tests.images import OCI_INDEX, Layout, push
from tests.processes import BIN, run
from tests.referrersregistry import ReferrersRegistry
from tests.scenery import BIG, scenery
from tests.servers import DockerRegistry, TokenServer

TAG = "plain"


class TravelTestCase(DaemonTestCase):
    attach = "fuse"

    def serve(self) -> Any:
        """Start a registry."""
        raise NotImplementedError

    def setUp(self) -> None:
        self.server = self.serve()  # before children are counted
        super().setUp()
        self.image_digest = scenery().manifests[TAG]["digest"]
        self.layer = scenery().layers[TAG]
        self.options: tuple[str, ...] = ()

    def push_image(self, headers: Mapping[str, str] | None = None) -> str:
        """The image's name."""
        layout = object.__new__(Layout)
        layout.directory = scenery().layout
        push(layout, scenery().manifests[TAG], self.server.url, "team/app:1", headers=headers)
        return f"{self.server.authority}/team/app:1"

    def erofs_nbd(self, command: str, image: str, *more: str, cache: str) -> subprocess.CompletedProcess[str]:
        return run(
            BIN / "erofs-nbd", "trace", command, *self.options, "--cache-dir", self.cache(cache), image, *more
        )

    def cache(self, name: str) -> Path:
        path = self.directory / name
        path.mkdir(mode=0o700, exist_ok=True)
        return path

    def record(self, image: str, read: str = "executable") -> Trace:
        """Record on a machine of its own, so to say."""
        where = ("--attach", self.attach, "--state-dir", str(self.directory / "state"))
        before, self.options = self.options, (*self.options, *where)
        done = self.erofs_nbd("record", image, "--", "cp", f"{{}}/{read}", "/dev/null", cache="ci")
        self.options = before
        self.assertEqual((0, ""), (done.returncode, done.stderr))
        return Trace.decode(self.kept("ci").read_bytes())

    def kept(self, cache: str) -> Path:
        return self.directory / cache / "traces" / self.layer["digest"].replace(":", "/")

    def push_trace(self, image: str) -> str:
        done = self.erofs_nbd("push", image, cache="ci")
        self.assertEqual((0, ""), (done.returncode, done.stderr))
        return done.stdout.strip()

    def assert_found_elsewhere(self, image: str, trace: Trace) -> None:
        shown = self.erofs_nbd("show", image, "--json", cache="look")
        self.assertEqual((0, ""), (shown.returncode, shown.stderr))
        self.assertEqual([list(pair) for pair in trace.ranges], json.loads(shown.stdout)["ranges"])
        daemon = self.mounted(image, *self.options, "--fill", "off")
        daemon.says(f"fetching {trace.length} bytes that the trace of {trace.digest} names")
        self.assertEqual((scenery().tree / BIG).read_bytes(), (daemon.mountpoint / BIG).read_bytes())
        daemon.signal(signal.SIGTERM)
        self.assert_ends_well(daemon)
        path = daemon.cache_dir / "traces" / self.layer["digest"].replace(":", "/")
        self.assertEqual(trace, Trace.decode(path.read_bytes()))


class DockerRegistryTests(TravelTestCase):
    """docker-registry 2.8: it has no referrers API."""

    def serve(self) -> DockerRegistry:
        return self.enterContext(DockerRegistry())

    def test_a_trace_that_was_pushed_is_found_by_a_mount_with_an_empty_cache(self) -> None:
        image = self.push_image()
        trace = self.record(image)
        digest = self.push_trace(image)
        tag = fallback_tag(Digest(self.image_digest))
        url = f"{self.server.url}/v2/team/app/manifests/{tag}"
        with urllib.request.urlopen(urllib.request.Request(url, headers={"Accept": OCI_INDEX})) as answer:
            (entry,) = json.load(answer)["manifests"]
        self.assertEqual((digest, MEDIA_TYPE), (entry["digest"], entry["artifactType"]))
        self.assert_found_elsewhere(image, trace)

    def test_a_second_trace_takes_the_place_of_the_first_and_pushing_it_again_changes_nothing(self) -> None:
        image = self.push_image()
        first = self.record(image)
        self.push_trace(image)
        os.utime(self.kept("ci"), (1_000_000_000, 1_000_000_000))
        old = self.push_trace(image)
        second = self.record(image, BIG)
        self.assertNotEqual(first, second)
        new = self.push_trace(image)
        self.assertNotEqual(old, new)
        self.assertEqual(new, self.push_trace(image))
        self.assert_found_elsewhere(image, second)

    def test_a_registry_without_traces_is_asked_twice(self) -> None:
        image = self.push_image()
        daemon = self.mounted(image)
        daemon.signal(signal.SIGTERM)
        self.assert_ends_well(daemon)
        searches = [
            line for line in self.server.log.splitlines() if "/referrers/" in line or "/sha256-" in line
        ]
        self.assertEqual(2, sum('"GET /v2/' in line for line in searches), self.server.log)
        self.assertNotIn("trace", daemon.log)


class TokenTests(TravelTestCase):
    """docker-registry behind a token server."""

    def serve(self) -> DockerRegistry:
        self.tokens = self.enterContext(TokenServer(users={"alice": "secret"}))
        return self.enterContext(DockerRegistry(auth=self.tokens.registry_auth))

    def test_a_user_pushes_by_token_and_anybody_else_is_told_what_it_takes(self) -> None:
        image = self.push_image(self.tokens.authorization("team/app"))
        secret = self.directory / "secret"
        secret.write_text("secret\n")
        self.options = ("--username", "alice", "--password-file", str(secret))
        trace = self.record(image)
        self.push_trace(image)
        self.assert_found_elsewhere(image, trace)
        self.options = ()
        refused = self.erofs_nbd("push", image, cache="ci")
        self.assertEqual(1, refused.returncode)
        self.assertIn("--username and --password-file", refused.stderr)


class ReferrersApiTests(TravelTestCase):
    def serve(self) -> ReferrersRegistry:
        return self.enterContext(ReferrersRegistry())

    def test_a_trace_that_was_pushed_is_found_by_a_mount_with_an_empty_cache(self) -> None:
        image = self.push_image()
        trace = self.record(image)
        digest = self.push_trace(image)
        self.assertIn(digest, self.server.manifests)
        self.assertNotIn(fallback_tag(Digest(self.image_digest)), self.server.manifests)
        self.assert_found_elsewhere(image, trace)

    def test_a_registry_without_traces_is_asked_once(self) -> None:
        daemon = self.mounted(self.push_image())
        daemon.signal(signal.SIGTERM)
        self.assert_ends_well(daemon)
        searches = [line for line in self.server.requests if "/referrers/" in line or "/sha256-" in line]
        self.assertEqual([f"GET /v2/team/app/referrers/{self.image_digest}"], searches)
