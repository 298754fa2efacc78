"""Runs the tests under pytest as trial does: in a directory of their own, trial's test cases first.

Trial's test cases and those of pytest-twisted run the one reactor. Trial starts and stops it for each test;
pytest-twisted starts it with its first test and keeps it. So the latter must come last.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator

import pytest
from twisted.trial.unittest import SynchronousTestCase


def pytest_configure() -> None:
    """What a shell starts in the background ignores SIGINT, and so would what the tests interrupt."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    def runs_on_pytest_twisted(item: pytest.Item) -> bool:
        cls = getattr(item, "cls", None)
        return cls is None or not issubclass(cls, SynchronousTestCase)

    items.sort(key=runs_on_pytest_twisted)


@pytest.fixture(scope="session", autouse=True)
def in_a_directory_of_its_own(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What ``TestCase.mktemp`` makes goes there."""
    before = os.getcwd()
    os.chdir(tmp_path_factory.mktemp("trial"))
    yield
    os.chdir(before)
