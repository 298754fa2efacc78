"""Daemons that are killed at each step of their lives, and what the next ones must come to."""

from __future__ import annotations

import signal
from collections.abc import Iterable, Sequence
from pathlib import Path

from tests.daemon import DaemonTestCase, mounts, nbd_devices_in_use
from tests.faultydaemon import FaultyDaemon
from tests.mounting import drop_caches
from tests.processes import until
from tests.scenery import BIG, contents, scenery, sha256

PART = "json"
"""A directory of the tree; to compare all of it each time would take long."""

INWARD = {"claim", "open_image", "check", "stop", "close", "set 2", "set 3"}
"""Steps that leave outside what those before them left, or what the next ones do."""


class KilledTestCase(DaemonTestCase):
    """To be derived from with an ``attach``."""

    is_warm = True

    def daemon_that(self, die_after: str | None, *more: str) -> FaultyDaemon:
        """One for the same mount each time. With None it lives."""
        options = ("--fill", "off", "--attach", self.attach, *more)
        daemon = FaultyDaemon(
            self.directory / "d", self.registry.image("steps"), options, die_after=die_after
        )
        if "--mkdir" in more:
            daemon.below = "made"
        self._daemons.append(daemon)
        daemon.start()
        return daemon

    def live(self, daemon: FaultyDaemon) -> int:
        """Once it is ready, it is told to stop. Its exit status."""

        def is_ready_or_dead() -> bool:
            record = daemon.record()
            return daemon.status() is not None or bool(
                record and record.pid == daemon.pid and record.mount_id and record.status == "ready"
            )

        until("a mount, or death", is_ready_or_dead)
        if daemon.status() is None:
            daemon.signal(signal.SIGTERM)
        return daemon.ended()

    def assert_next_one_is_whole(self, *more: str) -> None:
        daemon = self.daemon_that(None, *more)
        record = daemon.ready()
        drop_caches()
        self.assertEqual(sha256(scenery().tree / BIG), sha256(daemon.mountpoint / BIG))
        self.assert_same(contents(scenery().tree / PART), contents(daemon.mountpoint / PART))
        ours = [mount.source for mount in mounts() if mount.path == str(daemon.mountpoint)]
        self.assertEqual([record.device], ours)
        self.assert_no_other_device(record.device)
        daemon.signal(signal.SIGTERM)
        self.assertEqual(0, daemon.ended(), daemon.log)
        self.assert_nothing_left(*self._daemons)

    def assert_no_other_device(self, path: str) -> None:
        in_use = {f"/dev/{name}" for name in nbd_devices_in_use() - self._devices_before}
        self.assertEqual({path} if self.attach == "nbd" else set(), in_use)
        for name in in_use:
            queue = Path("/sys/block", Path(name).name, "queue")
            self.assertEqual("1000", (queue / "io_timeout").read_text().strip())

    def for_each(self, steps: Iterable[str], *more: str) -> None:
        for step in steps:
            try:
                daemon = self.daemon_that(step, *more)
                self.assertEqual(-signal.SIGKILL, self.live(daemon), daemon.log)
                self.assert_next_one_is_whole(*more)
                self.assertEqual("--mkdir" not in more, daemon.mountpoint.exists())
            except AssertionError as error:
                raise AssertionError(f"killed after {step!r}: {error}") from error

    def steps_of_a_life(self, *more: str) -> list[str]:
        daemon = self.daemon_that(None, *more)
        self.assertEqual(0, self.live(daemon), daemon.log)
        self.assert_nothing_left(daemon)
        return outward(daemon.steps())


def outward(steps: Sequence[str]) -> list[str]:
    return [step for step in steps if not {step, step.split()[0]} & INWARD]
