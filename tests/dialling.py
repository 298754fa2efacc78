"""Counts the connections that somebody tries to make: those that nobody takes are in no server's log."""

from __future__ import annotations

from typing import Any

from zope.interface import directlyProvides, providedBy


class Dialling:
    """``reactor`` is as the one given; `attempts` counts what goes through it."""

    def __init__(self, reactor: Any) -> None:
        self.attempts = 0
        self.reactor = _Counting(reactor, self)


class _Counting:
    def __init__(self, reactor: Any, dialling: Dialling) -> None:
        self._reactor = reactor
        self._dialling = dialling
        directlyProvides(self, providedBy(reactor))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._reactor, name)

    def connectTCP(self, *arguments: Any, **more: Any) -> Any:
        self._dialling.attempts += 1
        return self._reactor.connectTCP(*arguments, **more)
