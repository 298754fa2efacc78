"""twistd's log with the time of each event to the microsecond: ``--logger benchmarks.timedlog.to_file``.

twistd's own log has whole seconds. The file is ``$BENCHMARK_LOG``.
"""

from __future__ import annotations

import os

from twisted.logger import FileLogObserver, ILogObserver, formatEventAsClassicLogText

STARTING_UP = " starting up."
"""Twisted's own word for the moment: all that the service needs is imported, and it is about to start."""


def to_file() -> ILogObserver:
    file = open(os.environ["BENCHMARK_LOG"], "a", buffering=1, encoding="utf-8")  # noqa: SIM115 - for as long as the process
    return FileLogObserver(
        file, lambda event: formatEventAsClassicLogText(event, formatTime=lambda when: f"{when:.6f}")
    )
