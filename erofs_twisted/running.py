"""A command's work on the reactor: begun, waited for, and over."""

from __future__ import annotations

import sys
from collections.abc import Callable, Coroutine
from typing import Any

from erofs_twisted.process import on_stop_signal


def run(main: Callable[[Any], Coroutine[Any, Any, Any]], verbose: bool = False) -> Any:
    """Run a coroutine on the reactor; Ctrl-C and SIGTERM cancel it, which is no error."""
    from erofs_twisted.messages import Messages

    Messages(sys.stderr, verbose).begin()
    from twisted.internet import reactor as global_reactor
    from twisted.internet.defer import CancelledError, Deferred
    from twisted.python.failure import Failure

    reactor: Any = global_reactor
    outcome: list[Any] = []

    def begin() -> None:
        work = Deferred.fromCoroutine(main(reactor))
        on_stop_signal(reactor, lambda name: work.cancel())
        _ = work.addBoth(outcome.append).addBoth(lambda _: reactor.stop())

    reactor.callWhenRunning(begin)
    reactor.run()
    (result,) = outcome
    if not isinstance(result, Failure):
        return result
    if result.check(CancelledError):
        sys.exit(0)
    result.raiseException()
    raise AssertionError
