"""Sockets to listen on that systemd has opened."""

from __future__ import annotations

import os
import socket
from pathlib import Path

from twisted.trial.unittest import SynchronousTestCase

from erofs_twisted import ownerport

FIRST = 500
"""A descriptor that nobody has, nor those above it."""


class InheritedTests(SynchronousTestCase):
    def setUp(self) -> None:
        self.patch(ownerport, "FIRST_INHERITED", FIRST)
        self.directory = Path(self.mktemp())
        self.directory.mkdir()

    def inherit(self, descriptor: int, made: socket.socket) -> None:
        with made:
            os.dup2(made.fileno(), descriptor)
        self.addCleanup(os.close, descriptor)

    def listening(self, name: str) -> socket.socket:
        made = socket.socket(socket.AF_UNIX)
        made.bind(os.path.relpath(self.directory / name))
        made.listen()
        return made

    def find(self, name: str) -> int | None:
        found = ownerport.find_inherited(str((self.directory / name).absolute()))
        return None if found is None else found.detach()

    def test_the_one_that_listens_at_the_path_is_found_among_others(self) -> None:
        self.inherit(FIRST, self.listening("other"))
        self.inherit(FIRST + 1, socket.socket(socket.AF_INET))
        self.inherit(FIRST + 2, self.listening("control"))
        self.assertEqual(FIRST + 2, self.find("control"))
        self.assertIsNone(self.find("third"))
        os.fstat(FIRST)

    def test_it_is_found_again_by_who_comes_after(self) -> None:
        self.inherit(FIRST, self.listening("control"))
        self.assertEqual([FIRST, FIRST], [self.find("control"), self.find("control")])

    def test_where_there_is_none_or_a_file_nothing_is_found(self) -> None:
        self.assertIsNone(self.find("control"))
        descriptor = os.open(os.devnull, os.O_RDONLY)
        os.dup2(descriptor, FIRST)
        os.close(descriptor)
        self.addCleanup(os.close, FIRST)
        self.assertIsNone(self.find("control"))
        os.fstat(FIRST)

    def test_one_that_only_connects_from_there_is_not_taken(self) -> None:
        bound = socket.socket(socket.AF_UNIX)
        bound.bind(os.path.relpath(self.directory / "control"))
        self.inherit(FIRST, bound)
        self.assertIsNone(self.find("control"))
