"""Devices of daemons that were killed, with a driver of paper."""

from __future__ import annotations

import os
import socket
from collections.abc import Sequence
from pathlib import Path

from twisted.trial.unittest import SynchronousTestCase

from erofs_twisted.device.driver import Attached, NBDDriver, Reconnected
from erofs_twisted.errors import MountError
from erofs_twisted.reclaiming import reclaim
from erofs_twisted.state.journal import RECORD, Journal, boot_id


class PaperDriver(NBDDriver):
    def __init__(self) -> None:
        self.there = {"/dev/nbd3": (4096, "three"), "/dev/nbd4": (8192, "four")}
        self.served: list[str] = []
        self.kept: list[socket.socket] = []

    def is_connected(self, path: str, size: int, identifier: str) -> bool:
        return self.there.get(path) == (size, identifier)

    def reconfigure(self, path: str, sockets: Sequence[int], identifier: str) -> Attached:
        if path not in self.served:
            self.kept += [socket.socket(fileno=os.dup(descriptor)) for descriptor in sockets]
        return Attached(977, path, 1, False)


class ReclaimingTests(SynchronousTestCase):
    def setUp(self) -> None:
        self.journal = Journal(Path(self.mktemp()).absolute())
        self.driver = PaperDriver()
        self.found: dict[str, Reconnected] = {}
        self.addCleanup(self.close)

    def close(self) -> None:
        for sock in [*self.driver.kept, *(each.sock for each in self.found.values())]:
            sock.close()

    def leave(
        self, mountpoint: str, device: str, *, lives: bool = False, service: bool = True, **more: str
    ) -> None:
        """As a daemon does that is killed."""
        size, identifier = self.driver.there[device]
        state = self.journal.claim(mountpoint, "registry.example/app", service=service)
        started = state.record.pid_started - (not lives)
        facts = {"boot": boot_id(), "backend": "nbd", "identifier": identifier, "device": device, **more}
        state.update(pid_started=started, size=size, **facts)
        os.close(state._lock)

    def reclaimed(self, mountpoint: str = "") -> list[str]:
        self.found = reclaim(self.journal.state_dir, mountpoint, self.driver)
        return sorted(self.found)

    def test_each_device_gets_one_socket_whoever_is_on_it(self) -> None:
        self.leave("/one", "/dev/nbd3")
        self.leave("/two", "/dev/nbd3")
        self.leave("/three", "/dev/nbd4")
        self.assertEqual(["/dev/nbd3", "/dev/nbd4"], self.reclaimed())
        self.assertEqual(2, len(self.driver.kept))
        self.driver.kept[0].sendall(b"request")
        self.assertEqual(b"request", self.found["/dev/nbd3"].sock.recv(100))

    def test_a_daemon_with_one_mount_has_that_alone(self) -> None:
        self.leave("/one", "/dev/nbd3")
        self.leave("/own", "/dev/nbd4", service=False)
        self.assertEqual(["/dev/nbd4"], self.reclaimed("/own"))
        self.assertEqual([], self.reclaimed("/else"))

    def test_what_is_another_daemons_is_left_alone(self) -> None:
        self.leave("/lives", "/dev/nbd3", lives=True)
        self.leave("/own", "/dev/nbd4", service=False)
        self.assertEqual([], self.reclaimed())
        self.assertEqual([], self.driver.kept)

    def test_what_is_not_of_this_boot_or_not_there_or_no_nbd_device_is_left_out(self) -> None:
        self.leave("/one", "/dev/nbd3", boot="another")
        self.leave("/two", "/dev/nbd3", identifier="another")
        self.leave("/three", "/dev/nbd3", backend="fuse")
        self.assertEqual([], self.reclaimed())

    def test_what_is_served_already_is_left_to_whom_it_is(self) -> None:
        self.driver.served = ["/dev/nbd3"]
        self.leave("/one", "/dev/nbd3")
        self.leave("/two", "/dev/nbd4")
        self.assertEqual(["/dev/nbd4"], self.reclaimed())

    def test_without_privileges_there_is_nothing(self) -> None:
        def refuse(*arguments: object) -> Attached:
            raise MountError("Operation not permitted")

        self.patch(self.driver, "reconfigure", refuse)
        self.leave("/one", "/dev/nbd3")
        self.assertEqual([], self.reclaimed())

    def test_a_damaged_record_is_passed_over(self) -> None:
        self.leave("/one", "/dev/nbd3")
        self.leave("/two", "/dev/nbd4")
        (self.journal.directory("/one") / RECORD).write_text("{")
        self.assertEqual(["/dev/nbd4"], self.reclaimed())
        self.assertEqual([], self.reclaimed("/one"))
