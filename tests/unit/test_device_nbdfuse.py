"""The life of an nbdfuse process, without the process."""

from __future__ import annotations

from typing import Any

from twisted.internet.defer import Deferred
from twisted.internet.error import ProcessDone, ProcessExitedAlready, ProcessTerminated
from twisted.internet.task import Clock
from twisted.python.failure import Failure
from twisted.trial.unittest import SynchronousTestCase

from erofs_twisted.device.nbdfuse import NBDFuse
from erofs_twisted.errors import MountError


class PaperProcess:
    """The transport, and a reactor that spawns nothing."""

    def __init__(self) -> None:
        self.signals: list[str] = []
        self.gone = False

    def closeChildFD(self, descriptor: int) -> None:
        pass

    def signalProcess(self, name: str) -> None:
        if self.gone:
            raise ProcessExitedAlready
        self.signals.append(name)


class SpawningClock(Clock):
    def __init__(self) -> None:
        super().__init__()
        self.spawned: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

    def spawnProcess(self, protocol: NBDFuse, *args: Any, **kwargs: Any) -> None:
        self.spawned.append((args, kwargs))
        protocol.makeConnection(PaperProcess())


class NBDFuseTests(SynchronousTestCase):
    def setUp(self) -> None:
        self.clock = SpawningClock()
        self.program = NBDFuse(self.clock)
        self.program.start("/run/x/socket", "/run/x/image")
        self.process = self.program.transport

    def ends(self, status: int = 0) -> None:
        reason = ProcessTerminated(status) if status else ProcessDone(0)
        self.process.gone = True
        self.program.processEnded(Failure(reason))

    def ending(self) -> Deferred[None]:
        return Deferred.fromCoroutine(self.program.end())

    def test_it_runs_in_a_session_of_its_own_with_next_to_no_environment(self) -> None:
        (((executable, command), options),) = self.clock.spawned
        self.assertEqual((executable, "/setsid"), (command[0], command[0][-7:]))
        self.assertEqual(["/run/x/image", "--unix", "/run/x/socket"], command[-3:])
        self.assertEqual({"PATH", "LC_ALL"}, set(options["env"]))

    def test_it_is_ready_when_it_writes_its_process_number(self) -> None:
        self.assertNoResult(self.program.ready)
        self.program.childDataReceived(3, b"12")
        self.program.childDataReceived(3, b"34\n")
        self.assertIsNone(self.successResultOf(self.program.ready))

    def test_an_end_before_that_is_a_failure_with_its_last_words(self) -> None:
        self.program.childDataReceived(2, b"nbdfuse: some\nnbdfuse: connection re")
        self.program.childDataReceived(2, b"fused\n")
        self.ends(1)
        error = self.failureResultOf(self.program.ready, MountError).value
        self.assertIn("nbdfuse: connection refused", str(error))

    def test_an_end_without_words_is_a_failure_with_its_status(self) -> None:
        self.ends(127)
        error = self.failureResultOf(self.program.ready, MountError).value
        self.assertIn("exit code 127", str(error))

    def test_each_who_waits_for_its_end_learns_of_it(self) -> None:
        self.program.childDataReceived(3, b"1\n")
        waiting = [self.program.when_ended() for _ in range(3)]
        self.ends()
        for waiter in [*waiting, self.program.when_ended()]:
            self.assertIsNone(self.successResultOf(waiter))

    def test_one_that_ends_by_itself_gets_no_signal(self) -> None:
        self.program.childDataReceived(3, b"1\n")
        ending = self.ending()
        self.ends()
        self.successResultOf(ending)
        self.assertEqual([], self.process.signals)

    def test_one_that_stays_is_terminated_and_then_killed(self) -> None:
        self.program.childDataReceived(3, b"1\n")
        ending = self.ending()
        self.clock.advance(5)
        self.assertEqual(["TERM"], self.process.signals)
        self.clock.advance(5)
        self.assertEqual(["TERM", "KILL"], self.process.signals)
        self.assertNoResult(ending)
        self.ends(9)
        self.successResultOf(ending)

    def test_one_that_even_a_kill_does_not_end_is_said_to_stay(self) -> None:
        self.program.childDataReceived(3, b"1\n")
        ending = self.ending()
        for _ in range(3):
            self.clock.advance(5)
        self.failureResultOf(ending, MountError)

    def test_the_end_of_one_that_has_ended_is_at_once(self) -> None:
        self.program.childDataReceived(3, b"1\n")
        self.ends()
        self.successResultOf(self.ending())

    def test_endless_output_without_a_line_takes_no_memory(self) -> None:
        for _ in range(100):
            self.program.childDataReceived(2, b"x" * 1000)
        self.program.childDataReceived(2, b"\n")
        self.ends(1)
        error = self.failureResultOf(self.program.ready, MountError).value
        self.assertLess(len(str(error)), 5000)
