"""What holds of traces of real mounts, whatever the back end. As `tests.mounting`, to be imported whole."""

from __future__ import annotations

import json
import os
import signal
import stat
import subprocess
import tempfile
from pathlib import Path
from typing import Any

from erofs_twisted.blocks.trace import Trace
from tests.daemon import Daemon, DaemonTestCase, mounts
from tests.processes import BIN, run, until
from tests.scenery import BIG, BIG_SIZE, BLOCK, scenery
from tests.warm import warm_run


class TraceTests(DaemonTestCase):
    def trace_path(self, cache_dir: Path, tag: str = "plain") -> Path:
        return cache_dir / "traces" / scenery().layers[tag]["digest"].replace(":", "/")

    def trace_of(self, daemon: Daemon, tag: str = "plain") -> Trace:
        return Trace.decode(self.trace_path(daemon.cache_dir, tag).read_bytes())

    def erofs_nbd(self, *words: str | Path, **options: Any) -> subprocess.CompletedProcess[str]:
        """``erofs-nbd trace`` with a cache of its own, and a directory that must be empty afterwards."""
        for name in ("tmp", "cache"):
            (self.directory / name).mkdir(mode=0o700, exist_ok=True)
        environment = {**os.environ, "TMPDIR": str(self.directory / "tmp")}
        command, *rest = words
        line = (BIN / "erofs-nbd", "trace", command, "--cache-dir", self.directory / "cache", *rest)
        if self.is_warm and not options:
            done = warm_run(*line, cwd=self.directory, env=environment)
        else:
            done = run(*line, env=environment, **options)
        self.assertNotIn("Traceback", done.stderr)
        self.assert_nothing_of_it_left()
        return done

    def assert_nothing_of_it_left(self) -> None:
        for name in ("tmp", "state"):
            if (self.directory / name).exists():
                self.assertEqual([], os.listdir(self.directory / name))
        self.assert_nothing_left()

    def record(self, image: str, *words: str, **options: Any) -> subprocess.CompletedProcess[str]:
        return self.erofs_nbd("record", *self.where(), image, *words, **options)

    def where(self) -> list[str]:
        return ["--attach", self.attach, "--state-dir", str(self.directory / "state")]

    def test_a_mount_that_records_writes_down_what_is_read_first(self) -> None:
        daemon = self.mounted(self.registry.image("recorded", "plain"), "--trace", "record")
        path = self.trace_path(daemon.cache_dir)
        with (daemon.mountpoint / BIG).open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_RANDOM)
            os.pread(file.fileno(), 1, BIG_SIZE - 1)
        until("a trace, while the mount lasts", path.exists)
        daemon.signal(signal.SIGTERM)
        self.assert_ends_well(daemon)
        trace = self.trace_of(daemon)
        self.assertEqual(0, trace.ranges[0][0], "the superblock")
        self.assertLess(trace.length, BIG_SIZE)
        image = scenery().layer_file("plain").read_bytes()
        last = image.index((scenery().tree / BIG).read_bytes()[-BLOCK:]) + BLOCK - 1
        self.assertTrue(any(start <= last < end for start, end in trace.ranges))
        self.assertEqual(0o600, stat.S_IMODE(path.stat().st_mode))
        self.assertIn("recorded the first reads", daemon.log)

    def test_a_daemon_that_is_killed_loses_little_of_its_recording(self) -> None:
        daemon = self.mounted(self.registry.image("killed-recorder", "plain"), "--trace", "record")
        (daemon.mountpoint / BIG).read_bytes()
        until(
            "all of it in the trace",
            lambda: self.trace_path(daemon.cache_dir).exists() and self.trace_of(daemon).length > BIG_SIZE,
        )
        self.kill(daemon)
        daemon.erofs_nbd("umount")
        self.assertGreater(self.trace_of(daemon).length, BIG_SIZE)
        self.assert_nothing_left(daemon)

    def test_without_being_told_so_nothing_is_recorded(self) -> None:
        for choice in ("auto", "off"):
            daemon = self.mounted(self.registry.image("unrecorded", "plain"), "--trace", choice, name=choice)
            (daemon.mountpoint / "executable").read_bytes()
            daemon.signal(signal.SIGTERM)
            self.assert_ends_well(daemon)
            self.assertFalse(self.trace_path(daemon.cache_dir).exists())

    def test_off_does_not_ask_the_registry_for_a_trace(self) -> None:
        daemon = self.mounted(self.registry.image("off", "plain"), "--trace", "off")
        daemon.signal(signal.SIGTERM)
        self.assert_ends_well(daemon)
        kinds = [request["kind"] for request in self.registry.requests("off")]
        self.assertEqual(1, kinds.count("manifests"))

    def test_a_damaged_trace_is_said_and_disturbs_nothing(self) -> None:
        daemon = self.daemon(self.registry.image("damaged", "plain"))
        path = self.trace_path(daemon.cache_dir)
        path.parent.mkdir(parents=True)
        path.write_bytes(b"{")
        daemon.cache_dir.chmod(0o700)
        daemon.start()
        daemon.ready()
        daemon.says("is not used: not JSON")
        self.assertEqual("#!/bin/sh\necho it runs\n", (daemon.mountpoint / "executable").read_text())
        daemon.signal(signal.SIGTERM)
        self.assert_ends_well(daemon)

    def test_a_registry_that_fails_all_searches_fails_no_mount(self) -> None:
        image = self.registry.image("grumpy", "plain")
        self.registry.set("grumpy", {"kind": "referrers", "status": 500})
        daemon = self.mounted(image)
        daemon.says("no trace of")
        self.assertEqual("#!/bin/sh\necho it runs\n", (daemon.mountpoint / "executable").read_text())
        daemon.signal(signal.SIGTERM)
        self.assert_ends_well(daemon)

    def test_one_command_is_recorded_on_a_mount_of_its_own(self) -> None:
        script = 'test "$1" = "$EROFS_NBD_MOUNTPOINT/big" && cat "$1" | wc -c'
        image = self.registry.image("command", "plain")
        done = self.record(image, "--", "sh", "-c", script, "sh", f"{{}}/{BIG}")
        self.assertEqual((0, ""), (done.returncode, done.stderr))
        self.assertRegex(done.stdout, f"^{BIG_SIZE}\\n")
        self.assertRegex(done.stdout, r"recorded [\d,]+ bytes \([\d.]+% of the layer\) in \d+ ranges: ")
        trace = Trace.decode(self.trace_path(self.directory / "cache").read_bytes())
        self.assertGreater(trace.length, BIG_SIZE)

    def test_a_command_that_fails_is_told_and_what_it_read_is_kept(self) -> None:
        done = self.record(
            self.registry.image("fails", "plain"), "--", "sh", "-c", "cat {}/big >/dev/null; exit 7"
        )
        self.assertEqual(1, done.returncode)
        self.assertIn("sh ended with status 7; what it read was recorded", done.stderr)
        self.assertTrue(self.trace_path(self.directory / "cache").exists())

    def test_a_command_that_is_not_there_leaves_nothing(self) -> None:
        done = self.record(self.registry.image("nocommand", "plain"), "--", "/nonexistent/command")
        self.assertEqual(1, done.returncode)
        self.assertIn("/nonexistent/command: No such file", done.stderr)

    def test_an_option_that_twistd_refuses_is_told_in_its_words(self) -> None:
        done = self.record(self.registry.image("refused", "plain"), "--options", "rw", "--", "true")
        self.assertEqual(1, done.returncode)
        self.assertIn("--options: ", done.stderr)

    def test_an_image_that_cannot_be_mounted_is_told_and_leaves_nothing(self) -> None:
        done = self.record(self.registry.image("torn", "torn"), "--", "true")
        self.assertEqual(1, done.returncode)
        self.assertIn("EROFS", done.stderr)

    def test_interrupted_it_ends_the_command_and_leaves_nothing(self) -> None:
        for name in ("tmp", "cache"):
            (self.directory / name).mkdir(mode=0o700)
        for number in (signal.SIGINT, signal.SIGTERM):
            with tempfile.TemporaryFile("w+") as errors:
                recorder = subprocess.Popen(
                    [
                        BIN / "erofs-nbd", "trace", "record", *self.where(),
                        "--cache-dir", self.directory / "cache", self.registry.image("interrupted", "plain"),
                        "--", "sh", "-c", "echo begun; exec sleep 1000",
                    ],
                    stdout=subprocess.PIPE, stderr=errors, text=True,
                    env={**os.environ, "TMPDIR": str(self.directory / "tmp")},
                )  # fmt: skip
                assert recorder.stdout is not None
                self.assertEqual("begun\n", recorder.stdout.readline())
                recorder.send_signal(number)
                recorder.stdout.close()
                self.assertEqual(1, recorder.wait(60))
                errors.seek(0)
                self.assertEqual(f"erofs-nbd: interrupted by {number.name}\n", errors.read())
            self.assert_nothing_of_it_left()

    def test_a_process_that_a_command_leaves_behind_loses_the_mount(self) -> None:
        image = self.registry.image("left", "plain")
        left = "exec 3<{}/executable; sleep 1000 >/dev/null 2>&1 & echo $!"
        try:
            done = run(
                BIN / "erofs-nbd", "trace", "record", *self.where(),
                "--cache-dir", self.directory / "cache", image, "--", "sh", "-c", left,
            )  # fmt: skip
            self.assertIn("still uses", done.stderr)
            self.assertEqual([], [mount for mount in mounts() if "erofs-nbd-trace" in mount.path])
        finally:
            os.kill(int(done.stdout.splitlines()[0]), signal.SIGKILL)
        daemon = int(done.stderr.partition("process ")[2].split()[0])
        until("the daemon's end", lambda: not Path(f"/proc/{daemon}/fd/0").exists())

    def test_the_password_is_shown_to_nobody(self) -> None:
        password = "correct-horse-battery"
        self.registry.set("secret", user=f"alice:{password}")
        seen = "cat /proc/[0-9]*/cmdline /proc/[0-9]*/environ 2>/dev/null | tr '\\0' ' '"
        done = self.record(
            self.registry.image("secret", "plain"),
            "--username", "alice", "--password-file", "-", "--", "sh", "-c", seen,
            stdin=None, input=password + "\n", errors="replace",
        )  # fmt: skip
        self.assertEqual((0, ""), (done.returncode, done.stderr))
        self.assertIn("--password-file=-", done.stdout)
        self.assertNotIn(password, done.stdout)

    def test_what_was_recorded_is_shown(self) -> None:
        image = self.registry.image("shown", "plain")
        self.assertEqual(0, self.record(image, "--", "cat", "{}/executable").returncode)
        trace = Trace.decode(self.trace_path(self.directory / "cache").read_bytes())
        as_json = json.loads(self.erofs_nbd("show", "--json", image).stdout)
        self.assertEqual([list(pair) for pair in trace.ranges], as_json["ranges"])
        self.assertEqual((trace.digest, trace.length), (as_json["digest"], as_json["bytes"]))
        shown = self.erofs_nbd("show", image).stdout
        self.assertIn(f"{trace.length:,} bytes", shown)
        self.assertEqual(len(trace.ranges) + 2, len(shown.splitlines()))

    def test_an_image_without_a_trace_names_the_command_that_makes_one(self) -> None:
        image = self.registry.image("traceless", "plain")
        for command in ("show", "push"):
            done = self.erofs_nbd(command, image)
            self.assertEqual(1, done.returncode)
            self.assertIn("erofs-nbd trace record", done.stderr)

    def test_an_image_in_a_layout_is_recorded_too(self) -> None:
        image = f"oci:{scenery().layout}:lz4"
        done = self.record(image, "--", "cat", "{}/executable")
        self.assertEqual((0, ""), (done.returncode, done.stderr))
        self.assertTrue(self.trace_path(self.directory / "cache", "lz4").exists())
        pushed = self.erofs_nbd("push", image)
        self.assertIn("push to a registry", pushed.stderr)
