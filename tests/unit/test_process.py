"""A process's signals, exit status and command line: each seen from outside, on a process of its own."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from twisted.trial.unittest import SynchronousTestCase

PROJECT = Path(__file__).parents[2]


def run(program: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", program, *arguments],
        capture_output=True,
        text=True,
        timeout=60,
        env={"PYTHONPATH": str(PROJECT)},
    )


class ExitStatusTests(SynchronousTestCase):
    program = (
        "import atexit\n"
        "from erofs_twisted.process import ExitStatus\n"
        "exit_status = ExitStatus()\n"
        "exit_status.install()\n"
        "atexit.register(print, 'exit functions ran')\n"
        "exit_status.status = {status}\n"
    )

    def test_the_status_is_the_processs_and_later_exit_functions_still_run(self) -> None:
        for status in (0, 1):
            done = run(self.program.format(status=status))
            self.assertEqual(
                (status, "exit functions ran\n", ""), (done.returncode, done.stdout, done.stderr)
            )


class StopSignalTests(SynchronousTestCase):
    program = (
        "import os, signal\n"
        "from twisted.internet import reactor\n"
        "from erofs_twisted.process import on_stop_signal\n"
        "def stop(name):\n"
        "    print(name)\n"
        "    reactor.stop()\n"
        "on_stop_signal(reactor, stop)\n"
        "reactor.callWhenRunning(lambda: os.kill(os.getpid(), signal.{name}))\n"
        "reactor.callLater(30, reactor.crash)\n"
        "reactor.run()\n"
    )

    def test_a_signal_is_a_request_and_the_exit_status_is_our_own(self) -> None:
        for name in ("SIGTERM", "SIGINT", "SIGHUP"):
            done = run(self.program.format(name=name))
            self.assertEqual((0, f"{name}\n"), (done.returncode, done.stdout), done.stderr)


class ConcealTests(SynchronousTestCase):
    program = (
        "import sys\n"
        "from erofs_twisted.process import conceal_arguments\n"
        "conceal_arguments(sys.argv[1].split(',') if sys.argv[1] else [])\n"
        "print(open('/proc/self/cmdline').read().split(chr(0), 4)[3:])\n"
    )

    def test_a_secret_is_starred_out_wherever_it_stands(self) -> None:
        done = run(self.program, "hunter2", "--oci=username=me,password=hunter2", "hunter2")
        self.assertNotIn("hunter2", done.stdout)
        self.assertIn("--oci=username=me,password=*******", done.stdout)

    def test_without_a_secret_the_arguments_stay(self) -> None:
        self.assertIn("--oci=username=me", run(self.program, "", "--oci=username=me").stdout)


class CollectionTests(SynchronousTestCase):
    program = (
        "import gc\n"
        "from erofs_twisted.process import put_off_collections, resume_collections\n"
        "put_off_collections()\n"
        "print(gc.isenabled(), gc.get_freeze_count() > 0)\n"
        "resume_collections()\n"
        "print(gc.isenabled(), gc.get_freeze_count() > 0)\n"
    )

    def test_collections_are_put_off_and_then_spare_what_was_imported(self) -> None:
        self.assertEqual("False False\nTrue True\n", run(self.program).stdout)
