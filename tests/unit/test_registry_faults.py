"""Random reads from a registry, and a CDN behind it, of which many requests go wrong, in every way."""

from __future__ import annotations

import random

from twisted.internet.defer import Deferred
from twisted.internet.error import ConnectionLost, ConnectionRefusedError
from twisted.trial.unittest import SynchronousTestCase

from erofs_twisted.registry.blob import BlobReader
from erofs_twisted.registry.digest import Digest
from erofs_twisted.registry.manifest import Descriptor
from erofs_twisted.registry.retry import Backoff
from tests.unit.fakehosts import fake_host
from tests.unit.fakehttp import FakeRequest, fake_transport

BLOB = random.Random(0).randbytes(64 * 1024)
URL = f"https://r.example/v2/a/blobs/{Digest.of(BLOB)}"
IN_FLIGHT = 16
RANGES = 400
RATE = 0.2
LATENCY = 0.02


class FaultTests(SynchronousTestCase):
    def setUp(self) -> None:
        self.agent, self.clock, self.transport = fake_transport(self.answer)
        self.random = random.Random(0)
        self.rate = 0.0
        self.redirects = False
        self.faults = [
            lambda request: request.respond(503),
            lambda request: request.respond(429, Retry_After="1"),
            lambda request: request.respond(500, b"not said why"),
            lambda request: request.fail(ConnectionRefusedError()),
            lambda request: request.fail(ConnectionLost()),
            lambda request: None,  # never
            self.cut,
            self.stall,
            self.end_early,
        ]

    def answer(self, request: FakeRequest) -> None:
        self.clock.callLater(LATENCY * (0.5 + self.random.random()), self.answer_now, request)

    def answer_now(self, request: FakeRequest) -> None:
        if request.answer.called:
            return  # whoever asked has given it up
        if self.random.random() < self.rate:
            self.random.choice(self.faults)(request)
        elif self.redirects and request.url == URL:
            expires = int(self.clock.seconds()) + 2
            request.respond(307, b"", Location=f"https://cdn.example/x?Expires={expires}")
        elif request.url != URL and self.clock.seconds() >= int(request.url.partition("=")[2]):
            request.respond(403, b"expired")
        else:
            request.respond_range(BLOB)

    def cut(self, request: FakeRequest) -> None:
        self.part(request, True)

    def stall(self, request: FakeRequest) -> None:
        self.part(request, None)

    def end_early(self, request: FakeRequest) -> None:
        self.part(request, False)

    def part(self, request: FakeRequest, breaks_off: bool | None) -> None:
        """A part of a body, then its end, in one way or another; None: nothing more."""
        start, stop = request.range
        response = request.respond(206, None, Content_Range=f"bytes {start}-{stop - 1}/{len(BLOB)}")
        response.send(BLOB[start : self.random.randrange(start, stop)])
        if breaks_off:
            response.break_off()
        elif breaks_off is False:
            response.finish()

    def read_all(self, seed: int, rate: float, redirects: bool) -> float:
        """Read many ranges, a few at a time, each of them rightly; the seconds that it takes."""
        self.setUp()
        self.random, self.rate, self.redirects = random.Random(seed), rate, redirects
        descriptor = Descriptor("application/vnd.erofs", Digest.of(BLOB), len(BLOB))
        reader = BlobReader(
            [fake_host(self.transport)], descriptor, 120.0, Backoff(random=self.random.random)
        )
        left = iter(range(RANGES))

        async def lane() -> None:
            for _ in left:
                offset = self.random.randrange(len(BLOB))
                length = self.random.randint(1, min(4096, len(BLOB) - offset))
                got: list[bytes] = []
                await reader.read(offset, length, got.append)
                self.assertEqual(BLOB[offset : offset + length], b"".join(got))

        began = self.clock.seconds()
        lanes = [Deferred.fromCoroutine(lane()) for _ in range(IN_FLIGHT)]
        while any(not each.called for each in lanes):
            self.clock.advance(0.01)
            self.assertLess(self.clock.seconds() - began, 3600, "it hangs")
        for each in lanes:
            self.successResultOf(each)
        self.assertEqual([], self.clock.getDelayedCalls())
        return self.clock.seconds() - began

    def test_every_byte_is_right_and_no_read_fails(self) -> None:
        for seed in range(10):
            for redirects in (False, True):
                self.read_all(seed, RATE, redirects)

    def test_it_takes_longer_and_not_for_ever(self) -> None:
        without = self.read_all(0, 0.0, False)
        self.assertLess(self.read_all(0, RATE, False), 600 * without)
