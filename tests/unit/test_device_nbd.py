"""The nbd back end, with a driver of paper."""

from __future__ import annotations

import os
import socket
from collections.abc import Sequence

from twisted.internet.defer import CancelledError, Deferred
from twisted.internet.interfaces import IListeningPort
from twisted.trial.unittest import SynchronousTestCase
from zope.interface import implementer
from zope.interface.verify import verifyObject

from erofs_twisted.device.driver import Attached, NBDDriver, Reconnected
from erofs_twisted.device.nbd import NetlinkConnector
from erofs_twisted.device.settings import NBDSettings
from erofs_twisted.device.uapi import Connection
from erofs_twisted.errors import MountError
from erofs_twisted.interfaces import IBlockDevice, IDeviceConnector, IExport, INBDServer
from tests.exports import BytesExport
from tests.unit.threadless import HeldPool, ThreadlessReactor


class PaperDriver(NBDDriver):
    def __init__(self) -> None:
        self.attached: list[tuple[Connection, dict[str, int]]] = []
        self.detached: list[Attached] = []
        self.reconfigured: list[tuple[str, str]] = []
        self.queues: list[dict[str, int]] = []
        self.refuses: MountError | None = None
        self.held = False
        self.kernels_end: socket.socket | None = None
        self.dropped = 0
        """How many sockets it drops, since it does not know that the old one is dead."""

    def check(self) -> None:
        if self.refuses:
            raise self.refuses

    def attach(self, connection: Connection, queue: dict[str, int]) -> Attached:
        if self.refuses:
            raise self.refuses
        self.attached.append((connection, queue))
        (descriptor,) = connection.sockets
        # As the kernel does, keep the socket beyond our closing of it.
        self.kernels_end = socket.socket(fileno=os.dup(descriptor))
        return Attached(5, "/dev/nbd5", 1234, False)

    def reconfigure(self, path: str, sockets: Sequence[int], identifier: str) -> Attached:
        if self.refuses:
            raise self.refuses
        self.reconfigured.append((path, identifier))
        self.dropped -= 1
        if self.dropped < 0:
            (descriptor,) = sockets
            self.kernels_end = socket.socket(fileno=os.dup(descriptor))
        return Attached(5, path, 1234, False)

    def set_up(self, attached: Attached, queue: dict[str, int]) -> None:
        self.queues.append(queue)

    def detach(self, attached: Attached) -> None:
        if self.refuses:
            raise self.refuses
        self.detached.append(attached)

    def is_held(self, attached: Attached) -> bool:
        return self.held


@implementer(INBDServer)
class PaperServer:
    def __init__(self) -> None:
        self.adopted: list[tuple[socket.socket, IExport]] = []
        self.ended: Deferred[None] = Deferred()

    def adopt(self, sock: socket.socket, export: IExport) -> Deferred[None]:
        self.adopted.append((sock, export))
        return self.ended

    def listen(self, path: str, exports: Sequence[IExport]) -> Deferred[IListeningPort]:
        raise NotImplementedError


class PaperTestCase(SynchronousTestCase):
    def setUp(self) -> None:
        self.pool = HeldPool(held=False)
        self.driver = PaperDriver()
        self.server = PaperServer()
        self.addCleanup(self.close)

    def close(self) -> None:
        for sock, _ in self.server.adopted:
            sock.close()
        if self.driver.kernels_end is not None:
            self.driver.kernels_end.close()


class NetlinkConnectorTests(PaperTestCase):
    def setUp(self) -> None:
        super().setUp()
        self.export = BytesExport(bytes(8192), description="sha256:ab")

    def connector(self, settings: NBDSettings | None = None) -> NetlinkConnector:
        return NetlinkConnector(ThreadlessReactor(), self.pool, settings, self.driver)

    def attach(self) -> IBlockDevice:
        return self.successResultOf(self.connector().attach(self.export, self.server))

    def kernel_has_let_go(self) -> bool:
        ((sock, _),) = self.server.adopted
        sock.setblocking(False)
        try:
            return sock.recv(1) == b""
        except BlockingIOError:
            return False

    def test_it_is_what_it_says(self) -> None:
        verifyObject(IDeviceConnector, self.connector())
        verifyObject(IBlockDevice, self.attach())

    def test_a_check_that_fails_says_what_is_missing(self) -> None:
        self.assertIsNone(self.successResultOf(self.connector().check()))
        self.driver.refuses = MountError("no nbd")
        self.failureResultOf(self.connector().check(), MountError)

    def test_the_kernel_gets_the_other_end_of_what_the_server_serves(self) -> None:
        device = self.attach()
        self.assertEqual("/dev/nbd5", device.path)
        ((ours, export),) = self.server.adopted
        self.assertIs(self.export, export)
        assert self.driver.kernels_end is not None
        self.driver.kernels_end.sendall(b"request")
        self.assertEqual(b"request", ours.recv(100))

    def test_the_kernels_end_is_the_kernels_alone(self) -> None:
        self.attach()
        self.assertFalse(self.kernel_has_let_go())
        assert self.driver.kernels_end is not None
        self.driver.kernels_end.close()
        self.assertTrue(self.kernel_has_let_go())

    def test_the_export_is_served_before_the_kernel_is_asked(self) -> None:
        self.pool.held = True
        attaching = self.connector().attach(self.export, self.server)
        self.assertEqual((1, 0), (len(self.server.adopted), len(self.driver.attached)))
        self.pool.run()
        self.successResultOf(attaching)

    def test_the_defaults_spare_slow_replies_and_await_a_new_daemon(self) -> None:
        self.attach()
        ((connection, queue),) = self.driver.attached
        self.assertEqual((8192, 4096, 3), (connection.size, connection.block_size, connection.server_flags))
        self.assertEqual((0, 300), (connection.timeout, connection.dead_conn_timeout))
        self.assertEqual("sha256:ab", connection.backend_identifier)
        self.assertEqual(1000, queue["io_timeout"])

    def test_settings_reach_the_kernel(self) -> None:
        settings = NBDSettings(
            io_timeout_ms=1,
            timeout=2,
            dead_conn_timeout=3,
            backend_identifier="me",
            read_ahead_kb=4,
            max_sectors_kb=5,
        )
        self.successResultOf(self.connector(settings).attach(self.export, self.server))
        ((connection, queue),) = self.driver.attached
        self.assertEqual((2, 3), (connection.timeout, connection.dead_conn_timeout))
        self.assertEqual("me", connection.backend_identifier)
        # The request size comes first: it makes recent kernels choose the read-ahead anew.
        self.assertEqual(
            [("io_timeout", 1), ("max_sectors_kb", 5), ("read_ahead_kb", 4)], list(queue.items())
        )

    def test_a_kernel_that_refuses_gets_no_socket(self) -> None:
        self.driver.refuses = MountError("no")
        self.failureResultOf(self.connector().attach(self.export, self.server), MountError)
        self.assertTrue(self.kernel_has_let_go())

    def test_an_attachment_that_is_cancelled_is_undone_when_it_has_ended(self) -> None:
        self.pool.held = True
        attaching = self.connector().attach(self.export, self.server)
        attaching.cancel()
        self.assertNoResult(attaching)
        self.pool.run()
        self.failureResultOf(attaching, CancelledError)
        self.assertEqual(1, len(self.driver.detached))

    def test_a_connection_that_ends_is_a_device_lost(self) -> None:
        device = self.attach()
        self.assertNoResult(device.lost)
        self.server.ended.callback(None)
        self.assertIsNone(self.successResultOf(device.lost))

    def test_a_connection_that_ends_by_detach_is_no_loss(self) -> None:
        device = self.attach()
        self.successResultOf(device.detach())
        self.server.ended.callback(None)
        self.assertNoResult(device.lost)

    def test_detach_is_done_once(self) -> None:
        device = self.attach()
        self.successResultOf(device.detach())
        self.successResultOf(device.detach())
        self.assertEqual(1, len(self.driver.detached))

    def test_a_detach_that_failed_may_be_tried_again(self) -> None:
        device = self.attach()
        self.driver.refuses = MountError("not now")
        self.failureResultOf(device.detach(), MountError)
        self.driver.refuses = None
        self.successResultOf(device.detach())
        self.assertEqual(1, len(self.driver.detached))

    def test_a_device_that_is_held_is_not_detached(self) -> None:
        device = self.attach()
        self.driver.held = True
        self.assertTrue(self.successResultOf(device.is_held()))
        self.failureResultOf(device.detach(), MountError)
        self.assertEqual([], self.driver.detached)

    def test_a_device_that_is_lost_is_detached_though_it_is_held(self) -> None:
        device = self.attach()
        self.driver.held = True
        self.server.ended.callback(None)
        self.successResultOf(device.detach())
        self.assertEqual(1, len(self.driver.detached))


class AdoptionTests(PaperTestCase):
    """A device whose server was killed."""

    def setUp(self) -> None:
        super().setUp()
        self.reclaimed: dict[str, Reconnected] = {}
        self.connector = NetlinkConnector(
            ThreadlessReactor(), self.pool, None, self.driver, reclaimed=self.reclaimed
        )

    def adopt(self) -> Deferred[IBlockDevice]:
        return self.connector.adopt("/dev/nbd5", BytesExport(bytes(8192)), self.server, "me")

    def assert_served(self) -> None:
        ((ours, _),) = self.server.adopted
        assert self.driver.kernels_end is not None
        self.driver.kernels_end.sendall(b"request")
        self.assertEqual(b"request", ours.recv(100))

    def test_it_gets_a_new_socket_by_the_name_that_it_has_for_its_server(self) -> None:
        self.assertEqual("/dev/nbd5", self.successResultOf(self.adopt()).path)
        self.assertEqual([("/dev/nbd5", "me")], self.driver.reconfigured)
        self.assert_served()

    def test_a_socket_that_the_driver_drops_is_followed_by_another(self) -> None:
        self.driver.dropped = 3
        self.successResultOf(self.adopt())
        self.assertEqual(4, len(self.driver.reconfigured))
        self.assert_served()

    def test_a_device_that_drops_them_all_is_served_by_somebody_else(self) -> None:
        self.driver.dropped = 1 << 30
        with self.assertRaises(MountError) as caught:
            self.driver.reconnect("/dev/nbd5", "me", patience=0.05)
        self.assertIn("/dev/nbd5 is served by somebody else", str(caught.exception))
        self.assertLessEqual(2, len(self.driver.reconfigured))

    def test_one_that_was_reclaimed_is_served_with_the_socket_that_it_has(self) -> None:
        there = self.reclaimed["/dev/nbd5"] = self.driver.reconnect("/dev/nbd5", "me")
        self.successResultOf(self.adopt())
        self.assertEqual((1, {}), (len(self.driver.reconfigured), self.reclaimed))
        self.assertIs(there.sock, self.server.adopted[0][0])
        self.assert_served()

    def test_who_gives_up_meanwhile_leaves_it_as_it_was(self) -> None:
        self.pool.held = True
        adopting = self.adopt()
        adopting.cancel()
        self.pool.run()
        self.failureResultOf(adopting, CancelledError)
        self.assertEqual([], self.server.adopted)
        assert self.driver.kernels_end is not None
        self.assertEqual(b"", self.driver.kernels_end.recv(1))

    def test_one_that_was_killed_before_its_queue_was_set_up_gets_that_too(self) -> None:
        self.successResultOf(self.adopt())
        (queue,) = self.driver.queues
        self.assertEqual(1000, queue["io_timeout"])

    def test_a_driver_that_refuses_is_an_error(self) -> None:
        self.driver.refuses = MountError("no")
        self.failureResultOf(self.adopt(), MountError)

    def test_the_adopted_device_is_lost_when_its_connection_ends(self) -> None:
        device = self.successResultOf(self.adopt())
        self.server.ended.callback(None)
        self.assertIsNone(self.successResultOf(device.lost))
