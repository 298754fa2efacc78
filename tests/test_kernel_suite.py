"""The kernel suite as one test: on this machine's kernel where that has nbd, else in a guest.

Its modules are called ``suite_*.py``, so that no test runner takes them for tests of a kernel without nbd.
"""

from __future__ import annotations

import subprocess
from pathlib import Path

from twisted.trial.unittest import SynchronousTestCase

RUN = Path(__file__).parent / "kernel" / "run"


class KernelSuiteTests(SynchronousTestCase):
    def test_it_passes(self) -> None:
        done = subprocess.run([RUN, "-q"], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        self.assertEqual(0, done.returncode, f"{RUN} ended with status {done.returncode}:\n{done.stdout}")
