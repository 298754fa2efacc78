"""Parts that the tests of a blob's way through the cache share: no thread, no clock, an origin that obeys."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable
from typing import Any

import attrs
from twisted.internet.defer import Deferred
from twisted.internet.task import Clock
from twisted.python.failure import Failure
from zope.interface import implementer

from erofs_twisted.blocks.cache import CacheDirectory
from erofs_twisted.blocks.cached import CachedBlob
from erofs_twisted.interfaces import Delivery, IBlobReader


def blob(size: int, seed: int = 0) -> bytes:
    """Bytes of which no two chunks are the same, and none is zeros."""
    return random.Random(seed).randbytes(size)


def digest_of(data: bytes) -> str:
    return f"sha256:{hashlib.sha256(data).hexdigest()}"


class ThreadlessReactor(Clock):
    """A clock that takes calls from the "threads" of a `ThreadlessPool`."""

    def callFromThread(self, function: Callable[..., Any], *arguments: Any, **named: Any) -> None:
        function(*arguments, **named)


class ThreadlessPool:
    """Runs work at once; or, while ``held`` is a list, when the test calls `run`."""

    def __init__(self) -> None:
        self.held: list[Callable[[], None]] | None = None

    def callInThreadWithCallback(
        self,
        on_result: Callable[[bool, Any], None],
        function: Callable[..., Any],
        *arguments: Any,
        **named: Any,
    ) -> None:
        def work() -> None:
            try:
                result = function(*arguments, **named)
            except BaseException:  # noqa: BLE001 - as a thread pool does
                on_result(False, Failure())
            else:
                on_result(True, result)

        if self.held is None:
            work()
        else:
            self.held.append(work)

    def run(self) -> None:
        """Do the work that is held, oldest first, and what comes up meanwhile at once."""
        held, self.held = self.held or [], None
        for work in held:
            work()


@attrs.define(eq=False)
class Transfer:
    """One `IBlobReader.read` under way, which the test drives."""

    data: bytes = attrs.field(repr=False)
    offset: int
    length: int
    deliver: Delivery
    done: Deferred[None]
    position: int = 0
    cancelled: bool = False

    @property
    def live(self) -> bool:
        return not self.done.called

    def send(self, length: int | None = None) -> None:
        """The next bytes; all that are left, if no length is given."""
        start = self.offset + self.position
        end = self.offset + self.length if length is None else start + length
        self.position += end - start
        self.deliver(self.data[start:end])

    def finish(self) -> None:
        """Everything that is left, then the end."""
        if self.position < self.length:
            self.send()
        if self.live:
            self.done.callback(None)


@implementer(IBlobReader)
class ScriptedOrigin:
    """Keeps what is read from it as transfers; does nothing by itself."""

    def __init__(self, data: bytes) -> None:
        self.data = data
        self.digest = digest_of(data)
        self.size = len(data)
        self.transfers: list[Transfer] = []

    def read(self, offset: int, length: int, deliver: Delivery) -> Deferred[None]:
        assert 0 <= offset < offset + length <= self.size

        def cancel(_: Deferred[None]) -> None:
            transfer.cancelled = True

        transfer = Transfer(self.data, offset, length, deliver, Deferred(cancel))
        self.transfers.append(transfer)
        return transfer.done

    @property
    def live(self) -> list[Transfer]:
        return [transfer for transfer in self.transfers if transfer.live]

    @property
    def asked(self) -> list[tuple[int, int]]:
        """(offset, length) of every request so far."""
        return [(transfer.offset, transfer.length) for transfer in self.transfers]


def open_cached(
    path: str,
    data: bytes,
    *,
    chunk_size: int = 64 * 1024,
    reactor: ThreadlessReactor | None = None,
    pool: ThreadlessPool | None = None,
    digest: str | None = None,
) -> CachedBlob:
    """The blob ``data`` in the cache directory ``path``, with whatever is in there of it."""
    opened: list[CachedBlob] = []
    directory = CacheDirectory(reactor or ThreadlessReactor(), pool or ThreadlessPool(), path, chunk_size)  # type: ignore[arg-type]
    directory.open(digest or digest_of(data), len(data)).addCallback(opened.append)
    return opened[0]
