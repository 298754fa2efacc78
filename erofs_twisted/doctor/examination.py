"""Everything that is looked at without asking anybody but this machine. It blocks."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import attrs

from erofs_twisted.device.driver import NBDDriver
from erofs_twisted.device.machine import may_administer
from erofs_twisted.doctor import machine, remains
from erofs_twisted.doctor.finding import Finding
from erofs_twisted.doctor.search import look_for_remains
from erofs_twisted.doctor.survey import look_at_machine


@attrs.frozen
class Examination:
    """``findings``: of what is left of mounts first, then of what this machine has. ``compressors``: whether
    EROFS has each kind here, None where that cannot be told."""

    findings: list[Finding]
    compressors: Mapping[str, bool | None]


def examine(state_dir: Path, cache_dir: Path) -> Examination:
    """Look at all of it."""
    driver = NBDDriver() if may_administer() else None
    seen = look_at_machine(cache_dir, state_dir)
    findings = remains.findings_of(look_for_remains(state_dir, driver))
    return Examination([*findings, *machine.findings_of(seen)], machine.compressors_of(seen))
