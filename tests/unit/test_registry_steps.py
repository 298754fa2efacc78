"""What a client says of each step: enough to find out what is wrong, and no secret."""

from __future__ import annotations

import io
import json

from twisted.internet.error import ConnectionRefusedError
from twisted.logger import Logger, LogLevel
from twisted.trial.unittest import SynchronousTestCase

from erofs_twisted.messages import Messages
from erofs_twisted.registry.credentials import Credentials
from erofs_twisted.registry.digest import Digest
from erofs_twisted.registry.manifest import Descriptor
from tests.unit.fakehosts import fake_host, fake_mirror, fake_store
from tests.unit.fakehttp import FakeRequest, fake_transport

BLOB = bytes(range(256)) * 32
DESCRIPTOR = Descriptor("application/vnd.erofs", Digest.of(BLOB), len(BLOB))
CDN = "https://cdn.example/x?signature=swordfish"
TIME = 0.012


class StepTests(SynchronousTestCase):
    """A registry that wants a token, and redirects to a CDN."""

    def setUp(self) -> None:
        self.told: list[str] = []
        self.agent, self.clock, self.transport = fake_transport(self.answer, self.told.append)
        self.has_ranges = True

    def answer(self, request: FakeRequest) -> None:
        self.clock.advance(TIME)
        if request.url.startswith("https://down.example"):
            request.fail(ConnectionRefusedError())
        elif request.url.startswith("https://auth.example"):
            request.respond(200, json.dumps({"token": "swordfish", "expires_in": 300}).encode())
        elif request.url == CDN:
            if self.has_ranges:
                request.respond_range(BLOB)
            else:
                request.respond(200, BLOB)
        elif "authorization" not in request.headers:
            realm = 'Bearer realm="https://auth.example/token?key=swordfish",scope="repository:a:pull"'
            request.respond(401, WWW_Authenticate=realm)
        else:
            request.respond(307, Location=CDN)

    def probe(self, *mirrors: str) -> object:
        credentials = Credentials("alice", "swordfish")
        hosts = [fake_mirror(self.transport, url) for url in mirrors]
        hosts.append(fake_host(self.transport, credentials=credentials))
        return self.successResultOf(fake_store(self.transport, "r.example/a:1", *hosts).probe(DESCRIPTOR))

    def test_each_request_is_told_with_its_status_and_time(self) -> None:
        self.probe()
        url = f"https://r.example/v2/a/blobs/{DESCRIPTOR.digest}"
        self.assertEqual(
            [
                f"GET {url} bytes=0-0: 401 Unauthorized (12.0 ms)",
                "r.example wants bearer (realm https://auth.example/token?…, scope repository:a:pull)",
                "credentials for r.example: those that were given (--username, --oci)",
                "GET https://auth.example/token?…: 200 OK (12.0 ms)",
                "a token for repository:a:pull, valid for 300 s",
                f"GET {url} bytes=0-0: 307 Temporary Redirect (12.0 ms)",
                "GET https://cdn.example/x?… bytes=0-0: 206 Partial Content (12.0 ms)",
            ],
            self.told[:7],
        )

    def test_a_server_that_is_down_is_told(self) -> None:
        self.probe("https://down.example")
        self.assertIn("https://down.example/v2/a/blobs/", self.told[0])
        self.assertIn("refused", self.told[0])

    def test_no_secret_is_told(self) -> None:
        self.probe()
        self.assertNotIn("swordfish", "\n".join(self.told))
        self.assertNotIn("alice", "\n".join(self.told))

    def test_a_probe_measures_round_trips_and_throughput(self) -> None:
        probe = self.probe()
        self.assertEqual(
            ("r.example", "https://cdn.example", True), (probe.host, probe.origin, probe.has_ranges)
        )
        self.assertAlmostEqual(TIME, probe.round_trip, places=5)
        self.assertAlmostEqual(len(BLOB) / TIME, probe.throughput, places=-2)

    def test_a_probe_finds_out_that_there_are_no_ranges(self) -> None:
        self.has_ranges = False
        probe = self.probe()
        self.assertEqual((False, None, None), (probe.has_ranges, probe.round_trip, probe.throughput))

    def test_who_does_not_want_to_know_has_no_line_made(self) -> None:
        *_, transport = fake_transport(self.answer)
        store = fake_store(transport, "r.example/a:1", credentials=Credentials("alice", "swordfish"))
        self.successResultOf(store.probe(DESCRIPTOR))
        self.assertEqual([], self.told)


class MessageTests(SynchronousTestCase):
    def shown(self, level: LogLevel, verbose: bool, namespace: str = "erofs_twisted.x") -> str:
        stream = io.StringIO()
        Logger(namespace, observer=Messages(stream, verbose)).emit(level, "one {thing}", thing="thing")
        return stream.getvalue()

    def test_warnings_and_errors_are_shown(self) -> None:
        self.assertEqual("erofs-nbd: warning: one thing\n", self.shown(LogLevel.warn, False))
        self.assertEqual("erofs-nbd: one thing\n", self.shown(LogLevel.error, False))

    def test_the_rest_is_shown_to_who_wants_it_and_only_ours(self) -> None:
        for level in (LogLevel.info, LogLevel.debug):
            self.assertEqual("", self.shown(level, False))
            self.assertEqual("one thing\n", self.shown(level, True))
            self.assertEqual("", self.shown(level, True, "twisted.web"))
