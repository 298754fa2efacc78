"""Everything that is looked at without asking anybody but this machine. It blocks."""

from __future__ import annotations

from pathlib import Path

from erofs_twisted.device.driver import NBDDriver
from erofs_twisted.device.machine import may_administer
from erofs_twisted.doctor import machine, remains
from erofs_twisted.doctor.finding import Finding
from erofs_twisted.doctor.search import look_for_remains
from erofs_twisted.doctor.survey import look_at_machine


def examine(state_dir: Path, cache_dir: Path) -> list[Finding]:
    """What is left of mounts first, then what this machine has."""
    driver = NBDDriver() if may_administer() else None
    return [
        *remains.findings_of(look_for_remains(state_dir, driver)),
        *machine.findings_of(look_at_machine(cache_dir, state_dir)),
    ]
