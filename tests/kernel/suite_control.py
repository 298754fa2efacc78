"""Many mounts in one daemon, on devices that those of the same layer share."""

from __future__ import annotations

import json
import os
import shutil
import signal
import statistics
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPException
from pathlib import Path
from urllib.parse import quote

from erofs_twisted.state.records import record_name
from tests.controlled import Controlled
from tests.daemon import DaemonTestCase, FaultRegistry, is_mounted, mounts, nbd_devices_in_use
from tests.images import EROFS, Layout, build_erofs
from tests.processes import run, until
from tests.reading import REST, Reader
from tests.scenery import BIG, scenery, sha256
from tests.warm import warm_process

MANY = 100
AGAIN = 20
MOST_MEMORY = 200 << 20
READERS, KILLS = 4, 4
LONGEST_PAUSE = 3.0
"""Seconds that a read takes at most where a parent has all imported."""
SLOWEST_CALL = 0.1
"""Seconds, of 99 calls in 100."""
REQUEUED = 2.5
"""Seconds that a request in flight takes at most, once the new daemon is there: until the kernel's timer."""


class ControlTestCase(DaemonTestCase):
    attach = "nbd"
    options: tuple[str, ...] = ()
    is_warm = True

    def setUp(self) -> None:
        warm_process()  # for the commands, whatever the daemon is
        super().setUp()
        options = ("--attach", self.attach, "--fill", "off", *self.options)
        self.controlled = Controlled(self.directory / "s", options, is_quick=True, is_warm=self.is_warm)
        self.controlled.start()
        self.addCleanup(self.controlled.kill)

    def device_of(self, path: Path) -> str:
        return next(mount.source for mount in mounts() if mount.path == str(path))

    def listed(self) -> dict[str, str]:
        """The status of each mount point."""
        _, said = self.controlled.call("GET", "/v1/mounts")
        return {each["mountpoint"]: each["status"] for each in said["mounts"]}

    def assert_all_gone(self) -> None:
        self.assertEqual(0, self.controlled.stop(), self.controlled.log)
        self.assertNotIn("Traceback", self.controlled.log)
        self.assert_nothing_left()
        self.assertEqual([], list(self.controlled.state_dir.iterdir()))

    def assert_whole(self, *paths: Path) -> None:
        for path in paths:
            self.assertEqual(sha256(scenery().tree / BIG), sha256(path / BIG))


class SharingTests(ControlTestCase):
    def test_mounts_of_a_layer_share_its_device_until_the_last_one_ends(self) -> None:
        before = nbd_devices_in_use()
        one = self.controlled.mount(self.registry.image("a"), "one")
        two = self.controlled.mount(self.registry.image("b"), "two")
        other = self.controlled.mount(self.registry.image("a", "plain"), "other")
        apart = self.controlled.mount(self.registry.image("a"), "apart", "--nbd-read-ahead", "512")
        self.assertEqual(self.device_of(one), self.device_of(two))
        self.assertEqual(3, len({*map(self.device_of, (one, other, apart))}))
        self.assertEqual(0, self.controlled.erofs_nbd("umount", one).returncode)
        self.assert_whole(two, other, apart)
        self.assertEqual(0, self.controlled.erofs_nbd("umount", two).returncode)
        self.assertEqual(2, len(nbd_devices_in_use() - before))
        self.assert_all_gone()

    def test_one_that_is_disconnected_ends_all_its_mounts_and_no_others(self) -> None:
        one = self.controlled.mount(self.registry.image("a"), "one")
        self.controlled.mount(self.registry.image("b"), "two")
        other = self.controlled.mount(self.registry.image("a", "plain"), "other")
        from erofs_twisted.device.driver import NBDDriver

        driver = NBDDriver()
        driver.detach(driver.find(self.device_of(one)))
        until(
            "its mounts have ended", lambda: len(self.controlled.call("GET", "/v1/mounts")[1]["mounts"]) == 1
        )
        self.assert_whole(other)
        self.controlled.mount(self.registry.image("a"), "one")
        self.assert_whole(one, other)
        self.assert_all_gone()


class FuseTests(ControlTestCase):
    attach = "fuse"

    def nbdfuse_of(self, path: Path) -> int:
        """The process that shows the image of a mount as a file."""
        name = record_name(str(path))
        (pid,) = [
            int(process.name)
            for process in Path("/proc").glob("[0-9]*")
            if (words := (process / "cmdline").read_bytes().split(b"\0"))[0].endswith(b"nbdfuse")
            and any(f"/{name}/".encode() in word for word in words)
        ]
        return pid

    def test_one_whose_nbdfuse_is_killed_ends_and_the_others_go_on(self) -> None:
        one = self.controlled.mount(self.registry.image("one"), "one")
        two = self.controlled.mount(self.registry.image("two"), "two")
        other = self.controlled.mount(self.registry.image("other", "plain"), "other")
        struck, *readers = [
            Reader(path / BIG, scenery().tree / BIG, seed, REST)
            for seed, path in enumerate((one, two, other))
        ]
        for reader in (struck, *readers):
            self.addCleanup(reader.kill)
        time.sleep(1)
        os.kill(self.nbdfuse_of(one), signal.SIGKILL)
        struck.end("EIO")
        until("its mount has ended", lambda: not is_mounted(one))
        until("it is off the record", lambda: str(one) not in self.listed())
        self.assertEqual({str(two): "ready", str(other): "ready"}, self.listed())
        status = self.controlled.erofs_nbd("status", one)
        self.assertEqual(1, status.returncode)
        self.assertIn(f"{one} is no mount of this daemon's", status.stderr)
        self.assertIn("was disconnected by somebody else", self.controlled.log)
        self.controlled.mount(self.registry.image("one"), "one")
        for reader in readers:
            self.assertGreater(reader.end()["reads"], 0)
        self.assert_whole(one, two, other)
        self.assertEqual({str(path): "ready" for path in (one, two, other)}, self.listed())
        self.assert_all_gone()


class KillTests(ControlTestCase):
    def test_after_a_kill_all_mounts_go_on_without_an_error(self) -> None:
        paths = [
            self.controlled.mount(self.registry.image(name, tag), name)
            for name, tag in (("one", "lz4"), ("two", "lz4"), ("three", "plain"))
        ]
        devices = [self.device_of(path) for path in paths]
        readers = [Reader(path / BIG, scenery().tree / BIG, seed, REST) for seed, path in enumerate(paths)]
        for reader in readers:
            self.addCleanup(reader.kill)
        time.sleep(1)
        self.controlled.kill()
        self.controlled.start()
        self.controlled.mount(self.registry.image("four"), "four")
        time.sleep(REQUEUED)
        for reader in readers:
            reader.end()
        listed = json.loads(self.controlled.erofs_nbd("ls", "--json").stdout)
        self.assertEqual(["ready"] * 4, [each["status"] for each in listed])
        self.assertEqual(devices, [self.device_of(path) for path in paths])
        self.assertEqual(devices[0], devices[1])
        self.assert_whole(*paths)
        self.assert_all_gone()

    def test_what_it_left_is_cleared_away_mount_by_mount(self) -> None:
        before = nbd_devices_in_use()
        one = self.controlled.directory / "made"
        done = self.controlled.erofs_nbd("mount", self.registry.image("one"), one, "--mkdir")
        self.assertEqual((0, ""), (done.returncode, done.stderr))
        two = self.controlled.mount(self.registry.image("two"), "two")
        three = self.controlled.mount(self.registry.image("three", "plain"), "three")
        self.controlled.kill()
        run("umount", three, check=True)
        self.assertEqual(0, self.controlled.erofs_nbd("umount", three).returncode)
        self.assertEqual(1, len(nbd_devices_in_use() - before), "though it was not mounted any more")
        self.assertEqual(0, self.controlled.erofs_nbd("umount", one).returncode)
        self.assertFalse(one.exists(), "it was made for the mount")
        self.assertEqual(1, len(nbd_devices_in_use() - before), "the other one is mounted from it")
        self.assertEqual(0, self.controlled.erofs_nbd("umount", two).returncode)
        self.assert_nothing_left()

    def test_reattach_has_all_of_them_again_in_one_daemon(self) -> None:
        one = self.controlled.mount(self.registry.image("one"), "one")
        two = self.controlled.mount(self.registry.image("two"), "two")
        device = self.device_of(one)
        self.controlled.kill()
        done = self.controlled.erofs_nbd("reattach", "--all")
        self.assertEqual((0, ""), (done.returncode, done.stderr))
        status = self.controlled.call("GET", "/v1/status")[1]
        self.assertEqual((2, 1), (status["mounts"], status["devices"]))
        self.assertEqual(device, self.device_of(two))
        self.assert_whole(one, two)
        os.kill(status["pid"], signal.SIGTERM)
        until("it has ended", lambda: not self.controlled.socket.exists())
        until("its process too", lambda: os.waitpid(status["pid"], os.WNOHANG)[0])
        self.assert_nothing_left()

    def test_what_is_cached_comes_up_without_its_registry_and_the_rest_when_that_is_back(self) -> None:
        whole = self.controlled.mount(self.registry.image("whole", "plain"), "whole", "--fill", "full")
        lost = self.directory / "lost"
        options = ("--io-timeout", "3", "--cache-dir", str(lost))
        part = self.controlled.mount(self.registry.image("part"), "part", *options)
        self.controlled.kill()
        shutil.rmtree(lost)
        # As after a boot: nothing is mounted, and no device is connected.
        self.take_all_away(whole, part)
        self.registry.go_down()
        try:
            self.controlled.start()
            until("one is up", lambda: is_mounted(whole))
            self.assert_whole(whole)
            until("the other says why not", lambda: f"{part} is not there yet" in self.controlled.log)
            self.assertFalse(is_mounted(part))
        finally:
            self.registry.come_back()
        until("the other is up", lambda: is_mounted(part))
        self.assert_whole(part)
        self.assert_all_gone()

    def test_one_that_cannot_come_up_is_unmounted_all_the_same(self) -> None:
        lost = self.directory / "lost"
        options = ("--io-timeout", "3", "--cache-dir", str(lost))
        part = self.controlled.mount(self.registry.image("part"), "part", *options)
        self.controlled.kill()
        shutil.rmtree(lost)
        self.registry.go_down()
        self.addCleanup(self.registry.come_back)
        self.controlled.start()
        until("it says why not", lambda: f"{part} is not there yet" in self.controlled.log)
        done = self.controlled.erofs_nbd("umount", part)
        self.assertEqual((0, ""), (done.returncode, done.stderr))
        self.assertFalse(is_mounted(part))
        self.assert_all_gone()

    def take_all_away(self, *paths: Path) -> None:
        from erofs_twisted.device.driver import NBDDriver
        from erofs_twisted.syscalls import umount

        driver = NBDDriver()
        for path in paths:
            device = self.device_of(path)
            umount(str(path), 0)
            driver.detach(driver.find(device))


class SupervisedKillTests(ControlTestCase):
    options = ("--supervise",)

    def test_the_parent_has_the_next_one_up_at_once_however_often(self) -> None:
        one = self.controlled.mount(self.registry.image("one"), "one")
        readers = [Reader(one / BIG, scenery().tree / BIG, seed) for seed in range(READERS)]
        for reader in readers:
            self.addCleanup(reader.kill)
        starts = []
        for _ in range(KILLS):
            time.sleep(REQUEUED)
            pid = self.daemon_pid()
            began = time.monotonic()
            os.kill(pid, signal.SIGKILL)
            until("the next one listens", lambda pid=pid: self.daemon_pid() not in (0, pid))
            starts.append(time.monotonic() - began)
        time.sleep(REQUEUED)
        longest = max(reader.end()["pauses"][0] for reader in readers)
        print(f"\nthe next one listens after {max(starts):.2f} s at most; longest pause {longest:.2f} s")
        self.assertLess(longest, LONGEST_PAUSE)
        self.assert_whole(one)
        self.assert_all_gone()

    def daemon_pid(self) -> int:
        """Below its parent; 0 where none listens."""
        try:
            return int(self.controlled.call("GET", "/v1/status")[1]["pid"])
        except (OSError, HTTPException):
            return 0


class LingeringTestCase(ControlTestCase):
    """A mount that was unmounted lazily, while a file of it is read."""

    def setUp(self) -> None:
        super().setUp()
        self.one = self.controlled.mount(self.registry.image("one"), "one")
        self.reader = Reader(self.one / BIG, scenery().tree / BIG, 1, REST)
        self.addCleanup(self.reader.kill)
        self.assertEqual(0, run("umount", "-l", self.one).returncode)
        self.until_it_lingers()

    def until_it_lingers(self) -> None:
        until("it lingers", lambda: self.listed() == {str(self.one): "unmounted"})
        self.assertFalse(is_mounted(self.one))

    def assert_read_and_ended(self) -> None:
        self.assertGreater(self.reader.end()["reads"], 0)
        until("it has ended", lambda: self.listed() == {})
        self.assert_all_gone()


class LingeringTests(LingeringTestCase):
    def test_it_is_mounted_again_from_the_same_device(self) -> None:
        refused = self.controlled.erofs_nbd("mount", self.registry.image("other", "plain"), self.one)
        self.assertEqual(1, refused.returncode)
        self.assertIn(f"is unmounted from {self.one}, and it is served for who has files", refused.stderr)
        refused = self.controlled.erofs_nbd("umount", self.one)
        self.assertEqual(1, refused.returncode)
        self.assertIn(f"{self.one} is unmounted; it is served", refused.stderr)
        self.controlled.mount(self.registry.image("one"), "one")
        self.assertEqual({str(self.one): "ready"}, self.listed())
        self.assert_whole(self.one)
        self.assertEqual(0, self.controlled.erofs_nbd("umount", "--lazy", self.one).returncode)
        self.until_it_lingers()
        self.assert_read_and_ended()

    def test_where_nobody_uses_it_any_more_the_next_daemon_ends_it(self) -> None:
        self.controlled.mount(self.registry.image("one"), "one")
        # It reads nothing, so it can be killed where there is no daemon.
        with (self.one / BIG).open("rb") as file:
            user = subprocess.Popen(["sleep", "600"], stdin=file)
        self.addCleanup(user.wait)
        self.addCleanup(user.kill)
        self.assertGreater(self.reader.end()["reads"], 0)
        self.assertEqual(0, run("umount", "-l", self.one).returncode)
        self.until_it_lingers()
        self.controlled.kill()
        user.kill()
        user.wait()
        self.controlled.start()
        until("it has ended", lambda: self.listed() == {})
        self.assertFalse(is_mounted(self.one))
        self.assert_all_gone()


class LingeringUpgradeTests(LingeringTestCase):
    is_warm = False

    def test_the_next_daemon_serves_it_and_does_not_mount_it(self) -> None:
        self.assertEqual(0, self.controlled.erofs_nbd("upgrade").returncode)
        self.until_it_lingers()
        self.controlled.kill()
        self.controlled.start()
        self.until_it_lingers()
        time.sleep(REQUEUED)
        self.assert_read_and_ended()


class UpgradeTests(ControlTestCase):
    """The daemon is replaced by the program that is installed now, under readers."""

    is_warm = False

    def test_who_reads_does_not_notice(self) -> None:
        paths = [
            self.controlled.mount(self.registry.image(name, tag), name)
            for name, tag in (("one", "lz4"), ("two", "lz4"), ("three", "plain"))
        ]
        readers = [Reader(path / BIG, scenery().tree / BIG, seed, REST) for seed, path in enumerate(paths)]
        for reader in readers:
            self.addCleanup(reader.kill)
        time.sleep(1)
        before = self.controlled.call("GET", "/v1/status")[1]
        began = time.monotonic()
        done = self.controlled.erofs_nbd("upgrade")
        took = time.monotonic() - began
        self.assertEqual((0, ""), (done.returncode, done.stderr))
        after = self.controlled.call("GET", "/v1/status")[1]
        self.assertNotEqual(before["instance"], after["instance"])
        self.assertEqual((3, 2), (after["mounts"], after["devices"]))
        time.sleep(1)
        found = [reader.end() for reader in readers]
        pauses = sorted(pause for each in found for pause in each["pauses"])
        reads = sum(each["reads"] for each in found)
        print(
            f"\nupgrade in {took:.2f} s; {reads} reads: p99 {1000 * pauses[-max(reads // 100, 1)]:.1f} ms, "
            f"longest {pauses[-1]:.2f} s"
        )
        # Nothing is reconnected, so nothing waits for the timer of the block layer.
        self.assertLess(pauses[-1], took)
        self.assert_whole(*paths)
        self.controlled.mount(self.registry.image("four"), "four")
        self.assert_all_gone()


class SupervisedUpgradeTests(UpgradeTests):
    """The parent is replaced, too."""

    options = ("--supervise",)


class ManyTests(ControlTestCase):
    def images(self) -> list[str]:
        """As many small ones, each of its own content."""
        layout = Layout(self.directory / "layout")
        tree = self.directory / "tree"
        tree.mkdir()
        for number in range(MANY):
            (tree / "file").write_bytes(str(number).encode() * 5000)
            layer = layout.blob(build_erofs(tree, self.directory / "small.erofs"), EROFS)
            layout.tag(layout.manifest([layer]), str(number))
        self.small = FaultRegistry(str(layout.directory))
        self.addCleanup(self.small.end)
        return [self.small.image("small", str(number)) for number in range(MANY)]

    def read(self, number: int) -> None:
        content = (self.controlled.directory / str(number) / "file").read_bytes()
        self.assertEqual(str(number).encode() * 5000, content)

    def timed(self, method: str, where: str) -> float:
        began = time.monotonic()
        self.assertEqual(200, self.controlled.call(method, where)[0])
        return time.monotonic() - began

    def test_a_hundred_are_mounted_read_and_mounted_again(self) -> None:
        images = self.images()
        path = self.controlled.directory
        body = [json.dumps({"image": image, "mkdir": True}).encode() for image in images]
        where = [f"/v1/mounts/{quote(str(path / str(number)), safe='')}" for number in range(MANY)]
        with ThreadPoolExecutor(16) as pool:
            answers = list(
                pool.map(lambda number: self.controlled.call("PUT", where[number], body[number]), range(MANY))
            )
            self.assertEqual({201}, {status for status, _ in answers}, answers)
            list(pool.map(self.read, range(MANY)))
            reading = [pool.submit(self.read, number) for _ in range(3) for number in range(AGAIN, MANY)]
            calls: list[float] = []
            for number in range(AGAIN):
                self.assertEqual(200, self.controlled.call("DELETE", where[number])[0])
                calls.append(self.timed("GET", "/v1/status"))
                self.assertEqual(201, self.controlled.call("PUT", where[number], body[number])[0])
                calls += [self.timed("GET", where[-1]) for _ in range(4)]
            for each in reading:
                each.result()
            list(pool.map(self.read, range(MANY)))
        status = self.controlled.call("GET", "/v1/status")[1]
        self.assertEqual((MANY, MANY), (status["mounts"], status["devices"]))
        calls.sort()
        print(
            f"\n{MANY} mounts: {status['memory'] >> 20} MiB, {status['open_files']} files; a call: median "
            f"{1000 * statistics.median(calls):.1f} ms, p99 {1000 * calls[int(0.99 * len(calls))]:.1f} ms"
        )
        self.assertLess(status["memory"], MOST_MEMORY)
        self.assertLess(calls[int(0.99 * len(calls))], SLOWEST_CALL)
        self.controlled.signal(signal.SIGTERM)
        self.assertEqual(0, self.controlled.ended())
        self.small.end()
        self.assert_nothing_left()
