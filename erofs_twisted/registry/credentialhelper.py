"""docker-credential-NAME: the programs that keep credentials, or get them from a cloud.

They are given ``get`` as argument and the registry's name on standard input, and print JSON; what has failed
they say on standard output, too.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from typing import Any

from twisted.internet.defer import Deferred, TimeoutError
from twisted.internet.error import ProcessDone, ProcessExitedAlready
from twisted.internet.protocol import ProcessProtocol
from twisted.python.failure import Failure

from erofs_twisted.registry.credentials import Identity
from erofs_twisted.registry.dockerconfig import InvalidDockerConfig, means_not_found, parse_helper_answer
from erofs_twisted.registry.errors import RegistryError

PATIENCE = 30.0
"""Seconds that a helper has: it may have to wake a keychain, or to ask a cloud."""
MAX_OUTPUT = 64 * 1024
PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
"""Where it is looked for after $PATH."""


class HelperFailed(RegistryError):
    """A credential helper gave no answer. It may the next time."""

    def __init__(self, program: str, what: str) -> None:
        super().__init__(f"{program} {what}", temporary=True)


async def ask_helper(reactor: Any, name: str, server: str, patience: float = PATIENCE) -> Identity | None:
    """What docker-credential-``name`` knows for ``server``; None if it knows nobody.

    Raises `HelperFailed`. Cancelled, or out of time, it ends the program.
    """
    program = f"docker-credential-{name}"
    path = _find(program)
    if path is None:
        raise HelperFailed(program, "is not in $PATH; install it, or put it there")
    helper = _Helper(server)
    try:
        # It runs in our environment, which it may need to find its keychain. No secret of ours is in there.
        reactor.spawnProcess(helper, path, [path, "get"], env=None)
    except OSError as error:
        raise HelperFailed(program, f"cannot be started: {error.strerror}") from error
    try:
        ended_well = await helper.ended.addTimeout(patience, reactor)
    except TimeoutError:
        raise HelperFailed(program, f"has not answered in {patience:g} s") from None
    if not ended_well:
        if means_not_found(helper.output):
            return None
        raise HelperFailed(
            program, f"failed: {_words(helper.output) or _words(helper.errors) or 'in silence'}"
        )
    try:
        return parse_helper_answer(helper.output)
    except InvalidDockerConfig as error:
        raise HelperFailed(program, f"gave an answer that is none: {error}") from error


def _find(program: str) -> str | None:
    """Not below the current directory, whatever $PATH says: that may be anybody's."""
    directories = f"{os.environ.get('PATH', '')}:{PATH}".split(":")
    return shutil.which(program, path=":".join(filter(os.path.isabs, directories)))


class _Helper(ProcessProtocol):
    """One run. ``ended`` fires with whether the exit status is 0."""

    def __init__(self, server: str) -> None:
        self.ended: Deferred[bool] = Deferred(lambda _: self._kill())
        self.output = b""
        self.errors = b""
        self._server = server

    def connectionMade(self) -> None:
        assert self.transport is not None
        self.transport.write(self._server.encode())
        self.transport.closeStdin()

    def outReceived(self, data: bytes) -> None:
        self.output = (self.output + data)[: MAX_OUTPUT + 1]
        if len(self.output) > MAX_OUTPUT:
            self._kill()

    def errReceived(self, data: bytes) -> None:
        self.errors = (self.errors + data)[-MAX_OUTPUT:]

    def processEnded(self, reason: Failure) -> None:
        if not self.ended.called:
            self.ended.callback(reason.check(ProcessDone) is not None)

    def _kill(self) -> None:
        """Also let go of the pipes: what the program has started may hold them for longer than it lives."""
        with contextlib.suppress(ProcessExitedAlready):
            self.transport.signalProcess("KILL")  # type: ignore[union-attr]
        self.transport.loseConnection()  # type: ignore[union-attr]


def _words(output: bytes) -> str:
    """The last line, unless it may hold an answer."""
    lines = output.decode("utf-8", "replace").strip().splitlines()
    if not lines or "{" in lines[-1] or "secret" in output.decode("utf-8", "replace").lower():
        return ""
    return "".join(character if character.isprintable() else " " for character in lines[-1])[:200]
