"""What a server may do wrong to a request, and to which: by a script, or by chance."""

from __future__ import annotations

from random import Random
from typing import Any

import attrs

ENDS = ("fin", "reset", "stall")
"""How a body may stop before its end: by the connection's orderly end, by its reset, or not at all."""


@attrs.frozen(kw_only=True)
class Fault:
    """What happens to requests of one ``kind``, ``manifests``, ``blobs`` or ``referrers``, or of all.

    The answer begins ``delay`` seconds late. ``status`` is answered instead of the content, with a
    ``Retry-After`` of so many seconds, which ``retry_at`` makes a date; with ``stall`` nothing is, ever; with
    ``reset`` the connection is. After ``cut_after`` bytes of a body, or with ``cut_anywhere`` after some of
    those that were asked for, it stops in the way that ``cut_by`` says, one of `ENDS`.

    With ``tamper`` the body is another, of the same length. ``shift`` is added to what a partial answer says
    where it begins, ``surplus`` bytes follow its body, and so many bytes as ``trailing`` follow it unsaid by
    its length. With ``whole`` there is no partial answer, but all of the content.

    ``times`` is how many requests it hits, None all.
    """

    kind: str = ""
    delay: float = 0.0
    status: int | None = None
    retry_after: int | None = None
    retry_at: bool = False
    stall: bool = False
    reset: bool = False
    cut_after: int | None = None
    cut_anywhere: bool = False
    cut_by: str = attrs.field(default="fin", validator=attrs.validators.in_(ENDS))
    tamper: bool = False
    shift: int = 0
    surplus: int = 0
    trailing: int = 0
    whole: bool = False
    times: int | None = None

    def fields(self) -> dict[str, Any]:
        """Those that are not as usual; what makes it anew."""
        return {
            field.name: value
            for field in attrs.fields(Fault)
            if (value := getattr(self, field.name)) != field.default
        }


STATUSES = (
    *(Fault(status=status) for status in (408, 500, 502, 503, 504)),
    Fault(status=429, retry_after=1),
    Fault(status=429, retry_after=1, retry_at=True),
)
"""An answer that asks, in one way or another, to come again."""
SILENCES = (Fault(delay=0.3), Fault(stall=True), Fault(cut_anywhere=True, cut_by="stall"))
BREAKS = (Fault(reset=True), Fault(cut_anywhere=True, cut_by="reset"), Fault(cut_anywhere=True))
MISTAKES = (Fault(surplus=7), Fault(trailing=7), Fault(shift=4096), Fault(whole=True))
"""An answer that is not the one to what was asked."""
REFUSALS = (Fault(status=401), Fault(status=403))
"""As a CDN has them, for a URL that it takes for too old."""
REGISTRY_FAULTS = (*STATUSES, *SILENCES, *BREAKS, *MISTAKES)
"""All of what a registry may do wrong, but for wrong bytes."""


@attrs.define
class Script:
    """The first fault that fits is taken, until it has had its times; or, with a ``rate``, that part of the
    requests meets one of those that fit, by chance, which ``seed`` makes the same each time."""

    faults: list[Fault] = attrs.field(factory=list)
    rate: float | None = None
    seed: int = 0
    hits: int = attrs.field(init=False, default=0)
    """Requests that met one."""
    _random: Random = attrs.field(init=False)

    def __attrs_post_init__(self) -> None:
        self._random = Random(self.seed)

    def next(self, kind: str, length: int) -> Fault:
        """What the next request meets, which is of that kind, and for ``length`` bytes."""
        fitting = [fault for fault in self.faults if fault.kind in ("", kind) and fault.times != 0]
        if not fitting or (self.rate is not None and self._random.random() >= self.rate):
            return Fault()
        self.hits += 1
        fault = fitting[0] if self.rate is None else self._random.choice(fitting)
        if fault.times is not None:
            self.faults[self.faults.index(fault)] = attrs.evolve(fault, times=fault.times - 1)
        if fault.cut_anywhere:
            return attrs.evolve(fault, cut_after=self._random.randrange(max(length, 1)))
        return fault
