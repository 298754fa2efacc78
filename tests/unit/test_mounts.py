"""A daemon's mounts: what is asked for twice, what fails, what ends, and what an earlier daemon has left."""

from __future__ import annotations

import socket
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import attrs
from twisted.internet.defer import Deferred, fail, succeed
from twisted.internet.task import Clock
from twisted.trial.unittest import SynchronousTestCase
from zope.interface.verify import verifyObject

from erofs_twisted import devices, mounts
from erofs_twisted.control.errors import CallError, MountedOtherwise, NoSuchMount
from erofs_twisted.device.driver import Attached, Reconnected
from erofs_twisted.errors import MountError
from erofs_twisted.interfaces import IMounts
from erofs_twisted.mount.mountpoint import Busy
from erofs_twisted.options import OptionError
from erofs_twisted.recentlines import KEPT, RecentLines
from erofs_twisted.state.journal import Journal
from erofs_twisted.state.records import MountRecord, Status

APP = {"image": "registry.example/app"}
OTHER = {"image": "registry.example/other"}


@attrs.define(eq=False)
class FakeMount:
    """A mount that does what the test says, and writes down what it is asked."""

    config: Any
    state_dir: Path
    pinned: str = ""
    is_wanted: bool = True
    reach: str = ""
    ready: Deferred[None] = attrs.field(factory=Deferred)
    life: Deferred[str | None] = attrs.field(factory=Deferred)
    stops: int = 0
    is_busy: bool = False
    is_mounted: bool = False
    again: Deferred[bool] = attrs.field(factory=Deferred)
    served: Any = None
    record: MountRecord | None = None
    state: Any = None
    backend: str = "nbd"

    async def live(self) -> str | None:
        reference = str(self.config.image.reference)
        self.state = Journal(self.state_dir).claim(self.path, reference, self.config.typed, service=True)
        self.record = self.state.record
        return await self.life

    @property
    def path(self) -> str:
        return str(self.config.mountpoint)

    def come_up(self) -> None:
        self.served = SimpleNamespace(
            device=SimpleNamespace(path="/dev/nbd0"),
            backend=self.backend,
            image=SimpleNamespace(missing=7, fetch_all=lambda: succeed(None)),
        )
        self.state.update(status=Status.READY, layer="sha256:1")
        self.record = self.state.record
        self.is_mounted = True
        self.ready.callback(None)

    def linger(self) -> None:
        """Unmounted lazily, while a file of it is open."""
        self.is_mounted = False
        self.state.update(status=Status.UNMOUNTED, reason="a file is open")
        self.record = self.state.record

    def mount_again(self, reach: str) -> Deferred[bool]:
        self.reach = reach
        return self.again

    def end(self, failure: str | None = None) -> None:
        self.state.release(failure)
        self.life.callback(failure)

    def request_stop(self) -> None:
        self.stops += 1

    def leave(self) -> None:
        _ = self.ready.addCallback(lambda _: self.left())

    def left(self) -> None:
        self.state.leave()
        self.life.callback(None)

    def unmount(self, lazy: bool) -> Deferred[None]:
        if self.is_busy and not lazy:
            return fail(Busy(self.path, [], []))
        if not lazy:
            self.end()
        return succeed(None)


class MountsTestCase(SynchronousTestCase):
    def setUp(self) -> None:
        self.state_dir = Path(self.mktemp())
        self.state_dir.mkdir()
        self.clock = Clock()
        self.made: list[FakeMount] = []
        self.patch(mounts, "Mount", self.make)
        self.patch(mounts, "in_thread", self.at_once)
        self.patch(devices, "SystemCallPool", lambda reactor: SimpleNamespace(stop=lambda: succeed(None)))
        self.lines = RecentLines()
        self.begin()

    def begin(self) -> None:
        self.mounts = mounts.Mounts(self.clock, {"fill": "off"}, self.state_dir, self.lines)

    def make(
        self,
        reactor: object,
        config: Any,
        devices: object,
        *,
        service: bool,
        pinned: str,
        is_wanted: bool,
        reach: str,
    ) -> FakeMount:
        self.assertTrue(service)
        self.made.append(FakeMount(config, self.state_dir, pinned, is_wanted, reach))
        return self.made[-1]

    async def at_once(self, reactor: object, pool: object, call: Any, *arguments: Any) -> Any:
        return call(*arguments)

    def up(self, path: str = "/mnt", options: Any = APP) -> FakeMount:
        """A mount that is up."""
        mounting = self.mounts.mount(path, options)
        self.made[-1].come_up()
        self.assertTrue(self.successResultOf(mounting)[0])
        return self.made[-1]

    def refusal(self, kind: type[Exception], path: str, options: Any) -> str:
        return str(self.failureResultOf(self.mounts.mount(path, options), kind).value)

    def records(self) -> list[str]:
        return [record.mountpoint for record in Journal(self.state_dir).records()]


class MountTests(MountsTestCase):
    def test_it_is_what_a_control_socket_needs(self) -> None:
        self.assertTrue(verifyObject(IMounts, self.mounts))

    def test_it_is_told_of_when_it_can_be_used(self) -> None:
        mounting = self.mounts.mount("/mnt", APP)
        self.assertNoResult(mounting)
        self.assertEqual("starting", self.mounts.one("/mnt")["status"])
        self.made[0].come_up()
        is_new, told = self.successResultOf(mounting)
        self.assertTrue(is_new)
        self.assertEqual(("/mnt", "ready", 7), (told["mountpoint"], told["status"], told["missing"]))
        self.assertEqual([told], self.mounts.mounts())

    def test_the_daemons_options_hold_unless_others_are_given(self) -> None:
        self.assertEqual("off", self.up().config.image.fill)
        self.assertEqual("full", self.up("/other", {**APP, "fill": "full"}).config.image.fill)
        self.assertEqual(self.state_dir.absolute(), self.made[0].config.state_dir)

    def test_the_same_again_is_the_same_mount(self) -> None:
        first, second = self.mounts.mount("/mnt", APP), self.mounts.mount("/mnt", APP)
        self.made[0].come_up()
        self.assertEqual((True, False), (self.successResultOf(first)[0], self.successResultOf(second)[0]))
        self.assertFalse(self.successResultOf(self.mounts.mount("/mnt", APP))[0])
        self.assertEqual(1, len(self.made))

    def test_another_image_or_other_options_are_refused_with_the_cure(self) -> None:
        self.up()
        self.assertIn("erofs-nbd umount /mnt", self.refusal(MountedOtherwise, "/mnt", OTHER))
        self.assertIn("another --fill:", self.refusal(MountedOtherwise, "/mnt", {**APP, "fill": "full"}))

    def test_one_that_fails_is_said_to_all_who_wait_and_leaves_no_record(self) -> None:
        first, second = self.mounts.mount("/mnt", APP), self.mounts.mount("/mnt", APP)
        self.made[0].end("no luck")
        for mounting in (first, second):
            self.assertEqual("no luck", str(self.failureResultOf(mounting, MountError).value))
        self.assertEqual([], self.records())
        self.up()

    def test_one_that_is_called_off_is_said_to_all_who_wait(self) -> None:
        mounting = self.mounts.mount("/mnt", APP)
        self.successResultOf(self.mounts.unmount("/mnt", lazy=False))
        self.assertIn("was unmounted before", str(self.failureResultOf(mounting, MountError).value))

    def test_one_that_is_ending_is_waited_for(self) -> None:
        ending = self.up()
        ending.state.update(status=Status.STOPPING)
        ending.record = ending.state.record
        mounting = self.mounts.mount("/mnt", OTHER)
        self.assertEqual(1, len(self.made))
        ending.end()
        self.made[-1].come_up()
        self.assertTrue(self.successResultOf(mounting)[0])

    def test_what_is_no_mount_is_refused(self) -> None:
        self.assertIn("absolute", self.refusal(CallError, "mnt", APP))
        self.assertIn("'colour'", self.refusal(CallError, "/mnt", {**APP, "colour": "red"}))
        self.assertIn("--fill", self.refusal(OptionError, "/mnt", {**APP, "fill": "maybe"}))
        self.assertIn("--image", self.refusal(OptionError, "/mnt", {}))
        self.assertEqual([], self.made)


class EndTests(MountsTestCase):
    def test_an_unmount_waits_for_the_end(self) -> None:
        self.up()
        self.successResultOf(self.mounts.unmount("/mnt", lazy=False))
        self.assertEqual([], self.mounts.mounts())

    def test_a_lazy_one_does_not(self) -> None:
        self.up()
        self.successResultOf(self.mounts.unmount("/mnt", lazy=True))
        self.assertEqual(1, len(self.mounts.mounts()))

    def test_one_in_use_goes_on(self) -> None:
        self.up().is_busy = True
        self.failureResultOf(self.mounts.unmount("/mnt", lazy=False), Busy)
        self.assertEqual("ready", self.mounts.one("/mnt")["status"])

    def test_what_is_not_there_is_said(self) -> None:
        self.failureResultOf(self.mounts.unmount("/mnt", lazy=False), NoSuchMount)
        self.failureResultOf(self.mounts.prefetch("/mnt"), NoSuchMount)
        self.assertRaises(NoSuchMount, self.mounts.one, "/mnt")
        self.assertRaises(NoSuchMount, self.mounts.log_lines, "/mnt", 0)

    def test_one_that_ends_by_itself_is_forgotten(self) -> None:
        self.up().end("the device was lost")
        self.assertEqual([], self.mounts.mounts())
        self.assertEqual([], self.records())

    def test_at_the_end_all_are_told_to_stop_and_waited_for(self) -> None:
        one, two = self.up("/one"), self.up("/two")
        closing = Deferred.fromCoroutine(self.mounts.close())
        self.assertEqual((1, 1), (one.stops, two.stops))
        self.refusal(MountError, "/three", APP)
        one.end()
        self.assertNoResult(closing)
        again = Deferred.fromCoroutine(self.mounts.close())
        self.assertEqual(2, two.stops)
        two.end()
        self.successResultOf(closing)
        self.successResultOf(again)


class RestoreTests(MountsTestCase):
    """A daemon before this one was killed."""

    def kill(self, *options: tuple[str, dict[str, str]]) -> None:
        for path, given in options:
            mount = self.up(path, given)
            mount.state.update(pid_started=1, digest="sha256:2")
            mount.state.release("killed")
        self.made.clear()
        self.begin()

    def test_its_mounts_come_up_again(self) -> None:
        self.kill(("/one", APP), ("/two", {**OTHER, "fill": "full"}))
        self.assertEqual(2, self.mounts.restore())
        self.assertEqual(
            [("/one", "off", "sha256:2"), ("/two", "full", "sha256:2")],
            sorted((mount.path, mount.config.image.fill, mount.pinned) for mount in self.made),
        )

    def test_one_that_fails_is_tried_again_and_keeps_no_other_from_coming_up(self) -> None:
        self.kill(("/one", APP), ("/two", OTHER))
        self.mounts.restore()
        one, two = sorted(self.made, key=lambda mount: mount.path)
        two.come_up()
        for pause in (1, 2, 4):
            self.made[-1 if pause > 1 else self.made.index(one)].end("the registry is down")
            self.assertIn("/one", self.records(), "for a daemon after this one")
            self.clock.advance(pause)
        self.made[-1].come_up()
        self.assertEqual(["/one", "/two"], [told["mountpoint"] for told in self.mounts.mounts()])
        self.assertEqual(5, len(self.made))

    def test_while_one_cannot_come_up_its_requests_do_not_wait_for_this_daemon(self) -> None:
        mount = self.up("/one")
        mount.state.update(pid_started=1, device="/dev/nbd0", backend="nbd")
        mount.state.release("killed")
        self.begin()
        ours, kernels = socket.socketpair()
        self.addCleanup(kernels.close)
        attached = Attached(index=0, path="/dev/nbd0", connection=1, made_node=False)
        self.mounts.devices.reclaimed["/dev/nbd0"] = Reconnected(attached, ours)
        self.mounts.restore()
        self.assertEqual(["/dev/nbd0"], [*self.mounts.devices.reclaimed])
        self.made[-1].end("the registry is down")
        self.assertEqual(({}, b""), (self.mounts.devices.reclaimed, kernels.recv(1)))

    def taken_away(self) -> list[tuple[str, bool]]:
        """The mounts of the daemon before that are taken away from now on, and if lazily."""
        taken: list[tuple[str, bool]] = []

        async def take_away(*arguments: Any) -> None:
            *_, record, lazy = arguments
            taken.append((record.mountpoint, lazy))

        self.patch(mounts, "take_away", take_away)
        return taken

    def test_one_that_cannot_come_up_is_ended_by_an_unmount(self) -> None:
        self.kill(("/one", APP))
        self.mounts.restore()
        self.made[0].end("the image is gone")
        taken = self.taken_away()
        self.successResultOf(self.mounts.unmount("/one", lazy=True))
        self.clock.advance(100)
        self.assertEqual((1, []), (len(self.made), self.records()))
        self.assertEqual([("/one", True)], taken, "what is mounted there of the daemon before")

    def test_one_that_cannot_come_up_and_is_in_use_is_tried_again(self) -> None:
        self.kill(("/one", APP))
        self.mounts.restore()
        self.made[0].end("the image is gone")

        async def take_away(*arguments: Any) -> None:
            raise Busy("/one", [], [])

        self.patch(mounts, "take_away", take_away)
        self.failureResultOf(self.mounts.unmount("/one", lazy=False), Busy)
        self.assertIn("/one", self.records())
        self.made[-1].come_up()
        self.assertEqual((2, ["/one"]), (len(self.made), [m["mountpoint"] for m in self.mounts.mounts()]))

    def test_one_that_is_unmounted_as_it_comes_up_is_not_tried_again(self) -> None:
        self.kill(("/one", APP))
        self.mounts.restore()
        taken = self.taken_away()
        unmounting = self.mounts.unmount("/one", lazy=False)
        self.assertNoResult(unmounting)
        self.assertEqual(1, self.made[0].stops)
        self.made[0].end("stopped before it was taken over")
        self.successResultOf(unmounting)
        self.clock.advance(100)
        self.assertEqual((1, []), (len(self.made), self.records()))
        self.assertEqual([("/one", False)], taken, "what is mounted there of the daemon before")

    def test_one_that_comes_up_all_the_same_as_it_is_unmounted_ends_by_itself(self) -> None:
        self.kill(("/one", APP))
        self.mounts.restore()
        taken = self.taken_away()
        unmounting = self.mounts.unmount("/one", lazy=False)
        self.made[0].come_up()
        self.assertNoResult(unmounting)
        self.made[0].end()
        self.successResultOf(unmounting)
        self.assertEqual([], self.records())
        self.assertEqual([], taken, "it is off the record")

    def test_one_that_was_unmounted_is_served_to_its_end_and_not_mounted(self) -> None:
        mount = self.up()
        mount.linger()
        mount.state.leave()
        self.made.clear()
        self.begin()
        self.patch(mounts, "daemon_runs", lambda record: False)
        self.mounts.restore()
        self.assertFalse(self.made[0].is_wanted)
        self.made[0].end()
        self.clock.advance(100)
        self.assertEqual((1, []), (len(self.made), self.mounts.mounts()), "nobody used it any more")

    def test_at_the_end_none_is_tried_again(self) -> None:
        self.kill(("/one", APP))
        self.mounts.restore()
        self.made[0].end("the registry is down")
        self.successResultOf(Deferred.fromCoroutine(self.mounts.close()))
        self.assertEqual([], self.clock.getDelayedCalls())

    def test_mounts_of_daemons_of_their_own_are_theirs(self) -> None:
        other = Journal(self.state_dir).claim("/own", "registry.example/own")
        other.update(pid_started=1)
        other.release("killed")
        self.assertEqual(0, self.mounts.restore())


class LingeringTests(MountsTestCase):
    """Unmounted lazily, and a file of it is open."""

    def setUp(self) -> None:
        super().setUp()
        self.lingering = self.up()
        self.lingering.linger()

    def test_the_same_is_mounted_again(self) -> None:
        mounting = self.mounts.mount("/mnt", APP)
        self.assertNoResult(mounting)
        self.lingering.again.callback(True)
        self.assertTrue(self.successResultOf(mounting)[0])
        self.assertEqual(1, len(self.made))

    def test_where_it_ends_meanwhile_a_new_one_is_mounted(self) -> None:
        mounting = self.mounts.mount("/mnt", APP)
        self.lingering.again.callback(False)
        self.assertNoResult(mounting)
        self.lingering.end()
        self.made[1].come_up()
        self.assertTrue(self.successResultOf(mounting)[0])

    def test_where_it_cannot_be_mounted_again_that_is_said(self) -> None:
        mounting = self.mounts.mount("/mnt", APP)
        self.lingering.again.errback(MountError("/mnt is a mount point already"))
        self.failureResultOf(mounting, MountError)

    def test_another_waits_for_its_end_elsewhere(self) -> None:
        said = self.refusal(MountedOtherwise, "/mnt", OTHER)
        self.assertIn("is unmounted from /mnt, and a file is open", said)

    def test_before_it_is_known_that_it_is_used_another_waits(self) -> None:
        self.lingering.state.update(status=Status.READY)
        self.lingering.record = self.lingering.state.record
        mounting = self.mounts.mount("/mnt", OTHER)
        self.assertNoResult(mounting)
        self.lingering.end()
        self.made[1].come_up()
        self.assertTrue(self.successResultOf(mounting)[0])

    def test_it_is_not_unmounted_twice(self) -> None:
        self.successResultOf(self.mounts.unmount("/mnt", lazy=True))
        failure = self.failureResultOf(self.mounts.unmount("/mnt", lazy=False), MountError)
        self.assertEqual("/mnt is unmounted; a file is open", str(failure.value))


class UpgradeTests(MountsTestCase):
    def test_all_mounts_are_left_on_record_and_the_next_daemon_has_them(self) -> None:
        self.up("/one")
        two = self.mounts.mount("/two", OTHER)
        leaving = Deferred.fromCoroutine(self.mounts.leave())
        self.assertNoResult(leaving)
        self.refusal(MountError, "/three", APP)
        self.made[-1].come_up()
        self.successResultOf(two)
        self.successResultOf(leaving)
        self.assertEqual(["/one", "/two"], sorted(self.records()))
        self.begin()
        self.assertEqual(2, self.mounts.restore(), "though their process is this one")


class LogTests(MountsTestCase):
    def say(self, text: str) -> None:
        self.lines({"log_format": "{text}", "text": text, "log_time": 0.0})

    def test_the_lines_are_had_from_a_number_on(self) -> None:
        self.say("one")
        said = self.mounts.log_lines("", 0)
        self.assertTrue(said["lines"][0].endswith("one"))
        self.say("two")
        more = self.mounts.log_lines("", said["next"])
        self.assertEqual(1, len(more["lines"]))
        self.assertEqual([], self.mounts.log_lines("", more["next"])["lines"])

    def test_those_of_a_mount_name_it_or_its_layer(self) -> None:
        self.up()
        for text in ("mounted on /mnt", "bytes of sha256:1", "bytes of sha256:2"):
            self.say(text)
        self.assertEqual(2, len(self.mounts.log_lines("/mnt", 0)["lines"]))

    def test_no_more_than_so_many_are_kept(self) -> None:
        for number in range(KEPT + 10):
            self.say(str(number))
        said = self.mounts.log_lines("", 0)
        self.assertEqual((KEPT, KEPT + 10), (len(said["lines"]), said["next"]))
        self.assertTrue(said["lines"][0].endswith(" 10"))

    def test_the_daemon_says_what_it_is(self) -> None:
        self.up()
        said = self.mounts.status()
        self.assertEqual((1, 1), (said["mounts"], said["devices"]))
        self.assertGreater(said["memory"], 1 << 20)
