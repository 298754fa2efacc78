"""Which daemon comes before this one, and which after: who takes what from whom, and on whose word."""

from __future__ import annotations

import os
import signal
import socket
from collections.abc import Callable
from typing import Any

import attrs
from twisted.internet.defer import Deferred
from twisted.logger import Logger
from twisted.python.threadpool import ThreadPool

from erofs_twisted.device.driver import Reconnected
from erofs_twisted.errors import MountError
from erofs_twisted.handover import Handover, give, make_line, on_take, take
from erofs_twisted.process import ExitStatus, on_upgrade_signal
from erofs_twisted.syscalls import in_thread


@attrs.frozen
class Legacy:
    """What a daemon begins with: the ends of lines to the one ``before`` it, and to the one ``after`` it,
    that is forked by the process ``parent``, where there is one; None where there is no such line.
    ``reclaimed`` are devices of daemons that were killed."""

    before: socket.socket | None = None
    after: socket.socket | None = None
    parent: int = 0
    reclaimed: dict[str, Reconnected] = attrs.field(factory=dict)


class Succession:
    """`take` at the beginning what the daemon before has; at the end `give` it to the next one, which is what
    is installed then: a child of the same parent where there is one, else this very process."""

    log = Logger()

    def __init__(self, reactor: Any, exit_status: ExitStatus, legacy: Legacy) -> None:
        self._reactor = reactor
        self._exit_status = exit_status
        self._legacy = legacy
        self._taking: Deferred[Handover | None] | None = None
        self._leave: Callable[[], object] = lambda: None

    async def take(self) -> Handover:
        """What the daemon before has given up; nothing where there was none, or where it was killed: then
        what it had is found by what is on record. It fires when that one has left its mounts, whenever that
        may be, or at once after `cancel`."""
        found = Handover(reclaimed=self._legacy.reclaimed)
        if self._legacy.before is None:
            return found
        self._taking = take(self._reactor, self._legacy.before)
        return await self._taking or found

    def cancel(self) -> None:
        """Wait for nothing that is not given up yet."""
        if self._taking is not None and not self._taking.called:
            self._taking.cancel()

    def watch(self, leave: Callable[[], object]) -> None:
        """Call ``leave``, which is to end by `give`, when the next daemon wants to take; begin an upgrade at
        SIGUSR2."""
        self._leave = leave
        on_upgrade_signal(self._reactor, self._try_upgrade)
        if self._legacy.after is not None:
            on_take(self._reactor, self._legacy.after, leave)

    def upgrade(self) -> None:
        """Be followed by the program that is installed now; not at once, so that who asks has an answer.
        Raises `MountError` where nobody would start that."""
        parent = self._legacy.parent
        if self._legacy.after is None:
            self._reactor.callLater(0, self._leave)
        elif os.getppid() == parent:
            # It becomes that program first, and then forks the next daemon; this one goes on meanwhile.
            os.kill(parent, signal.SIGUSR2)
        else:
            raise MountError(
                f"the parent (process {parent}), which would start the next daemon, has been killed: kill "
                f"this one, too ('kill -9 {os.getpid()}'), and start the service again; mounts on nbd go on"
            )

    def _try_upgrade(self) -> None:
        try:
            self.upgrade()
        except MountError as error:
            self.log.error("{reason}", reason=str(error))

    async def give(self, pool: ThreadPool, handover: Handover) -> None:
        """End after this, and all of that is the next daemon's."""
        self._exit_status.is_again = True
        after = self._legacy.after
        if after is None:
            after, self._exit_status.line = make_line()
        try:
            await in_thread(self._reactor, pool, give, after, handover)
        except OSError as error:
            self.log.error("the next daemon has to reconnect the devices: {reason}", reason=str(error))
