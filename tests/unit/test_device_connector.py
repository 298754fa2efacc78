"""``--attach``: which back end is taken, and what is said about it."""

from __future__ import annotations

from twisted.internet.defer import Deferred, fail, succeed
from twisted.logger import Logger
from twisted.trial.unittest import SynchronousTestCase
from zope.interface import implementer

from erofs_twisted.device.connector import choose_connector
from erofs_twisted.errors import MountError
from erofs_twisted.interfaces import IBlockDevice, IDeviceConnector, IExport, INBDServer


@implementer(IDeviceConnector)
class PaperConnector:
    def __init__(self, name: str, lacks: str = "") -> None:
        self.name = name
        self.lacks = lacks
        self.checks = 0

    def check(self) -> Deferred[None]:
        self.checks += 1
        return fail(MountError(self.lacks)) if self.lacks else succeed(None)

    def attach(self, export: IExport, server: INBDServer) -> Deferred[IBlockDevice]:
        raise NotImplementedError


class ChooseConnectorTests(SynchronousTestCase):
    def setUp(self) -> None:
        self.said: list[str] = []

    def choose(self, name: str, *connectors: PaperConnector) -> Deferred[IDeviceConnector]:
        log = Logger(observer=lambda event: self.said.append(event["log_format"].format(**event)))
        return Deferred.fromCoroutine(choose_connector(name, connectors, log))

    def test_auto_takes_the_first_that_works_and_asks_no_further(self) -> None:
        nbd, fuse = PaperConnector("nbd"), PaperConnector("fuse")
        self.assertIs(nbd, self.successResultOf(self.choose("auto", nbd, fuse)))
        self.assertEqual((1, 0), (nbd.checks, fuse.checks))
        self.assertEqual(["attaching by nbd"], self.said)

    def test_auto_falls_back_and_says_why(self) -> None:
        nbd, fuse = PaperConnector("nbd", lacks="no driver"), PaperConnector("fuse")
        self.assertIs(fuse, self.successResultOf(self.choose("auto", nbd, fuse)))
        self.assertEqual(["attaching by fuse (nbd: no driver)"], self.said)

    def test_where_none_works_each_reason_is_given(self) -> None:
        nbd, fuse = PaperConnector("nbd", lacks="no driver"), PaperConnector("fuse", lacks="no nbdfuse")
        error = self.failureResultOf(self.choose("auto", nbd, fuse), MountError).value
        self.assertIn("nbd: no driver", str(error))
        self.assertIn("fuse: no nbdfuse", str(error))

    def test_a_named_one_is_taken_or_nothing(self) -> None:
        nbd, fuse = PaperConnector("nbd", lacks="no driver"), PaperConnector("fuse")
        self.assertIs(fuse, self.successResultOf(self.choose("fuse", nbd, fuse)))
        self.assertEqual(0, nbd.checks)
        error = self.failureResultOf(self.choose("nbd", nbd, fuse), MountError).value
        self.assertIn("--attach nbd", str(error))
        self.assertIn("no driver", str(error))
