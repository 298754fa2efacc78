"""The same work several times at once."""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from typing import Any

from twisted.internet.defer import Deferred, FirstError, gatherResults

Work = Callable[[], Coroutine[Deferred[Any], Any, None]]


async def in_lanes(count: int, work: Work) -> None:
    """Run ``work`` ``count`` times side by side, until all have ended.

    The first failure is raised, and ends the others; so does a cancellation.
    """
    lanes = [Deferred.fromCoroutine(work()) for _ in range(count)]
    try:
        await gatherResults(lanes, consumeErrors=True)
    except FirstError as first_error:
        for lane in lanes:
            lane.cancel()
        first_error.subFailure.raiseException()
