"""Who starts the next daemon, and whether anybody does."""

from __future__ import annotations

import os
import signal
import socket

from twisted.internet.task import Clock
from twisted.trial.unittest import SynchronousTestCase

from erofs_twisted import succession
from erofs_twisted.errors import MountError
from erofs_twisted.process import ExitStatus
from erofs_twisted.succession import Legacy, Succession


class UpgradeTests(SynchronousTestCase):
    def setUp(self) -> None:
        self.clock = Clock()
        self.left = 0
        self.sent: list[tuple[int, int]] = []
        self.patch(os, "kill", lambda pid, number: self.sent.append((pid, number)))
        self.patch(succession, "on_upgrade_signal", lambda reactor, upgrade: setattr(self, "signal", upgrade))
        self.patch(succession, "on_take", lambda reactor, sock, leave: None)

    def begin(self, legacy: Legacy) -> Succession:
        found = Succession(self.clock, ExitStatus(), legacy)
        found.watch(self.leave)
        return found

    def leave(self) -> None:
        self.left += 1

    def line(self) -> socket.socket:
        ours, theirs = socket.socketpair()
        self.addCleanup(ours.close)
        self.addCleanup(theirs.close)
        return ours

    def test_without_a_parent_it_leaves_all_when_the_caller_has_an_answer(self) -> None:
        self.begin(Legacy()).upgrade()
        self.assertEqual(0, self.left)
        self.clock.advance(0)
        self.assertEqual((1, []), (self.left, self.sent))

    def test_a_parent_is_told(self) -> None:
        self.begin(Legacy(after=self.line(), parent=os.getppid())).upgrade()
        self.clock.advance(0)
        self.assertEqual((0, [(os.getppid(), signal.SIGUSR2)]), (self.left, self.sent))

    def test_who_has_taken_in_the_orphan_is_not(self) -> None:
        orphan = self.begin(Legacy(after=self.line(), parent=os.getppid() + 1))
        said = str(self.assertRaises(MountError, orphan.upgrade))
        self.assertIn(f"the parent (process {os.getppid() + 1})", said)
        self.signal()
        self.assertEqual([], self.sent)
