"""A device for each layer, whoever uses it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from twisted.internet.defer import CancelledError, Deferred, succeed
from twisted.internet.task import Clock
from twisted.trial.unittest import SynchronousTestCase

from erofs_twisted import devices
from erofs_twisted.devices import Devices, Served
from erofs_twisted.errors import MountError
from erofs_twisted.interfaces import HandedConnection, HandedDevice

ENDED = ["/dev/nbd0", "server of /dev/nbd0", "image of /dev/nbd0"]


class DeviceTests(SynchronousTestCase):
    def setUp(self) -> None:
        self.patch(devices, "SystemCallPool", lambda reactor: SimpleNamespace(stop=lambda: succeed(None)))
        self.clock = Clock()
        self.devices = Devices(self.clock)
        self.made: list[str] = []
        self.ended: list[str] = []
        self.left: list[str] = []
        self.abandoned: list[str] = []
        self.waits: Deferred[None] = succeed(None)

    async def make(self) -> Served:
        path = f"/dev/nbd{len(self.made)}"
        self.made.append(path)
        await self.waits
        image: Any = SimpleNamespace(
            export=SimpleNamespace(size=8192),
            abandon=lambda: self.abandoned.append(path),
            close=lambda: self.end(f"image of {path}"),
        )
        server: Any = SimpleNamespace(stop=lambda: self.end(f"server of {path}"), hand_over=self.hand_over)
        device: Any = SimpleNamespace(
            path=path,
            lost=Deferred(),
            detach=lambda: self.end(path),
            leave=lambda: self.leave(path),
        )
        return Served(image, server, device, "nbd", "me")

    async def hand_over(self) -> list[HandedConnection]:
        return []

    def leave(self, path: str) -> HandedDevice:
        self.left.append(path)
        return HandedDevice(path=path)

    async def end(self, what: str) -> None:
        self.ended.append(what)

    def taking(self, kind: str = "a", path: str = "", user: str = "me") -> Deferred[Served]:
        return Deferred.fromCoroutine(self.devices.take(kind, path, self.make, user))

    def take(self, kind: str = "a", path: str = "", user: str = "me") -> Served:
        return self.successResultOf(self.taking(kind, path, user))

    def give_back(self, served: Served, user: str = "me") -> None:
        self.successResultOf(Deferred.fromCoroutine(self.devices.give_back(served, user)))

    def leave_it(self, served: Served, user: str) -> None:
        self.successResultOf(Deferred.fromCoroutine(self.devices.leave(served, user)))

    def test_the_same_kind_is_made_once(self) -> None:
        self.assertIs(self.take(), self.take())
        self.assertIsNot(self.take(), self.take("b"))
        self.assertEqual(2, len(self.made))

    def test_who_comes_while_it_is_made_waits_for_it(self) -> None:
        self.waits = Deferred()
        first, second, other = self.taking(), self.taking(), self.taking("b")
        self.assertEqual(2, len(self.made), "of another kind it waits for none")
        self.waits.callback(None)
        self.assertIs(self.successResultOf(first), self.successResultOf(second))
        self.successResultOf(other)

    def test_where_one_cannot_be_made_the_next_tries(self) -> None:
        waits = self.waits = Deferred()
        first, second = self.taking(), self.taking()
        self.waits = succeed(None)
        waits.errback(MountError("no luck"))
        self.failureResultOf(first, MountError)
        self.successResultOf(second)

    def test_one_who_gives_up_waiting_leaves_the_others(self) -> None:
        self.waits = Deferred()
        first, second, third = (self.taking(user=user) for user in ("first", "second", "third"))
        second.cancel()
        self.failureResultOf(second, CancelledError)
        self.waits.callback(None)
        self.assertEqual({"first", "third"}, self.successResultOf(third).users)
        self.successResultOf(first)

    def test_one_that_is_named_is_on_that_device(self) -> None:
        first = self.take()
        self.assertIs(first, self.take(path="/dev/nbd0"))
        self.assertIsNot(first, self.take(path="/dev/nbd7"))
        self.assertIs(first, self.devices.on("/dev/nbd0"))
        self.assertIsNone(self.devices.on("/dev/nbd9"))

    def test_one_that_was_lost_is_taken_by_nobody(self) -> None:
        first = self.take()
        first.device.lost.callback(None)
        self.assertIsNot(first, self.take())

    def test_it_ends_with_its_last_user(self) -> None:
        served = self.take()
        self.take(user="you")
        self.give_back(served)
        self.assertEqual([], self.ended)
        self.give_back(served, "you")
        self.assertEqual(ENDED, self.ended)
        self.assertIsNot(served, self.take())

    def test_only_its_only_user_abandons_it(self) -> None:
        served = self.take()
        self.take(user="you")
        served.abandon()
        self.assertEqual([], self.abandoned)
        self.give_back(served, "you")
        served.abandon()
        self.assertEqual(["/dev/nbd0"], self.abandoned)

    def test_the_last_user_may_leave_the_device_to_another_daemon(self) -> None:
        served = self.take()
        self.take(user="you")
        self.leave_it(served, "me")
        self.assertEqual([], self.ended)
        self.leave_it(served, "you")
        self.assertEqual((["/dev/nbd0"], ENDED[1:]), (self.left, self.ended))
        handed = self.devices.handed["/dev/nbd0"]
        self.assertEqual((8192, "me"), (handed.size, handed.identifier))
        self.assertIsNot(served, self.take())
