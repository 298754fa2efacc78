"""Order for pytest: trial's test cases first, then those on pytest-twisted's reactor.

Both run the one reactor. Trial starts and stops it for each test; pytest-twisted starts it with its first
test and keeps it. So the latter must come last.
"""

from __future__ import annotations

import pytest
from twisted.trial.unittest import SynchronousTestCase


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    def runs_on_pytest_twisted(item: pytest.Item) -> bool:
        cls = getattr(item, "cls", None)
        return cls is None or not issubclass(cls, SynchronousTestCase)

    items.sort(key=runs_on_pytest_twisted)
