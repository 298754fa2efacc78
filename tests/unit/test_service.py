"""The life of a mount: every order of events, with parts that only write down what is asked of them."""

from __future__ import annotations

import errno
import json
import os
import socket
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import attrs
from twisted.internet.defer import CancelledError, Deferred, succeed
from twisted.internet.testing import MemoryReactorClock
from twisted.trial.unittest import SynchronousTestCase

from erofs_twisted import devices, mounting, service, succession, taking
from erofs_twisted.device.driver import Attached, Reconnected
from erofs_twisted.errors import MountError, ReadError
from erofs_twisted.handover import Handover
from erofs_twisted.interfaces import Connected, HandedConnection, HandedDevice
from erofs_twisted.mount.mountpoint import Busy
from erofs_twisted.options import MountConfig, read_mount_config
from erofs_twisted.process import ExitStatus
from erofs_twisted.state import journal
from erofs_twisted.state.journal import Journal
from erofs_twisted.state.records import Status
from erofs_twisted.succession import Legacy

DIGEST = f"sha256:{1:064}"
STARTED = ["check", "choose", "open", "attach", "check image", "mount"]
STOPPED = ["unmount", "detach", "stop server", "close image", "remove directory", "stop pool"]


@attrs.define
class World:
    """What the service finds when it reaches for its parts. ``fails`` and ``waits`` are by step."""

    events: list[str] = attrs.field(factory=list)
    fails: dict[str, Exception] = attrs.field(factory=dict)
    waits: dict[str, Deferred[None]] = attrs.field(factory=dict)
    busy: int = 0
    """How often a mount that is not unmounted lazily is in use."""
    opened: str = ""
    """The image."""
    identifier: str = ""
    """What the device says of its server."""
    held: int = 0
    """How often the device is in use after that."""
    missing: bool = False
    """Is there no mount point?"""
    there: Any = None
    """What is mounted on the mount point before."""
    devices: list[Connected] = attrs.field(factory=list)
    """Those that are connected before."""
    unmounted: Deferred[None] = attrs.field(factory=Deferred)
    lost: Deferred[None] = attrs.field(factory=Deferred)

    async def step(self, name: str) -> None:
        self.events.append(name)
        if name in self.waits:
            await self.waits[name]
        if name in self.fails:
            raise self.fails[name]

    def install(self, case: SynchronousTestCase) -> None:
        parts: dict[str, Any] = {
            "SystemCallPool": lambda reactor: SimpleNamespace(stop=lambda: self.step("stop pool")),
            "Mountpoint": lambda reactor, pool, path, reach: FakeMountpoint(self, path, reach),
            "NetlinkConnector": lambda *arguments, **keywords: FakeConnector(self),
            "FuseConnector": lambda *arguments, **keywords: FakeConnector(self, "fuse"),
            "MountWatch": lambda reactor: SimpleNamespace(
                gone=lambda path: self.unmounted, close=lambda: None
            ),
            "choose_connector": self.choose_connector,
        }
        for name, part in parts.items():
            case.patch(mounting, name, part)
        case.patch(taking, "find_image", self.find_image)
        case.patch(taking, "NBDServer", self.server)
        case.patch(succession, "in_thread", self.at_once)
        case.patch(devices, "SystemCallPool", lambda reactor: SimpleNamespace(stop=lambda: succeed(None)))

    async def at_once(self, reactor: object, pool: object, call: Callable[..., Any], *arguments: Any) -> Any:
        return call(*arguments)

    def server(self, reactor: object) -> Any:
        return SimpleNamespace(stop=lambda: self.step("stop server"), hand_over=self.hand_over)

    async def hand_over(self) -> list[HandedConnection]:
        await self.step("hand over")
        return []

    async def choose_connector(self, *arguments: Any) -> FakeConnector:
        await self.step("choose")
        return FakeConnector(self)

    async def find_image(self, reactor: object, pool: object, config: Any) -> Any:
        self.opened = str(config.reference)
        await self.step("open")
        return SimpleNamespace(
            layer=SimpleNamespace(digest="sha256:2"),
            resolved=SimpleNamespace(digest=DIGEST),
            open=self.open_image,
            close=lambda: succeed(None),
        )

    async def open_image(self) -> Any:
        return SimpleNamespace(
            export=SimpleNamespace(description="a layer", size=8192),
            check=lambda: self.step("check image"),
            abandon=lambda: self.waits["mount"].errback(MountError("EIO")),
            close=lambda: self.step("close image"),
        )


@attrs.define
class FakeMountpoint:
    world: World
    path: str
    reach: str = ""
    mount_id: int = 0
    made: bool = False

    async def check(self, make: bool) -> None:
        await self.world.step("check")

    async def there(self) -> Any:
        return self.world.there

    async def is_missing(self) -> bool:
        return self.world.missing

    def adopt(self, mount_id: int, made: bool) -> None:
        self.mount_id = mount_id
        self.made = made

    async def mount(self, *arguments: Any) -> None:
        await self.world.step("mount")
        self.mount_id = 77
        self.world.there = SimpleNamespace(source="/dev/nbd0", mount_id=77)

    async def unmount(self, lazy: bool = False) -> None:
        if self.world.unmounted.called:
            return
        if not lazy and self.world.busy:
            self.world.busy -= 1
            self.world.events.append("busy")
            raise Busy(self.path, [], [])
        await self.world.step("unmount lazily" if lazy else "unmount")
        self.world.there = None
        self.world.unmounted.callback(None)

    async def remove_if_made(self) -> None:
        await self.world.step("remove directory made for it" if self.made else "remove directory")


@attrs.define
class FakeConnector:
    world: World
    name: str = "nbd"

    async def attach(self, export: object, server: object, identifier: str) -> FakeDevice:
        self.world.identifier = identifier
        try:
            await self.world.step("attach")
        except CancelledError:
            # As connectors do: what was begun comes to its end, and is taken back.
            await self.world.step("detach")
            raise
        return FakeDevice(self.world, self.world.lost)

    async def connected(self, identifier: str) -> list[Connected]:
        return self.world.devices

    async def adopt(self, path: str, export: object, server: object, identifier: str) -> FakeDevice:
        await self.world.step("adopt")
        return FakeDevice(self.world, self.world.lost)

    async def disconnect(self, path: str) -> None:
        await self.world.step(f"disconnect {path}")


@attrs.define
class FakeDevice:
    world: World
    lost: Deferred[None]
    path: str = "/dev/nbd0"

    def leave(self) -> HandedDevice:
        self.world.events.append("leave device")
        return HandedDevice(path=self.path)

    def is_held(self) -> Deferred[bool]:
        self.world.held -= 1
        return succeed(self.world.held >= 0)

    async def detach(self) -> None:
        await self.world.step("detach")


class MountServiceTestCase(SynchronousTestCase):
    def setUp(self) -> None:
        self.state_dir = Path(self.mktemp())
        self.begin_anew(World())

    def begin_anew(self, world: World) -> None:
        self.world = world
        self.world.install(self)
        self.reactor = MemoryReactorClock()
        self.stopped = 0
        self.reactor.stop = self.stop_reactor  # type: ignore[method-assign]
        self.exit_status = ExitStatus()

    def stop_reactor(self) -> None:
        self.stopped += 1
        self.assertIsNone(self.service.stopService())

    def config(self, **values: str) -> MountConfig:
        return read_mount_config(
            {
                "image": "registry.example/app",
                "mountpoint": "/mnt",
                "state-dir": str(self.state_dir),
                **{name.replace("_", "-"): value for name, value in values.items()},
            }
        )

    def start(self, legacy: Legacy | None = None, **values: str) -> None:
        config = self.config(**values)
        self.service = service.MountService(self.reactor, config, self.exit_status, legacy)
        self.service.startService()
        for hook, arguments, keywords in self.reactor.whenRunningHooks[
            1:
        ]:  # the first installs signal handlers
            hook(*arguments, **keywords)

    def record(self) -> Any:
        return Journal(self.state_dir).read("/mnt")

    def assert_ended(self, status: int) -> None:
        self.assertEqual((1, status), (self.stopped, self.exit_status.status))


class OrderTests(MountServiceTestCase):
    def test_a_mount_starts_step_by_step_and_says_when_it_is_ready(self) -> None:
        self.start()
        self.assertEqual(STARTED, self.world.events)
        record = self.record()
        self.assertEqual(
            (Status.READY, "nbd", "/dev/nbd0", DIGEST),
            (record.status, record.backend, record.device, record.digest),
        )
        self.assertEqual(0, self.stopped)

    def test_told_to_stop_it_takes_everything_back_in_the_reverse_order(self) -> None:
        self.start()
        self.service.request_stop("SIGTERM")
        self.assertEqual(STARTED + STOPPED, self.world.events)
        self.assert_ended(0)
        self.assertEqual([], list(self.state_dir.iterdir()))

    def test_unmounted_by_somebody_else_it_ends_the_same_way(self) -> None:
        self.start()
        self.world.unmounted.callback(None)
        self.assertEqual(STARTED + STOPPED[1:], self.world.events)
        self.assert_ended(0)
        self.assertEqual([], list(self.state_dir.iterdir()))

    def test_a_failure_at_any_step_takes_back_those_before_it_and_tells_why(self) -> None:
        undone = {"check": 4, "choose": 4, "open": 4, "attach": 2, "check image": 1, "mount": 1}
        for number, step in enumerate(STARTED, 1):
            self.begin_anew(World(fails={step: ReadError(f"no luck with {step}")}))
            self.start()
            self.assertEqual(STARTED[:number] + STOPPED[undone[step] :], self.world.events)
            self.assert_ended(1)
            self.assertEqual(
                (Status.FAILED, f"no luck with {step}"), (self.record().status, self.record().reason)
            )
            self.assertEqual(("", ""), (self.record().device, self.record().backend), "it was given back")

    def test_an_unexpected_error_ends_the_daemon_too(self) -> None:
        self.world.fails["attach"] = KeyError("a bug")
        self.start()
        self.assertEqual(STARTED[:4] + STOPPED[2:], self.world.events)
        self.assert_ended(1)
        self.assertIn("unexpected KeyError", self.record().reason)
        self.assertEqual(1, len(self.flushLoggedErrors(KeyError)))

    def test_a_mount_point_that_another_daemon_serves_is_left_alone(self) -> None:
        other = Journal(self.state_dir).claim("/mnt", "registry.example/other")
        self.addCleanup(other.release)
        self.start()
        self.assertEqual([], self.world.events)
        self.assert_ended(1)
        self.assertEqual("registry.example/other", self.record().image)


class StopWhileStartingTests(MountServiceTestCase):
    def test_the_image_is_not_waited_for(self) -> None:
        self.world.waits["open"] = Deferred()
        self.start()
        self.service.request_stop("SIGINT")
        self.assertEqual(["check", "choose", "open", "remove directory", "stop pool"], self.world.events)
        self.assert_ended(0)
        self.assertEqual([], list(self.state_dir.iterdir()))

    def test_a_device_that_is_being_attached_is_detached_again(self) -> None:
        self.world.waits["attach"] = Deferred()
        self.start()
        self.service.request_stop("SIGTERM")
        self.assertEqual(STARTED[:4] + STOPPED[1:], self.world.events)
        self.assert_ended(0)

    def test_a_mount_that_waits_for_its_image_is_made_to_fail(self) -> None:
        self.world.waits["mount"] = Deferred()
        self.start()
        self.service.request_stop("SIGTERM")
        self.assertEqual(STARTED + STOPPED[1:], self.world.events)
        self.assert_ended(0)


class InUseTests(MountServiceTestCase):
    def test_a_busy_mount_is_served_until_its_users_let_go(self) -> None:
        self.world.busy = 3
        self.start()
        self.service.request_stop("SIGTERM")
        self.assertEqual((Status.STOPPING, 0), (self.record().status, self.stopped))
        self.assertIn("/mnt is in use", self.record().reason)
        self.reactor.pump([mounting.BUSY_RETRY] * 2)
        self.assertEqual([*STARTED, "busy", "busy", "busy"], self.world.events)
        self.reactor.advance(mounting.BUSY_RETRY)
        self.assertEqual(STOPPED, self.world.events[-6:])
        self.assert_ended(0)

    def test_told_twice_it_unmounts_lazily(self) -> None:
        self.world.busy = 100
        self.start()
        self.service.request_stop("SIGINT")
        self.service.request_stop("SIGINT")
        self.assertEqual(["busy", "unmount lazily", *STOPPED[1:]], self.world.events[len(STARTED) :])
        self.assert_ended(0)

    def test_on_stop_lazy_unmounts_lazily_at_once(self) -> None:
        self.world.busy = 100
        self.start(on_stop="lazy")
        self.service.request_stop("SIGTERM")
        self.assertEqual(["unmount lazily", *STOPPED[1:]], self.world.events[len(STARTED) :])

    def test_the_end_of_the_reactor_does_not_wait_for_users(self) -> None:
        self.world.busy = 100
        self.start()
        self.reactor.stop = lambda: None  # type: ignore[method-assign]
        ended = self.service.stopService()
        assert ended is not None
        self.successResultOf(ended)
        self.assertIn("unmount lazily", self.world.events)

    def test_a_device_still_in_use_after_the_unmount_is_served_until_it_is_free(self) -> None:
        self.world.held = 2
        self.start()
        self.world.unmounted.callback(None)
        self.assertEqual(STARTED, self.world.events)
        self.reactor.pump([mounting.BUSY_RETRY] * 2)
        self.assertEqual(STARTED + STOPPED[1:], self.world.events)
        self.assert_ended(0)

    def test_a_device_lost_to_somebody_else_is_a_failure_and_leaves_nothing(self) -> None:
        self.start()
        self.world.held = 100  # by the mount, whose reads fail
        self.world.lost.callback(None)
        self.assertEqual(["unmount lazily", *STOPPED[1:]], self.world.events[len(STARTED) :])
        self.assert_ended(1)
        self.assertIn("disconnected by somebody else", self.record().reason)
        self.assertEqual("", self.record().device, "it was given back")


class LingeringTests(MountServiceTestCase):
    """Unmounted by somebody else, lazily: a file is still open."""

    def setUp(self) -> None:
        super().setUp()
        self.world.held = 100
        self.start()
        self.world.there = None
        self.world.unmounted.callback(None)
        self.world.unmounted = Deferred()
        self.mount = self.service.mount
        self.world.events.clear()

    def is_on_record(self) -> tuple[Status, int]:
        record = self.record()
        return record.status, record.mount_id

    def test_it_is_on_record_as_unmounted(self) -> None:
        self.assertEqual((Status.UNMOUNTED, 0), self.is_on_record())
        self.assertFalse(self.mount.is_mounted)
        self.service.request_stop("SIGTERM")
        self.reactor.advance(mounting.HELD_RETRY)
        self.assertEqual(([], 0), (self.world.events, self.stopped))

    def test_it_is_mounted_again_and_serves_on(self) -> None:
        self.assertTrue(self.successResultOf(self.mount.mount_again()))
        self.assertEqual((["check", "mount"], (Status.READY, 77)), (self.world.events, self.is_on_record()))
        self.assertEqual("", self.record().reason)
        self.world.held = 0
        self.service.request_stop("SIGTERM")
        self.assertEqual(STOPPED, self.world.events[2:])
        self.assert_ended(0)

    def test_mounted_again_it_lingers_again(self) -> None:
        self.successResultOf(self.mount.mount_again())
        self.world.there = None
        self.world.unmounted.callback(None)
        self.assertEqual((Status.UNMOUNTED, 0), self.is_on_record())
        self.world.held = 0
        self.reactor.advance(mounting.HELD_RETRY)
        self.assert_ended(0)

    def test_where_it_cannot_be_mounted_that_is_said_and_it_lingers_on(self) -> None:
        self.world.fails["check"] = MountError("/mnt is a mount point already")
        self.failureResultOf(self.mount.mount_again(), MountError)
        self.assertEqual((Status.UNMOUNTED, 0), self.is_on_record())
        del self.world.fails["check"]
        self.assertTrue(self.successResultOf(self.mount.mount_again()))

    def test_where_it_ends_instead_that_is_said(self) -> None:
        self.world.held = 0
        self.world.waits["detach"] = Deferred()
        self.reactor.advance(mounting.HELD_RETRY)
        again = self.mount.mount_again()
        self.assertNoResult(again)
        self.world.waits["detach"].callback(None)
        self.assertFalse(self.successResultOf(again))

    def test_it_is_left_to_the_next_daemon_which_does_not_mount_it(self) -> None:
        self.service.leave()
        self.assertEqual("leave device", self.world.events[0])
        self.assert_ended(0)
        assert self.exit_status.line is not None
        self.exit_status.line.close()
        self.assertEqual((Status.UNMOUNTED, 0), self.is_on_record())
        self.take_over({"/dev/nbd0": HandedDevice(path="/dev/nbd0")})
        self.assertEqual(["open", "adopt", "check image"], self.world.events)
        self.assertEqual((Status.UNMOUNTED, 0), self.is_on_record())
        self.world.held = 0
        self.reactor.advance(mounting.HELD_RETRY)
        self.assert_ended(0)

    def test_where_it_is_not_wanted_the_device_goes_with_its_last_user(self) -> None:
        assert self.mount._state is not None
        self.mount._state.update(pid_started=1)
        os.close(self.mount._state._lock)
        for is_held, steps in ((True, ["open", "adopt", "check image"]), (False, ["disconnect /dev/nbd0"])):
            identifier = self.world.identifier
            self.begin_anew(World(held=100, identifier=identifier))
            self.world.devices = [
                Connected(path="/dev/nbd0", size=8192, identifier=identifier, is_held=is_held)
            ]
            mount = mounting.Mount(
                self.reactor, self.service._config, devices.Devices(self.reactor), is_wanted=False
            )
            life = Deferred.fromCoroutine(mount.live())
            self.assertEqual(steps, self.world.events[: len(steps)])
            if is_held:
                self.assertTrue(mount.ready.called)
                self.assertEqual((Status.UNMOUNTED, 0), self.is_on_record())
                mount.leave()
            self.assertIsNone(self.successResultOf(life))
        self.assertIsNone(self.record())

    def take_over(self, handed: dict[str, HandedDevice]) -> None:
        """Another daemon, to which they are handed over."""
        device = Connected(path="/dev/nbd0", size=8192, identifier=self.world.identifier, is_held=True)
        self.begin_anew(World(held=100))
        self.world.devices = [device]

        async def take(succession: object) -> Handover:
            return Handover(1, handed)

        self.patch(service.Succession, "take", take)
        self.start()


class SharedDeviceTests(MountServiceTestCase):
    def setUp(self) -> None:
        super().setUp()
        shared = devices.Devices(self.reactor)
        configs = (self.config(), self.config(mountpoint="/mnt2"))
        self.mounts = [mounting.Mount(self.reactor, config, shared) for config in configs]
        self.lives = [Deferred.fromCoroutine(mount.live()) for mount in self.mounts]
        self.assertIs(self.mounts[0].served, self.mounts[1].served)

    def test_of_two_that_are_unmounted_at_once_one_lingers(self) -> None:
        self.world.held = 100
        self.world.unmounted.callback(None)
        first, second = self.lives
        self.assertIsNone(self.successResultOf(first))
        self.assertNoResult(second)
        record = Journal(self.state_dir).read("/mnt2")
        assert record is not None
        self.assertIs(Status.UNMOUNTED, record.status)
        self.world.held = 0
        self.reactor.advance(mounting.HELD_RETRY)
        self.assertIsNone(self.successResultOf(second))
        self.assertEqual(1, self.world.events.count("detach"))

    def test_the_device_is_left_with_the_last(self) -> None:
        for mount in self.mounts:
            mount.leave()
        for life in self.lives:
            self.assertIsNone(self.successResultOf(life))
        self.assertEqual((1, 0), (self.world.events.count("leave device"), self.world.events.count("detach")))


class FullDiskTests(MountServiceTestCase):
    """Records cannot be written, from one on, or only one of them."""

    def fail_writes(self, fails: Callable[[int], bool]) -> None:
        self.writes = 0
        write = journal.replace_file

        def replace(path: str, content: bytes, *, durable: bool) -> None:
            self.writes += 1
            if fails(self.writes):
                raise OSError(errno.ENOSPC, "No space left on device")
            write(path, content, durable=durable)

        patched = self.patch(journal, "replace_file", replace)
        self.restore_writes = patched.restore

    def test_a_mount_that_cannot_be_recorded_fails_and_takes_all_back(self) -> None:
        outcomes = set()
        for number in range(1, 10):
            for fails in (number.__eq__, number.__le__):
                self.setUp()
                self.fail_writes(lambda count, fails=fails: fails(count))
                self.start()
                if not self.stopped:
                    self.service.request_stop("SIGTERM")
                self.restore_writes()
                self.assertEqual(1, self.stopped, "it ends, whatever cannot be written")
                outcomes.add(self.exit_status.status)
                events = self.world.events
                self.assertEqual(events.count("attach"), events.count("detach"))
                self.assertEqual(
                    events.count("mount"), events.count("unmount") + events.count("unmount lazily")
                )
                self.assertIn(events[-1:], ([], ["stop pool"]))
        self.assertEqual({0, 1}, outcomes)

    def test_the_cure_is_said(self) -> None:
        self.fail_writes(lambda count: True)
        self.start()
        self.assert_ended(1)
        self.assertEqual([], self.world.events)
        self.assertEqual([], list(self.state_dir.iterdir()))

    def test_a_mount_that_is_taken_over_goes_on_all_the_same(self) -> None:
        self.start()
        assert self.service.mount is not None and self.service.mount._state is not None
        state = self.service.mount._state
        state.update(pid_started=1)
        identifier = self.world.identifier
        os.close(state._lock)
        self.begin_anew(World())
        self.world.devices = [Connected(path="/dev/nbd0", size=8192, identifier=identifier, is_held=True)]
        self.world.there = SimpleNamespace(source="/dev/nbd0", mount_id=77)
        self.fail_writes(lambda count: True)
        self.start()
        self.assertEqual((["open", "adopt", "check image"], 0), (self.world.events, self.stopped))
        self.service.request_stop("SIGTERM")
        self.assert_ended(0)


class UpgradeTests(MountServiceTestCase):
    def assert_left(self) -> None:
        left = ["leave device", "hand over", "stop server", "close image", "stop pool"]
        self.assertEqual([*STARTED, *left], self.world.events)
        self.assertTrue(self.exit_status.is_again)
        self.assert_ended(0)
        record = self.record()
        self.assertEqual((Status.READY, "/dev/nbd0"), (record.status, record.device))
        line = self.exit_status.line
        assert line is not None
        self.addCleanup(line.close)
        line.setblocking(False)
        said = [json.loads(each) for each in line.recv(10000).splitlines()]
        self.assertEqual(["/dev/nbd0", os.getpid()], [said[0]["path"], said[1]["end"]])

    def test_device_and_mount_are_left_and_the_process_begins_anew(self) -> None:
        self.start()
        self.service.leave()
        self.assert_left()

    def test_what_is_not_up_yet_is_left_when_it_is(self) -> None:
        mounting = self.world.waits["mount"] = Deferred()
        self.start()
        self.service.leave()
        self.assertEqual(STARTED, self.world.events)
        self.assertFalse(self.exit_status.is_again)
        mounting.callback(None)
        self.assert_left()

    def test_what_ends_before_it_is_up_is_left_to_nobody(self) -> None:
        self.world.waits["mount"] = Deferred()
        self.start()
        self.service.leave()
        self.service.request_stop("SIGTERM")
        self.assertFalse(self.exit_status.is_again)
        self.assert_ended(0)


class TakeOverTests(MountServiceTestCase):
    """A daemon was killed while it served, or on the way there or away."""

    def kill(self, values: Mapping[str, str] | None = None, **changes: Any) -> None:
        """What is on record of one, and what it had made is there."""
        self.start(**(values or {}))
        state = self.service.mount._state
        assert state is not None
        state.update(pid_started=1, **changes)
        identifier = self.world.identifier
        os.close(state._lock)
        self.begin_anew(World())
        self.world.devices = [
            Connected(path="/dev/nbd0", size=8192, identifier=identifier, is_held=True),
            Connected(path="/dev/nbd1", size=8192, identifier="somebody else's", is_held=True),
        ]
        self.world.there = SimpleNamespace(source="/dev/nbd0", mount_id=77)

    def test_its_device_is_served_again_and_its_mount_goes_on(self) -> None:
        self.kill()
        self.start()
        self.assertEqual(["open", "adopt", "check image"], self.world.events)
        self.assertEqual(f"registry.example/app:latest@{DIGEST}", self.world.opened)
        record = self.record()
        self.assertEqual((Status.READY, "/dev/nbd0", 77), (record.status, record.device, record.mount_id))
        self.service.request_stop("SIGTERM")
        self.assertEqual(
            ["unmount", "detach", "stop server", "close image", "remove directory", "stop pool"],
            self.world.events[3:],
        )
        self.assert_ended(0)

    def test_what_cannot_be_taken_over_now_stays_for_the_next_start(self) -> None:
        for step in ("open", "adopt"):
            self.setUp()
            self.kill()
            self.world.fails[step] = MountError("not now")
            self.start()
            self.assertFalse({"unmount", "unmount lazily", "detach"} & {*self.world.events})
            self.assert_ended(1)
            left, self.world.fails = self.world, {}
            self.begin_anew(World(devices=left.devices, there=left.there))
            self.start()
            self.assertEqual(["open", "adopt", "check image"], self.world.events)
            self.service.request_stop("SIGTERM")

    def test_told_to_stop_before_it_has_taken_over_it_leaves_all_for_the_next_start(self) -> None:
        self.kill()
        self.world.waits["open"] = Deferred()
        self.start()
        self.service.request_stop("SIGTERM")
        self.assertEqual(["open", "stop pool"], self.world.events)
        self.assertEqual(("/dev/nbd0", 77), (self.record().device, self.record().mount_id))

    def test_an_image_whose_rest_cannot_be_had_goes_on_all_the_same(self) -> None:
        self.kill()
        self.world.fails["check image"] = ReadError("the registry is down")
        self.start()
        self.assertEqual(Status.READY, self.record().status)

    def test_a_mount_that_has_gone_meanwhile_ends_it(self) -> None:
        self.kill()
        self.world.unmounted.callback(None)
        self.start()
        self.assertEqual(
            ["detach", "stop server", "close image", "remove directory", "stop pool"], self.world.events[-5:]
        )
        self.assert_ended(0)

    def test_another_image_is_refused_and_nothing_is_touched(self) -> None:
        self.kill()
        self.start(image="registry.example/other")
        self.assertEqual(["stop pool"], self.world.events)
        self.assert_ended(1)
        self.assertIn("registry.example/app", self.record().reason)

    def test_a_device_that_was_not_mounted_yet_is_mounted(self) -> None:
        self.kill(mount_id=0)
        self.world.there = None
        self.start()
        self.assertEqual(["check", "open", "adopt", "check image", "mount"], self.world.events)

    def test_what_an_early_death_left_out_is_on_record_before_the_mount(self) -> None:
        self.kill(device="", mount_id=0)
        self.world.there = None
        self.world.waits["mount"] = Deferred()
        self.start()
        self.assertEqual(("/dev/nbd0", 0), (self.record().device, self.record().mount_id))

    def test_a_mount_that_has_gone_is_not_on_record_while_it_is_made_again(self) -> None:
        self.kill()
        self.world.there = None
        self.world.waits["mount"] = Deferred()
        self.start()
        self.assertEqual(("/dev/nbd0", 0), (self.record().device, self.record().mount_id))

    def test_a_directory_that_was_made_for_the_mount_is_removed_by_whoever_ends_it(self) -> None:
        self.world.missing = True
        self.kill({"mkdir": "yes"})
        self.start(mkdir="yes")
        self.assertTrue(self.record().made)
        self.service.request_stop("SIGTERM")
        self.assertEqual("remove directory made for it", self.world.events[-2])

    def test_a_directory_that_was_about_to_be_made_is_removed_too(self) -> None:
        self.world.missing = True
        self.world.waits["check"] = Deferred()
        self.kill({"mkdir": "yes"})
        self.world.there, self.world.devices = None, []
        self.start(mkdir="yes")
        self.service.request_stop("SIGTERM")
        self.assertEqual("remove directory made for it", self.world.events[-2])

    def test_a_socket_that_waits_for_what_is_not_taken_over_is_closed(self) -> None:
        self.kill()
        self.world.devices = []
        ours, kernels = socket.socketpair()
        self.addCleanup(kernels.close)
        attached = Attached(index=0, path="/dev/nbd0", connection=1, made_node=False)
        reclaimed = {"/dev/nbd0": Reconnected(attached, ours)}
        self.start(Legacy(reclaimed=reclaimed))
        self.assertEqual((b"", {}), (kernels.recv(1), reclaimed))
        self.assertEqual(STARTED, self.world.events[1:7])

    def test_a_device_that_is_in_the_way_is_disconnected(self) -> None:
        self.kill()
        self.world.there = SimpleNamespace(source="tmpfs", mount_id=5)
        self.world.devices = [attrs.evolve(self.world.devices[0], is_held=False)]
        self.world.fails["check"] = MountError("/mnt is a mount point already")
        self.start()
        self.assertEqual(
            ["disconnect /dev/nbd0", "check", "remove directory", "stop pool"], self.world.events
        )

    def test_a_mount_whose_device_is_gone_is_made_anew(self) -> None:
        self.kill()
        self.world.devices = []
        self.start()
        self.assertEqual(["unmount lazily", *STARTED], self.world.events[:7])
