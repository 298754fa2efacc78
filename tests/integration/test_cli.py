"""The commands and the plugin's options, as they are typed. Nothing here needs root."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import signal
import stat
import subprocess
import tempfile
from pathlib import Path

from twisted.trial.unittest import SynchronousTestCase

from erofs_twisted.options import IMAGE_OPTIONS, OPTIONS
from tests.daemon import registry
from tests.images import EROFS
from tests.processes import BIN, run, until, until_serving
from tests.scenery import GZIPPED_TAR, scenery
from tests.servers import tool

LOOKING = {
    "auth-file",
    "hosts-dir",
    "insecure-skip-verify",
    "io-timeout",
    "oci",
    "password-file",
    "plain-http",
    "platform",
    "stall-timeout",
    "tls-ca",
    "username",
    "verbose",
}
"""The options of ``inspect``."""


class CommandTestCase(SynchronousTestCase):
    def setUp(self) -> None:
        self.registry = registry()
        self.directory = Path(tempfile.mkdtemp(prefix="cli-"))
        self.addCleanup(shutil.rmtree, self.directory)

    def erofs_nbd(self, *words: str) -> subprocess.CompletedProcess[str]:
        return run(BIN / "erofs-nbd", *words, cwd=self.directory)

    def assert_refused(self, done: subprocess.CompletedProcess[str], *reasons: str) -> None:
        """Status 1 and a message, not a traceback."""
        self.assertEqual(1, done.returncode, done)
        self.assertNotIn("Traceback", done.stdout + done.stderr)
        for reason in reasons:
            self.assertIn(reason, " ".join((done.stdout + done.stderr).split()))


class InspectTests(CommandTestCase):
    def test_json_has_all_that_is_known_of_an_image(self) -> None:
        image = self.registry.image("app", "index")
        done = self.erofs_nbd("inspect", image, "--platform", "linux/arm64", "--json")
        self.assertEqual((0, ""), (done.returncode, done.stderr))
        plain = scenery().layers["plain"]
        found = json.loads(done.stdout)
        layer = {
            "index": 0,
            "media_type": plain["mediaType"],
            "size": plain["size"],
            "digest": plain["digest"],
            "erofs": True,
        }
        self.assertEqual([layer], found["layers"])
        self.assertEqual(image, found["reference"])
        self.assertEqual(scenery().manifests["index"]["digest"], found["index_digest"])
        self.assertEqual("linux/arm64", found["platform"])
        self.assertEqual(["linux/amd64", "linux/arm64"], found["platforms"])

    def test_the_table_shows_every_layer_and_which_are_erofs(self) -> None:
        done = self.erofs_nbd("inspect", self.registry.image("app", "two"))
        self.assertEqual((0, ""), (done.returncode, done.stderr))
        self.assertIn(scenery().manifests["two"]["digest"], done.stdout)
        plain = scenery().layers["plain"]
        tar, erofs = (line.split() for line in done.stdout.splitlines()[-2:])
        self.assertEqual(["0", "no"], tar[:2])
        self.assertIn(GZIPPED_TAR, tar)
        self.assertEqual(["1", "yes", f"{plain['size']:,}", plain["mediaType"], plain["digest"]], erofs)

    def test_an_image_in_a_layout_on_disk(self) -> None:
        done = self.erofs_nbd("inspect", f"oci:{scenery().layout}:lz4", "--json")
        self.assertEqual((0, ""), (done.returncode, done.stderr))
        self.assertEqual(scenery().manifests["lz4"]["digest"], json.loads(done.stdout)["digest"])
        self.assertEqual(EROFS, json.loads(done.stdout)["layers"][0]["media_type"])

    def test_an_image_that_is_not_there(self) -> None:
        self.assert_refused(self.erofs_nbd("inspect", self.registry.image("app", "absent")), "absent")
        self.assert_refused(self.erofs_nbd("inspect", "oci:/nowhere"), "/nowhere")
        self.assert_refused(self.erofs_nbd("inspect", f"oci:{scenery().layout}"), "lz4")

    def test_no_layer_is_fetched(self) -> None:
        self.assertEqual(0, self.erofs_nbd("inspect", self.registry.image("untouched")).returncode)
        self.assertEqual({"manifests"}, {asked["kind"] for asked in self.registry.requests("untouched")})


class ServeTests(CommandTestCase):
    def serve(self, image: str, *options: str) -> tuple[subprocess.Popen[str], Path]:
        """The server, once it is ready, and its socket."""
        path = self.directory / "socket"
        words = ("--socket", str(path), "--cache-dir", str(self.directory / "cache"), *options)
        server = subprocess.Popen(
            [BIN / "erofs-nbd", "serve", image, *words], stderr=subprocess.PIPE, text=True, cwd=self.directory
        )
        self.addCleanup(server.wait)
        self.addCleanup(server.kill)
        assert server.stderr is not None
        self.addCleanup(server.stderr.close)
        until_serving(server)
        return server, path

    def assert_copies(self, tag: str, path: Path) -> None:
        """nbdcopy gets the EROFS image of a tag, and zeros up to a whole block."""
        copied = self.directory / "copy"
        done = run(tool("nbdcopy"), f"nbd+unix:///?socket={path}", copied)
        self.assertEqual((0, ""), (done.returncode, done.stderr))
        expected = scenery().layer_file(tag).read_bytes()
        expected += bytes(-len(expected) % 4096)
        found = copied.read_bytes()
        self.assertEqual(hashlib.sha256(expected).digest(), hashlib.sha256(found).digest())

    def test_a_client_gets_the_layer_byte_for_byte(self) -> None:
        server, path = self.serve(self.registry.image("served"))
        self.assertEqual(0o600, stat.S_IMODE(path.stat().st_mode))
        self.assert_copies("lz4", path)
        server.send_signal(signal.SIGINT)
        self.assertEqual(0, server.wait(10))
        self.assertFalse(path.exists())

    def test_one_of_several_layers(self) -> None:
        server, path = self.serve(self.registry.image("served", "two"), "--layer", "1")
        self.assert_copies("two", path)
        server.terminate()
        self.assertEqual(0, server.wait(10))

    def test_a_layout_on_disk(self) -> None:
        server, path = self.serve(f"oci:{scenery().layout}:plain")
        self.assert_copies("plain", path)
        server.terminate()
        self.assertEqual(0, server.wait(10))

    def test_what_is_cached_is_not_fetched_again(self) -> None:
        for _ in range(2):
            server, path = self.serve(self.registry.image("kept", "plain"))
            self.assert_copies("plain", path)
            server.terminate()
            server.wait()
        blobs = [asked["range"] for asked in self.registry.requests("kept") if asked["kind"] == "blobs"]
        self.assertEqual(len(set(blobs)), len(blobs))

    def test_a_read_that_fails_is_an_error_and_the_server_goes_on(self) -> None:
        server, path = self.serve(self.registry.image("breaks", "plain"), "--io-timeout", "0.5")
        self.registry.set("breaks", {"kind": "blobs", "status": 500})
        copied = run(tool("nbdcopy"), f"nbd+unix:///?socket={path}", "null:")
        self.assertEqual(1, copied.returncode)
        self.registry.set("breaks")
        self.assert_copies("plain", path)
        self.assertIsNone(server.poll())

    def test_told_to_stop_while_the_registry_stalls_it_ends(self) -> None:
        self.registry.set("unanswered", {"stall": True})
        image, path = self.registry.image("unanswered"), self.directory / "socket"
        server = subprocess.Popen([BIN / "erofs-nbd", "serve", image, "--socket", path], cwd=self.directory)
        self.addCleanup(server.wait)
        self.addCleanup(server.kill)
        until("request", lambda: self.registry.requests("unanswered"))
        server.terminate()
        self.assertEqual(0, server.wait(10))

    def test_a_socket_that_cannot_be_made(self) -> None:
        image, cache = self.registry.image("app"), str(self.directory / "cache")
        for path in ("/nowhere/socket", "/" + "x" * 200):
            done = self.erofs_nbd("serve", image, "--socket", path, "--cache-dir", cache)
            self.assert_refused(done, path)


class HelpTests(CommandTestCase):
    def test_twistd_explains_every_option(self) -> None:
        done = run(BIN / "twistd", "erofs-nbd", "--help", cwd=self.directory)
        self.assertEqual((0, ""), (done.returncode, done.stderr))
        shown = " ".join(done.stdout.split())
        for option in OPTIONS.values():
            self.assertIn(f"--{option.name}", shown)
            self.assertIn(" ".join(option.help.split()), shown)
        self.assertEqual([], [line for line in done.stdout.splitlines() if len(line) > 110])

    def test_twistd_lists_the_plugin(self) -> None:
        done = run(BIN / "twistd", "--help", cwd=self.directory)
        self.assertIn("erofs-nbd", done.stdout)

    def test_each_command_explains_every_option_that_it_takes(self) -> None:
        image_options = {option.name for option in IMAGE_OPTIONS}
        taken = {
            "inspect": LOOKING | {"json"},
            "serve": image_options | {"socket"},
            "wait": {"timeout", "state-dir"},
            "umount": {"lazy", "state-dir"},
            "reattach": {"all", "dry-run", "timeout", "username", "password-file", "state-dir"},
            "doctor": (LOOKING - {"io-timeout", "stall-timeout", "verbose"})
            | {"fix", "json", "layer", "state-dir", "cache-dir"},
        }
        for command, options in taken.items():
            done = self.erofs_nbd(command, "--help")
            self.assertEqual((0, ""), (done.returncode, done.stderr))
            shown = set(re.findall(r"^  (?:-h, )?--([a-z-]+)", done.stdout, re.MULTILINE))
            self.assertEqual({"help", *options}, shown)

    def test_the_commands_are_listed(self) -> None:
        done = self.erofs_nbd("--help")
        for command in ("doctor", "inspect", "reattach", "serve", "umount", "wait"):
            self.assertIn(f"\n  {command} ", done.stdout)


WRONG = {
    "platform": ["amd64", "linux/", ""],
    "layer": ["-1", "one", ""],
    "username": ["alice"],
    "password-file": ["/nowhere/password", ""],
    "auth-file": ["/nowhere/auth.json", "/", ""],
    "hosts-dir": ["/nowhere", "/etc:/nowhere", ""],
    "tls-ca": ["/nowhere/ca.pem", "/", ""],
    "insecure-skip-verify": ["https://host.example", "*", ""],
    "oci": ["colour=red", "layer=", "layer=0,layer=1", "layer"],
    "io-timeout": ["0", "soon", "-1", "nan", "inf"],
    "stall-timeout": ["0", "soon"],
    "options": ["rw", "dev", ""],
    "attach": ["ublk"],
    "on-stop": ["never"],
    "nbd-io-timeout": ["x"],
    "nbd-timeout": ["-3"],
    "nbd-dead-conn-timeout": ["1.5"],
    "nbd-read-ahead": ["3", "99999999"],
    "nbd-max-request": ["0"],
    "image": ["Upper/Case", "http://host/app", "app@sha256:12", "oci:", ""],
    "mountpoint": [""],
}
"""Values that no option takes."""


class MistakeTests(CommandTestCase):
    def test_twistd_refuses_wrong_values_by_the_options_name_before_it_becomes_a_daemon(self) -> None:
        started = []
        for option, values in WRONG.items():
            for value in values:
                given = {"image": "host.example/app", "mountpoint": "/mnt", option: value}
                words = [f"--{name}={content}" for name, content in given.items()]
                started.append((f"--{option}", words))
        for batch in range(0, len(started), 4):
            running = [(option, words, self.twistd(*words)) for option, words in started[batch : batch + 4]]
            for option, words, process in running:
                output = process.communicate()[0]
                done = subprocess.CompletedProcess(words, process.returncode, output, "")
                self.assert_refused(done, option)
        self.assertEqual([], os.listdir(self.directory))

    def twistd(self, *words: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [BIN / "twistd", "--pidfile=pid", "--logfile=log", "erofs-nbd", *words],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            cwd=self.directory,
        )

    def test_twistd_refuses_what_is_missing_and_what_is_too_much(self) -> None:
        for words, reason in (
            (["--mountpoint", "/mnt"], "--image"),
            (["--image", "host.example/app"], "--mountpoint"),
            (["--image", "host.example/app", "--mountpoint", "/mnt", "more"], "more"),
            (["--colour", "red"], "colour"),
        ):
            self.assert_refused(run(BIN / "twistd", "erofs-nbd", *words, cwd=self.directory), reason)

    def test_commands_refuse_wrong_values_by_the_options_name(self) -> None:
        for option in sorted(LOOKING - {"plain-http", "verbose"}):
            done = self.erofs_nbd("inspect", "host.example/app", f"--{option}={WRONG[option][0]}")
            self.assert_refused(done, f"--{option}" if option != "username" else "--password-file")
        self.assert_refused(self.erofs_nbd("inspect", "Upper/Case"), "lower case")
        self.assert_refused(self.erofs_nbd("serve", "host.example/app"), "--socket")
        self.assert_refused(self.erofs_nbd("wait", "/mnt", "--timeout=-1"), "--timeout")
        self.assert_refused(self.erofs_nbd("wait"), "MOUNTPOINT")
        self.assert_refused(self.erofs_nbd("reattach"), "--all")
        self.assert_refused(self.erofs_nbd("reattach", "--all", "/mnt"), "--all")
        self.assert_refused(self.erofs_nbd("reattach", "/mnt", f"--state-dir={self.directory}"), "on record")
        self.assert_refused(self.erofs_nbd("umount", "/mnt", "--state-dir="), "--state-dir")
        self.assert_refused(self.erofs_nbd("doctor", "Upper/Case"), "lower case")
        self.assert_refused(self.erofs_nbd("doctor", "--state-dir="), "--state-dir")
        self.assert_refused(self.erofs_nbd("doctor", "--tls-ca=/etc"), "--tls-ca")
        self.assert_refused(self.erofs_nbd("mount"), "mount")
