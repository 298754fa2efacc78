"""Which of the servers that have a blob is asked for a part of it."""

from __future__ import annotations

from collections.abc import Callable, Collection, Coroutine, Iterable
from typing import Any

import attrs
from twisted.internet.defer import CancelledError, Deferred

from erofs_twisted.registry.circuit import Turn
from erofs_twisted.registry.host import RegistryHost
from erofs_twisted.registry.location import BlobLocation

REST, COLD = 60.0, 5.0
"""Seconds after which a server is asked again that refused a blob, or that sends only all of it: a cache that
does so may have it soon."""


@attrs.define(eq=False)
class Replica:
    """A blob at one server, ``path`` there."""

    host: RegistryHost
    path: str
    location: BlobLocation = attrs.field(init=False)
    _rests_until: float | None = attrs.field(init=False, default=None)

    def __attrs_post_init__(self) -> None:
        self.location = BlobLocation(self.host.transport.clock)

    @property
    def url(self) -> str:
        return self.host.url(self.path)

    @property
    def is_awake(self) -> bool:
        """Is it taken to have the blob, and its server to be up?"""
        return self._rests_until is None and not self.host.session.circuit.is_open

    @property
    def is_due(self) -> bool:
        """Is it time to try whether that is so again?"""
        circuit = self.host.session.circuit
        if circuit.is_open:
            return circuit.is_due
        return self._rests_until is not None and self.host.transport.clock.seconds() >= self._rests_until

    def rest(self, seconds: float) -> None:
        """Others are asked for the blob, if there are others."""
        self._rests_until = self.host.transport.clock.seconds() + seconds

    def wake(self) -> None:
        """It has the blob."""
        self._rests_until = None


@attrs.frozen(eq=False)
class Replicas:
    """One blob at several servers, the preferred one first.

    A server that is taken to be down, or not to have the blob, is passed over as long as there is another
    one. When it is time, ``probe`` finds out about it beside the reads, so that none of them has to.
    """

    _replicas: tuple[Replica, ...]
    _probe: Callable[[Replica, Turn], Coroutine[Deferred[Any], Any, None]]

    def __len__(self) -> int:
        return len(self._replicas)

    def awake(self, but: Collection[Replica] = ()) -> Replica | None:
        """The first that is taken to work, of those that are not in ``but``."""
        return next((each for each in self._left(but) if each.is_awake), None)

    def are_down(self, but: Collection[Replica]) -> bool:
        """Are all the servers down that are left?"""
        return all(each.host.session.circuit.is_open for each in self._left(but))

    async def turn(self, refused: Collection[Replica], tried: Collection[Replica]) -> tuple[Replica, Turn]:
        """Which one is to be asked next: none of ``refused``, which are not all, nor of ``tried``, if there
        is another one that works. Waits for as long as all are down."""
        chosen = self.awake((*refused, *tried))
        if chosen is not None:
            self._look_after(before=chosen)
        else:
            chosen = next(
                (each for each in self._left(refused) if not each.host.session.circuit.is_open), None
            )
        if chosen is not None:
            return chosen, await chosen.host.session.circuit.enter()
        return await _first_to_open(self._left(refused))

    def _left(self, but: Collection[Replica]) -> Iterable[Replica]:
        return (each for each in self._replicas if each not in but)

    def _look_after(self, before: Replica) -> None:
        for each in self._replicas:
            if each is before:
                return
            if each.is_due:
                each.host.beside(self._try(each))

    async def _try(self, replica: Replica) -> None:
        turn = await replica.host.session.circuit.enter()
        replica.rest(COLD)
        try:
            await self._probe(replica, turn)
        finally:
            turn.leave()


def _first_to_open(closed: Iterable[Replica]) -> Deferred[tuple[Replica, Turn]]:
    """The first of these servers at which a request may be made, and leave to make it."""
    entering: list[Deferred[Any]] = []

    def cancel(_: object) -> None:
        for each in entering:
            each.cancel()

    def won(turn: Turn, replica: Replica) -> None:
        cancel(None)
        opened.callback((replica, turn))

    opened: Deferred[tuple[Replica, Turn]] = Deferred(cancel)
    for replica in closed:
        turn: Deferred[Any] = Deferred.fromCoroutine(replica.host.session.circuit.enter())
        entering.append(turn)
        _ = turn.addCallbacks(won, lambda failure: failure.trap(CancelledError), callbackArgs=(replica,))
        if opened.called:
            break
    return opened
