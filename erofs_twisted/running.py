"""A command: its work on the reactor, and its end."""

from __future__ import annotations

import sys
from collections.abc import Callable, Coroutine
from typing import Any, NoReturn

import click

from erofs_twisted.errors import ErofsTwistedError
from erofs_twisted.process import on_stop_signal
from erofs_twisted.steadyclock import keep_steady


def run_command(command: click.Command, name: str, failed: int = 1) -> NoReturn:
    """A whole program: its exit status is 0, 1 for a call that is wrong, or ``failed``, with a message."""
    try:
        command.main(prog_name=name, standalone_mode=False)
    except click.ClickException as error:
        error.show()
        sys.exit(1)
    except click.Abort:
        sys.exit(failed)
    except ErofsTwistedError as error:
        click.echo(f"{name}: {error}", err=True)
        sys.exit(failed)
    sys.exit(0)


def run(main: Callable[[Any], Coroutine[Any, Any, Any]], verbose: bool = False) -> Any:
    """Run a coroutine on the reactor; Ctrl-C and SIGTERM cancel it, which is no error."""
    from erofs_twisted.messages import Messages

    Messages(sys.stderr, verbose).begin()
    from twisted.internet import reactor as global_reactor
    from twisted.internet.defer import CancelledError, Deferred
    from twisted.python.failure import Failure

    reactor: Any = global_reactor
    keep_steady(reactor)
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
