"""A daemon with many mounts, by its commands and by its socket."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import stat
import subprocess
import sys
import threading
import time
from pathlib import Path
from urllib.parse import quote

from erofs_twisted.state.records import Status, record_name
from tests.controlled import Controlled
from tests.daemon import DaemonTestCase, mounts
from tests.processes import BIN, run, until
from tests.scenery import BIG, contents, scenery

SHOWN = """
import socket, sys
connection = socket.socket(socket.AF_UNIX)
connection.connect(sys.argv[1])
connection.sendall(b"GET /v1/status HTTP/1.1\\r\\nHost: x\\r\\nConnection: close\\r\\n\\r\\n")
print(connection.makefile().read())
"""


def source_of(path: Path) -> str:
    """What is mounted there."""
    return next(mount.source for mount in mounts() if mount.path == str(path))


def nbdfuses(path: Path) -> list[int]:
    """The processes that show the image that is mounted there."""
    found = []
    for each in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            if (
                each.read_bytes().startswith(b"/usr/bin/nbdfuse")
                and record_name(str(path)) in each.read_text()
            ):
                found.append(int(each.parent.name))
    return found


class ControlTestCase(DaemonTestCase):
    attach = "fuse"

    def setUp(self) -> None:
        super().setUp()
        self.controlled = Controlled(self.directory / "s", ("--attach", self.attach))
        self.controlled.start()
        self.addCleanup(self.controlled.kill)

    def image(self, tag: str) -> str:
        return self.registry.image("app", tag)

    def assert_all_gone(self) -> None:
        self.assertEqual(0, self.controlled.stop(), self.controlled.log)
        self.assertNotIn("Traceback", self.controlled.log)
        self.assert_nothing_left()
        self.assertEqual([], list(self.controlled.state_dir.iterdir()))

    def refusal(self, command: str, *words: str | Path) -> str:
        done = self.controlled.erofs_nbd(command, *words)
        self.assertEqual((1, ""), (done.returncode, done.stdout), done)
        self.assertNotIn("Traceback", done.stderr)
        return " ".join(done.stderr.split())


class CommandTests(ControlTestCase):
    def test_several_images_are_mounted_listed_and_unmounted(self) -> None:
        one, two = (
            self.controlled.mount(self.image("lz4"), "one"),
            self.controlled.mount(self.image("plain"), "two"),
        )
        self.assert_same(contents(scenery().tree), contents(one))
        self.assert_same(contents(scenery().tree), contents(two))
        listed = json.loads(self.controlled.erofs_nbd("ls", "--json").stdout)
        self.assertEqual(
            [(str(one), "ready", self.controlled.pid), (str(two), "ready", self.controlled.pid)],
            sorted((each["mountpoint"], each["status"], each["pid"]) for each in listed),
        )
        table = self.controlled.erofs_nbd("ls").stdout
        self.assertIn(self.image("lz4"), table)
        self.assertEqual(0, self.controlled.erofs_nbd("umount", one).returncode)
        self.assertEqual([], list(one.iterdir()))
        self.assertIn("no mount", self.refusal("umount", one))
        self.assertEqual(1, len(json.loads(self.controlled.erofs_nbd("ls", "--json").stdout)))
        self.assert_all_gone()

    def test_the_same_again_is_no_error_and_another_image_is(self) -> None:
        one = self.controlled.mount(self.image("lz4"), "one")
        self.controlled.mount(self.image("lz4"), "one")
        self.assertIn(f"erofs-nbd umount {one}", self.refusal("mount", self.image("plain"), one))
        self.assertIn("--fill", self.refusal("mount", self.image("lz4"), one, "--fill", "off"))
        self.assert_all_gone()

    def test_what_cannot_be_mounted_is_said_and_not_on_record(self) -> None:
        one = self.controlled.mountpoint("one")
        self.assertIn("not EROFS", self.refusal("mount", self.image("tar"), one))
        self.assertIn("404 Not Found", self.refusal("mount", self.image("nothing"), one, "--io-timeout", "2"))
        self.assertIn("no directory", self.refusal("mount", self.image("lz4"), "/no/where"))
        self.assertIn("--fill: ", self.refusal("mount", self.image("lz4"), one, "--fill", "maybe"))
        self.assertEqual("[]", self.controlled.erofs_nbd("ls", "--json").stdout.strip())
        self.assert_all_gone()

    def test_what_is_in_use_is_named_and_goes_on(self) -> None:
        one = self.controlled.mount(self.image("lz4"), "one")
        with (one / "big").open("rb") as file:
            self.assertIn(f"process {os.getpid()}", self.refusal("umount", one))
            self.assertEqual(0, self.controlled.erofs_nbd("umount", "--lazy", one).returncode)
            self.assertEqual([], list(one.iterdir()))
            self.assertEqual((scenery().tree / "big").read_bytes(), file.read())
        until(
            "the last user has gone", lambda: not json.loads(self.controlled.erofs_nbd("ls", "--json").stdout)
        )
        self.assert_all_gone()

    def test_umount_of_another_program_ends_it_too(self) -> None:
        one = self.controlled.mount(self.image("lz4"), "one")
        run("umount", one, check=True)
        until("it is forgotten", lambda: not json.loads(self.controlled.erofs_nbd("ls", "--json").stdout))
        self.assert_all_gone()

    def test_the_daemon_and_its_mounts_say_how_they_are(self) -> None:
        one = self.controlled.mount(self.image("plain"), "one", "--fill", "off")
        said = json.loads(self.controlled.erofs_nbd("status").stdout)
        self.assertEqual((self.controlled.pid, 1), (said["pid"], said["mounts"]))
        before = json.loads(self.controlled.erofs_nbd("status", one).stdout)
        self.assertGreater(before["missing"], 0)
        self.assertEqual(0, self.controlled.erofs_nbd("prefetch", one).returncode)
        after = json.loads(self.controlled.erofs_nbd("status", one).stdout)
        self.assertEqual((0, "ready"), (after["missing"], after["status"]))
        lines = self.controlled.erofs_nbd("logs", one).stdout
        self.assertIn(f"mounted {self.image('plain')}", lines)
        self.assertNotIn("listening", lines)
        self.assertIn("listening", self.controlled.erofs_nbd("logs").stdout)
        self.assert_all_gone()

    def test_a_log_is_followed(self) -> None:
        command = [BIN / "erofs-nbd", "logs", "--follow", "--state-dir", self.controlled.state_dir]
        following = subprocess.Popen(
            command, stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONUNBUFFERED": "1"}
        )
        assert following.stdout is not None
        try:
            for awaited in ("listening", "mounted"):
                while awaited not in (line := following.stdout.readline()):
                    self.assertTrue(line)
                if awaited == "listening":
                    self.controlled.mount(self.image("lz4"), "one")
            following.send_signal(signal.SIGINT)
            self.assertEqual(0, following.wait(10))
        finally:
            following.kill()
            following.stdout.close()
        self.assert_all_gone()

    def test_where_no_daemon_listens_the_cure_is_said(self) -> None:
        self.assertEqual(0, self.controlled.stop())
        self.assertIn("systemctl start erofs-nbd", self.refusal("mount", self.image("lz4"), "/mnt"))
        self.assertIn("no daemon listens", self.refusal("status"))

    def test_a_second_daemon_on_the_socket_is_refused_and_harms_nobody(self) -> None:
        other = Controlled(self.directory / "s", ("--attach", self.attach))
        done = run(
            BIN / "twistd",
            "-n",
            "--pidfile=",
            "erofs-nbd",
            "--state-dir",
            other.state_dir,
            env=dict(os.environ),
        )
        self.assertEqual(1, done.returncode)
        self.assertIn("another server listens on", done.stdout)
        self.controlled.mount(self.image("lz4"), "one")
        self.assert_all_gone()

    def test_options_of_one_mount_are_refused_for_all(self) -> None:
        done = run(BIN / "twistd", "-n", "--pidfile=", "erofs-nbd", "--username", "alice")
        self.assertEqual(1, done.returncode)
        self.assertIn("--username: belongs to one mount", done.stderr)

    def test_told_to_stop_while_in_use_it_waits_and_told_twice_it_does_not(self) -> None:
        one = self.controlled.mount(self.image("lz4"), "one")
        with (one / "big").open("rb") as file:
            self.controlled.signal(signal.SIGTERM)
            until("it says so", lambda: "is in use by" in self.controlled.log)
            self.controlled.signal(signal.SIGTERM)
            until("it is out of the tree", lambda: not list(one.iterdir()))
            self.assertEqual((scenery().tree / "big").read_bytes(), file.read())
        self.assertEqual(0, self.controlled.ended())
        self.assert_nothing_left()


class SocketTests(ControlTestCase):
    def test_calls_that_are_none_are_refused(self) -> None:
        where = f"/v1/mounts/{quote('/mnt', safe='')}"
        call = self.controlled.call
        self.assertEqual(400, call("GET", "/")[0])
        self.assertEqual(400, call("POST", "/v1/status")[0])
        self.assertEqual(404, call("GET", where)[0])
        self.assertEqual(404, call("DELETE", where)[0])
        self.assertEqual((400, "a whole number"), self.shortened(*call("GET", "/v1/log?after=x"), 14))
        for body in (b"", b"[", b"[]", b'{"image": 1}', b'{"image": {}}', b"\xff", b"[" * 30_000):
            status, said = call("PUT", where, body)
            self.assertEqual(400, status, body)
            self.assertIn("the body is not", said["error"])
        status, said = call("PUT", where, b'{"image": "' + b"x" * 70_000 + b'"}')
        self.assertEqual((400, True), (status, "longer than" in said["error"]))
        self.assertIn("'colour'", call("PUT", where, b'{"image": "a", "colour": "red"}')[1]["error"])
        self.assertIn("absolute", call("PUT", "/v1/mounts/mnt", b'{"image": "a"}')[1]["error"])
        status, said = call("PUT", f"{where}?reach=/etc", b'{"image": "a"}')
        self.assertEqual((400, True), (status, "no open file of a process" in said["error"]), said)
        self.assertEqual((200, {"mounts": []}), call("GET", "/v1/mounts"))
        self.assert_all_gone()

    def shortened(self, status: int, said: dict[str, str], length: int) -> tuple[int, str]:
        return status, said["error"][-length:]

    def test_nobody_else_may_connect_or_call(self) -> None:
        mode = stat.S_IMODE(self.controlled.socket.stat().st_mode)
        self.assertEqual(0o600, mode)
        self.controlled.socket.chmod(0o666)
        for directory in (self.controlled.state_dir, self.controlled.directory, self.directory):
            directory.chmod(0o755)
        done = run(sys.executable, "-c", SHOWN, self.controlled.socket, user=65534, cwd="/")
        self.assertIn("403", done.stdout, done)
        self.assertIn("only root", done.stdout)
        self.assertNotIn("pid", done.stdout)

    def test_a_caller_that_is_killed_does_not_end_what_it_began(self) -> None:
        self.registry.set("slow", {"kind": "blobs", "delay": 2.0, "times": 1})
        one = self.controlled.mountpoint("one")
        command = [
            BIN / "erofs-nbd",
            "mount",
            self.registry.image("slow"),
            one,
            "--state-dir",
            self.controlled.state_dir,
        ]
        caller = subprocess.Popen(command)
        until("it has begun", lambda: self.controlled.call("GET", "/v1/mounts")[1]["mounts"])
        caller.kill()
        caller.wait()
        self.controlled.mount(self.registry.image("slow"), "one")
        self.assert_same(contents(scenery().tree), contents(one))
        self.assert_all_gone()

    def test_one_whose_nbdfuse_is_killed_goes_and_the_others_go_on(self) -> None:
        one = self.controlled.mount(self.image("lz4"), "one")
        two = self.controlled.mount(self.image("lz4"), "two")
        (pid,) = nbdfuses(one)
        os.kill(pid, signal.SIGKILL)
        until("it is gone", lambda: len(self.controlled.call("GET", "/v1/mounts")[1]["mounts"]) == 1)
        self.assert_same(contents(scenery().tree), contents(two))
        done = self.controlled.erofs_nbd("status", one)
        self.assertEqual((1, True), (done.returncode, "is no mount of this daemon's" in done.stderr))
        self.controlled.mount(self.image("lz4"), "one")
        self.assert_same(contents(scenery().tree), contents(one))
        self.assert_all_gone()

    def test_one_that_waits_for_its_image_is_called_off(self) -> None:
        self.registry.set("stalled", {"kind": "blobs", "stall": True})
        one = self.controlled.mountpoint("one")
        calling = threading.Thread(
            target=lambda: said.append(
                self.controlled.erofs_nbd("mount", self.registry.image("stalled"), one)
            )
        )
        said: list[subprocess.CompletedProcess[str]] = []
        calling.start()
        until("it has begun", lambda: self.controlled.call("GET", "/v1/mounts")[1]["mounts"])
        self.assertEqual(0, self.controlled.erofs_nbd("umount", one).returncode)
        calling.join(20)
        self.assertEqual(1, said[0].returncode)
        self.assert_all_gone()

    def test_a_password_is_passed_on_and_shows_nowhere(self) -> None:
        self.registry.set("private", user="alice:hush-hush")
        file = self.directory / "password"
        file.write_text("hush-hush")
        options = ("--username", "alice", "--password-file", str(file))
        self.controlled.mount(self.registry.image("private"), "one", *options)
        shown = (
            json.dumps(self.controlled.call("GET", "/v1/mounts")[1])
            + self.controlled.erofs_nbd("logs").stdout
        )
        shown += self.controlled.log + Path(f"/proc/{self.controlled.pid}/cmdline").read_text()
        shown += "".join(
            path.read_text(errors="replace") for path in self.controlled.state_dir.rglob("*.json")
        )
        self.assertIn("private", shown)
        self.assertNotIn("hush-hush", shown)
        self.assert_all_gone()


class FileLimitTests(DaemonTestCase):
    attach = "fuse"

    def test_a_daemon_that_runs_out_of_files_refuses_mounts_and_goes_on(self) -> None:
        limit = ("prlimit", "--nofile=64:160")
        controlled = Controlled(self.directory / "s", ("--attach", self.attach), under=limit)
        controlled.start()
        self.addCleanup(controlled.kill)
        image = self.registry.image("app")
        mounted = []
        for number in range(20):
            path = controlled.mountpoint(str(number))
            done = controlled.erofs_nbd("mount", image, path)
            if done.returncode != 0:
                break
            mounted.append(path)
        self.assertIn("and may have 160", done.stderr)
        self.assertIn("LimitNOFILE=", done.stderr)
        self.assertGreater(len(mounted), 1)
        for path in mounted:
            self.assert_same(contents(scenery().tree), contents(path))
        self.assertEqual(0, controlled.erofs_nbd("umount", mounted[0]).returncode)
        controlled.mount(image, "0")
        self.assertEqual(0, controlled.stop(), controlled.log)
        self.assertNotIn("Traceback", controlled.log)
        self.assert_nothing_left()


class MountProgramTests(DaemonTestCase):
    """mount(8) finds us by the type, and a daemon is started if none listens."""

    attach = "fuse"

    def setUp(self) -> None:
        super().setUp()
        for name in ("mount.erofs-nbd", "umount.erofs-nbd"):
            link = Path("/sbin", name)
            if not os.path.lexists(link):
                link.symlink_to(BIN / name)
                self.addCleanup(link.unlink)
        self.options = f"attach=fuse,state-dir={self.directory}/state,cache-dir={self.directory}/cache"
        self.addCleanup(self.end_daemon)

    def end_daemon(self) -> None:
        """The one that was started for us."""
        state_dir = self.directory / "state"
        if (state_dir / "control").exists():
            said = run(BIN / "erofs-nbd", "status", "--state-dir", state_dir, check=True).stdout
            pid = json.loads(said)["pid"]
            os.kill(pid, signal.SIGTERM)
            until("it has ended", lambda: not Path(f"/proc/{pid}").exists() or os.waitpid(pid, os.WNOHANG)[0])

    def mount(self, image: str, name: str, options: str) -> subprocess.CompletedProcess[str]:
        path = self.directory / name
        path.mkdir(exist_ok=True)
        return run("mount", "-t", "erofs-nbd", image, path, "-o", options)

    def test_images_are_mounted_and_unmounted(self) -> None:
        one, two = (self.registry.image("app", tag) for tag in ("index", "plain"))
        done = self.mount(
            one, "one", f"_netdev,nofail,oci.platform=linux/arm64,noexec,fill=off,{self.options}"
        )
        self.assertEqual((0, ""), (done.returncode, done.stdout + done.stderr))
        self.assertEqual(0, self.mount(two, "two", self.options).returncode)
        self.assert_same(contents(scenery().tree), contents(self.directory / "one"))
        mounted = next(each for each in mounts() if each.path == str(self.directory / "one"))
        self.assertEqual("erofs", mounted.fstype)
        listed = json.loads(
            run(BIN / "erofs-nbd", "ls", "--json", "--state-dir", self.directory / "state").stdout
        )
        self.assertEqual(1, len({each["pid"] for each in listed}), "one daemon for both")
        self.assertEqual(scenery().layers["plain"]["digest"], listed[0]["layer"])
        for name in ("one", "two"):
            self.assertEqual(0, run("umount", self.directory / name).returncode)
        self.end_daemon()
        self.assert_nothing_left()

    def test_what_is_wrong_is_said_in_one_line(self) -> None:
        for options, reason in (
            ("fill=maybe", "mount.erofs-nbd: -o fill: 'maybe'"),
            ("strange=1", "an option that this kernel"),
            ("oci.layer", "-o oci.layer: has no value"),
        ):
            done = self.mount(self.registry.image("app"), "one", f"{options},{self.options}")
            self.assertEqual(32, done.returncode)
            self.assertIn(reason, done.stderr)
            self.assertNotIn("Traceback", done.stderr)
        done = self.mount(self.registry.image("app", "tar"), "one", self.options)
        self.assertEqual(32, done.returncode)
        self.assertIn("not EROFS", done.stderr)


class SuperviseTests(DaemonTestCase):
    """A parent that forks the daemon, and forks it again when it dies."""

    attach = "fuse"

    def setUp(self) -> None:
        super().setUp()
        self.controlled = Controlled(self.directory / "s", ("--attach", self.attach, "--supervise"))
        self.addCleanup(self.controlled.kill)

    def daemon_pid(self) -> int:
        try:
            return int(self.controlled.call("GET", "/v1/status")[1]["pid"])
        except OSError:
            return 0

    def test_one_that_is_killed_is_followed_by_another_that_has_its_mounts(self) -> None:
        self.controlled.start()
        one = self.controlled.mount(self.registry.image("app"), "one")
        killed = self.daemon_pid()
        self.assertNotEqual(self.controlled.pid, killed)
        os.kill(killed, signal.SIGKILL)
        until("another one listens", lambda: self.daemon_pid() not in (0, killed))
        until(
            "it has the mount",
            lambda: self.controlled.call("GET", "/v1/mounts")[1]["mounts"][0]["status"] == "ready",
        )
        self.assert_same(contents(scenery().tree), contents(one))
        self.assertEqual(0, self.controlled.stop())
        self.assert_nothing_left()

    def test_its_end_and_its_status_are_the_parents(self) -> None:
        self.controlled.start()
        os.kill(self.daemon_pid(), signal.SIGTERM)
        self.assertEqual(0, self.controlled.ended())
        self.controlled.start()
        other = Controlled(self.directory / "s", self.controlled.options)
        with self.assertRaisesRegex(AssertionError, "status 1"):
            other.start()
        self.assertEqual(0, self.controlled.stop())
        self.assert_nothing_left()

    def assert_upgraded(self) -> None:
        one = self.controlled.mount(self.registry.image("app"), "one", "--fill", "off")
        device = source_of(one)
        with (one / BIG).open("rb") as reading:
            for _ in range(2):
                before = self.controlled.call("GET", "/v1/status")[1]
                done = self.controlled.erofs_nbd("upgrade")
                self.assertEqual((0, ""), (done.returncode, done.stderr))
                after = self.controlled.call("GET", "/v1/status")[1]
                self.assertNotEqual(before["instance"], after["instance"])
                self.assertEqual(device, source_of(one))
            self.assertTrue(reading.read() == (scenery().tree / BIG).read_bytes())
        self.assert_same(contents(scenery().tree), contents(one))
        self.controlled.mount(self.registry.image("app"), "two")
        self.assertEqual(0, self.controlled.stop())
        self.assert_nothing_left()

    def test_an_upgrade_hands_the_device_over(self) -> None:
        self.controlled.start()
        self.assert_upgraded()
        self.assertNotIn("ended with status", self.controlled.log)

    def test_an_upgrade_without_a_parent_does_too(self) -> None:
        self.controlled.options = ("--attach", self.attach)
        self.controlled.start()
        self.assert_upgraded()

    def test_asked_again_while_it_is_upgraded_it_goes_on(self) -> None:
        self.controlled.start()
        one = self.controlled.mount(self.registry.image("app"), "one", "--fill", "off")
        first = self.daemon_pid()
        for _ in range(20):
            # Most of them while the parent imports what it needs.
            os.kill(self.controlled.pid, signal.SIGUSR2)
            time.sleep(0.05)
        until("another one listens", lambda: self.daemon_pid() not in (0, first))
        self.assert_same(contents(scenery().tree), contents(one))
        done = self.controlled.erofs_nbd("upgrade")
        self.assertEqual((0, ""), (done.returncode, done.stderr), self.controlled.log)
        self.assertEqual(0, self.controlled.stop())
        self.assertNotIn("another server listens", self.controlled.log)
        self.assert_nothing_left()

    def test_without_its_parent_it_goes_on_as_it_is(self) -> None:
        self.controlled.start()
        one = self.controlled.mount(self.registry.image("app"), "one", "--fill", "off")
        daemon = self.daemon_pid()
        self.controlled.kill()
        refused = self.controlled.erofs_nbd("upgrade")
        self.assertEqual((1, ""), (refused.returncode, refused.stdout))
        self.assertIn("the parent (process", refused.stderr)
        self.assertIn(f"has been killed: kill this one, too ('kill -9 {daemon}')", refused.stderr)
        self.assert_same(contents(scenery().tree), contents(one))
        os.kill(daemon, signal.SIGTERM)
        until("it has ended", lambda: os.waitpid(daemon, os.WNOHANG)[0])
        self.assert_nothing_left()

    def test_the_daemon_goes_on_where_the_next_one_dies(self) -> None:
        self.controlled.start()
        one = self.controlled.mount(self.registry.image("app"), "one")
        daemon = self.daemon_pid()
        os.kill(daemon, signal.SIGSTOP)
        try:
            os.kill(self.controlled.pid, signal.SIGUSR2)
            children = Path(f"/proc/{self.controlled.pid}/task/{self.controlled.pid}/children")

            def others() -> list[int]:
                return [pid for pid in map(int, children.read_text().split()) if pid != daemon]

            (following,) = until("the next one is there", others)
            os.kill(following, signal.SIGKILL)
            until("its end is noticed", lambda: not others())
        finally:
            os.kill(daemon, signal.SIGCONT)
        self.assert_same(contents(scenery().tree), contents(one))
        self.assertEqual(0, self.controlled.stop())
        self.assert_nothing_left()

    def test_one_mount_is_supervised_too(self) -> None:
        daemon = self.daemon(self.registry.image("app"), "--supervise", foreground=True)
        daemon.start()

        def serving() -> int:
            record = daemon.record()
            return record.pid if record is not None and record.status is Status.READY else 0

        killed = until("it has mounted", serving)
        self.assertNotEqual(daemon.pid, killed)
        os.kill(killed, signal.SIGKILL)
        until("another one has mounted", lambda: serving() not in (0, killed))
        daemon.signal(signal.SIGTERM)
        self.assert_ends_well(daemon)

    def test_in_the_background_it_is_refused(self) -> None:
        done = run(BIN / "twistd", "--pidfile=", "erofs-nbd", "--supervise")
        self.assertEqual(1, done.returncode)
        self.assertIn("--supervise goes with twistd -n", done.stderr)
