"""An image at several servers: who is asked for what, who instead when one fails, and when it is back."""

from __future__ import annotations

from typing import Any

from twisted.internet.defer import CancelledError, Deferred
from twisted.internet.error import ConnectionRefusedError
from twisted.trial.unittest import SynchronousTestCase

from erofs_twisted.errors import RangesIgnored
from erofs_twisted.registry.blob import SLICED, BlobReader
from erofs_twisted.registry.digest import Digest
from erofs_twisted.registry.errors import BlobUnreadable, DigestMismatch, NoHost, NotInRegistry
from erofs_twisted.registry.hosts import Capability
from erofs_twisted.registry.manifest import OCI_INDEX, OCI_MANIFEST, Descriptor
from erofs_twisted.registry.retry import Backoff
from tests.unit.fakehosts import fake_host, fake_mirror, fake_store
from tests.unit.fakehttp import FakeRequest, fake_transport
from tests.unit.test_registry_client import AMD64, INDEX, MANIFEST

BLOB = bytes(range(256)) * 4
PULL = frozenset({Capability.PULL})
ONE, TWO, OWN = "https://one.example", "https://two.example", "https://r.example"


def host_of(request: FakeRequest) -> str:
    return "/".join(request.url.split("/")[:3])


class MirrorTests(SynchronousTestCase):
    """Two mirrors and the registry itself; ``self.answers`` says what each one does."""

    def setUp(self) -> None:
        self.agent, self.clock, self.transport = fake_transport(self.answer)
        self.answers: dict[str, Any] = {ONE: self.serve, TWO: self.serve, OWN: self.serve}

    def answer(self, request: FakeRequest) -> None:
        self.answers[host_of(request)](request)

    def serve(self, request: FakeRequest) -> None:
        raise NotImplementedError

    def hosts(self, **how: Any) -> list[Any]:
        mirrors = [fake_mirror(self.transport, url, **how) for url in (ONE, TWO)]
        return [*mirrors, fake_host(self.transport)]

    def asked(self) -> list[str]:
        """The servers, in the order of the requests since the last look."""
        asked = [host_of(request) for request in self.agent.requests]
        self.agent.requests.clear()
        return asked


def refuse(request: FakeRequest) -> None:
    request.fail(ConnectionRefusedError())


def status(code: int, **headers: str) -> Any:
    return lambda request: request.respond(code, **headers)


class BlobTests(MirrorTests):
    def setUp(self) -> None:
        super().setUp()
        self.make(BLOB)

    def make(self, blob: bytes, size: int | None = None) -> None:
        self.blob = blob
        descriptor = Descriptor("application/vnd.erofs", Digest.of(blob), size or len(blob))
        self.reader = BlobReader(self.hosts(), descriptor, 100.0, Backoff(random=lambda: 1.0))

    def serve(self, request: FakeRequest) -> None:
        request.respond_range(self.blob)

    def read(self, offset: int = 100, length: int = 50) -> Deferred[bytes]:
        got: list[bytes] = []
        return self.reader.read(offset, length, got.append).addCallback(lambda _: b"".join(got))

    def expect(self, *asked: str) -> None:
        """A read is right at once, and these are asked, in this order."""
        self.assertEqual(BLOB[100:150], self.successResultOf(self.read()))
        self.assertEqual(list(asked), self.asked())

    def test_the_first_is_asked_and_told_whose_blob_it_is(self) -> None:
        self.assertEqual(BLOB[100:150], self.successResultOf(self.read()))
        (request,) = self.agent.requests
        self.assertEqual(f"{ONE}/v2/a/blobs/{self.reader.digest}?ns=r.example", request.url)

    def test_the_registry_itself_is_not_told(self) -> None:
        self.answers[ONE] = self.answers[TWO] = refuse
        self.successResultOf(self.read())
        self.assertEqual(f"{OWN}/v2/a/blobs/{self.reader.digest}", self.agent.last.url)

    def test_whatever_goes_wrong_the_next_is_asked_at_once(self) -> None:
        for fault in (refuse, status(500), status(404), status(403), status(429, Retry_After="60")):
            self.setUp()
            self.answers[ONE] = fault
            self.expect(ONE, TWO)

    def test_one_that_cannot_be_reached_is_passed_over(self) -> None:
        self.answers[ONE] = refuse
        self.expect(ONE, TWO)
        self.expect(TWO)

    def test_one_that_has_not_the_blob_is_passed_over(self) -> None:
        self.answers[ONE] = status(404)
        self.expect(ONE, TWO)
        self.expect(TWO)

    def test_one_that_fails_now_and_then_is_asked_each_time(self) -> None:
        self.answers[ONE] = status(500)
        self.expect(ONE, TWO)
        self.answers[ONE] = self.serve
        self.expect(ONE)

    def test_one_that_is_back_is_found_beside_the_reads_and_asked_again(self) -> None:
        self.answers[ONE] = refuse
        self.expect(ONE, TWO)
        self.clock.advance(1.0)
        self.expect(ONE, TWO)  # to see if it is back
        self.answers[ONE] = self.serve
        self.expect(TWO)
        self.clock.advance(1.0)
        self.assertEqual(BLOB[100:150], self.successResultOf(self.read()))
        probe, read = self.agent.requests
        self.assertEqual(("bytes=0-0", f"{TWO}"), (probe.headers["range"], host_of(read)))
        self.asked()
        self.expect(ONE)

    def test_one_that_did_not_have_the_blob_is_asked_again_after_a_minute(self) -> None:
        self.answers[ONE] = status(404)
        self.expect(ONE, TWO)
        self.clock.advance(59)
        self.expect(TWO)
        self.clock.advance(2)
        self.expect(ONE, TWO)
        self.answers[ONE] = self.serve
        self.clock.advance(61)
        self.expect(ONE, TWO)
        self.expect(ONE)

    def test_a_body_that_breaks_off_is_gone_on_with_elsewhere(self) -> None:
        def cut(request: FakeRequest) -> None:
            response = request.respond(206, None, Content_Range="bytes 100-149/1024")
            response.send(BLOB[100:130])
            response.break_off()

        self.answers[ONE] = cut
        self.assertEqual(BLOB[100:150], self.successResultOf(self.read()))
        self.assertEqual(
            ["bytes=100-149", "bytes=130-149"], [r.headers["range"] for r in self.agent.requests]
        )
        self.assertEqual([ONE, TWO], self.asked())

    def test_one_that_stalls_is_given_up_sooner_where_there_is_another(self) -> None:
        self.answers[ONE] = self.answers[TWO] = lambda request: None
        read = self.read()
        self.clock.advance(5.0)
        self.assertEqual([ONE, TWO], self.asked())
        self.clock.advance(5.0)
        self.assertEqual([OWN], self.asked())
        self.assertEqual(BLOB[100:150], self.successResultOf(read))

    def test_all_are_tried_again_after_a_pause(self) -> None:
        self.answers = dict.fromkeys(self.answers, status(500))
        read = self.read()
        self.assertEqual([ONE, TWO, OWN], self.asked())
        self.assertNoResult(read)
        self.answers[OWN] = self.serve
        self.clock.advance(0.25)
        self.assertEqual([ONE, TWO, OWN], self.asked())
        self.assertEqual(BLOB[100:150], self.successResultOf(read))

    def test_while_all_are_down_the_first_that_is_back_brings_all_reads_on(self) -> None:
        for back in (ONE, TWO, OWN):
            self.setUp()
            self.answers = dict.fromkeys(self.answers, refuse)
            reads = [self.read() for _ in range(5)]
            self.clock.pump([0.1] * 50)
            for read in reads:
                self.assertNoResult(read)
            self.answers[back] = self.serve
            self.clock.pump([0.1] * 10)
            for read in reads:
                self.assertEqual(BLOB[100:150], self.successResultOf(read))

    def test_a_mirror_is_enough_where_the_registry_is_never_reached(self) -> None:
        self.answers = {ONE: status(404), TWO: refuse, OWN: refuse}
        read = self.read()
        self.clock.pump([0.1] * 100)
        self.assertNoResult(read)
        self.answers[TWO] = self.serve
        self.clock.pump([0.1] * 10)
        self.assertEqual(BLOB[100:150], self.successResultOf(read))

    def test_where_none_has_it_the_read_fails_at_once_with_the_registrys_word(self) -> None:
        self.answers = {ONE: status(404), TWO: status(403), OWN: status(404)}
        error = self.failureResultOf(self.read(), BlobUnreadable).value
        self.assertIn(f"{OWN}/v2/a/blobs/", str(error))
        self.assertEqual([ONE, TWO, OWN], self.asked())
        self.answers[TWO] = self.serve
        self.expect(ONE, TWO)

    def test_the_read_ends_in_time_and_names_the_last_cause(self) -> None:
        self.answers = {ONE: status(404), TWO: refuse, OWN: status(503)}
        read = self.read()
        self.clock.pump([0.25] * 410)
        error = self.failureResultOf(read, BlobUnreadable).value
        self.assertIn("within 100 seconds", str(error))
        self.assertEqual([], self.clock.getDelayedCalls())

    def test_a_cancelled_read_waits_for_none(self) -> None:
        self.answers = dict.fromkeys(self.answers, refuse)
        read = self.read()
        self.clock.pump([0.1] * 5)
        read.cancel()
        self.failureResultOf(read, CancelledError)
        self.assertEqual([], self.clock.getDelayedCalls())

    def test_a_cold_cache_that_sends_the_whole_blob_is_passed_over_until_it_has_it(self) -> None:
        blob = bytes(SLICED + 1)
        self.make(blob)
        self.answers[ONE] = lambda request: request.respond(200, None, len(blob))
        self.assertEqual(bytes(50), self.successResultOf(self.read()))
        self.assertEqual([ONE, TWO], self.asked())
        self.clock.advance(6.0)
        self.successResultOf(self.read())
        self.assertEqual([ONE, TWO], self.asked())
        self.answers[ONE] = self.serve
        self.clock.advance(6.0)
        self.successResultOf(self.read())
        self.asked()
        self.successResultOf(self.read())
        self.assertEqual([ONE], self.asked())

    def test_where_all_send_the_whole_blob_it_is_read_as_such(self) -> None:
        blob = bytes(SLICED + 1)
        self.make(blob)
        self.answers = dict.fromkeys(self.answers, lambda request: request.respond(200, None, len(blob)))
        read = self.read()
        self.clock.advance(1.0)
        self.failureResultOf(read, RangesIgnored)
        self.answers = dict.fromkeys(self.answers, lambda request: request.respond(200, blob))
        self.assertEqual(blob, self.successResultOf(self.read(0, len(blob))))

    def test_a_wrong_size_is_no_replica(self) -> None:
        self.answers[ONE] = lambda request: request.respond(
            206, b"x" * 50, Content_Range="bytes 100-149/9999"
        )
        self.expect(ONE, TWO)
        self.expect(TWO)

    def test_the_end_of_the_store_ends_what_is_looked_after(self) -> None:
        hosts = self.hosts()
        descriptor = Descriptor("application/vnd.erofs", Digest.of(BLOB), len(BLOB))
        self.reader = BlobReader(hosts, descriptor, 100.0, Backoff(random=lambda: 1.0))
        self.answers[ONE] = refuse
        self.expect(ONE, TWO)
        self.answers[ONE] = lambda request: None
        self.clock.advance(1.0)
        self.expect(ONE, TWO)
        for host in hosts:
            self.successResultOf(Deferred.fromCoroutine(host.close()))
        self.assertEqual([], self.clock.getDelayedCalls())


class ManifestTests(MirrorTests):
    def setUp(self) -> None:
        super().setUp()
        self.tag = MANIFEST

    def serve(self, request: FakeRequest) -> None:
        selector = request.url.partition("?")[0].rpartition("/")[2]
        named = {"1": self.tag, Digest.of(INDEX): INDEX, Digest.of(MANIFEST): MANIFEST}
        if selector in named:
            document = named[selector]
            request.respond(200, document, Content_Type=OCI_INDEX if document == INDEX else OCI_MANIFEST)
        else:
            request.respond(404)

    def serve_a_page(self, request: FakeRequest) -> None:
        request.respond(200, b"<html>please log in</html>", Content_Type="text/html")

    def serve_too_much(self, request: FakeRequest) -> None:
        request.respond(200, b"{}" * (5 << 20), Content_Type=OCI_MANIFEST)

    def resolve(self, image: str = "r.example/a:1", **how: Any) -> Deferred[Any]:
        return fake_store(self.transport, image, *self.hosts(**how)).resolve(AMD64)

    def test_the_first_is_asked(self) -> None:
        self.assertEqual(Digest.of(MANIFEST), self.successResultOf(self.resolve()).digest)
        self.assertEqual([ONE], self.asked())

    def test_whatever_goes_wrong_the_next_is_asked_at_once(self) -> None:
        for fault in (refuse, status(500), status(404), status(401), self.serve_a_page, self.serve_too_much):
            self.setUp()
            self.answers[ONE] = fault
            self.successResultOf(self.resolve())
            self.assertEqual([ONE, TWO], self.asked())

    def test_a_mirror_that_stalls_costs_a_few_seconds(self) -> None:
        self.answers[ONE] = lambda request: None
        resolving = self.resolve()
        self.clock.advance(5.0)
        self.successResultOf(resolving)
        self.assertEqual([ONE, TWO], self.asked())

    def test_one_that_may_only_pull_is_not_asked_what_a_tag_stands_for(self) -> None:
        self.tag = INDEX
        self.successResultOf(self.resolve(capabilities=PULL))
        self.assertEqual([OWN, ONE], self.asked())

    def test_what_a_digest_names_is_compared_with_it_whoever_sends_it(self) -> None:
        self.answers[ONE] = lambda request: request.respond(200, INDEX, Content_Type=OCI_MANIFEST)
        image = self.successResultOf(self.resolve(f"r.example/a@{Digest.of(MANIFEST)}"))
        self.assertEqual(Digest.of(MANIFEST), image.digest)
        self.assertEqual([ONE, TWO], self.asked())
        self.answers = dict.fromkeys(self.answers, self.answers[ONE])
        self.failureResultOf(self.resolve(f"r.example/a@{Digest.of(MANIFEST)}"), DigestMismatch)

    def test_where_none_has_it_the_registrys_word_counts(self) -> None:
        self.answers = {ONE: refuse, TWO: status(401), OWN: status(404)}
        error = self.failureResultOf(self.resolve(), NotInRegistry).value
        self.assertIn(OWN, str(error))

    def test_one_that_was_down_for_the_manifest_is_passed_over_for_the_rest(self) -> None:
        self.tag = INDEX
        self.answers[ONE] = refuse
        self.successResultOf(self.resolve())
        self.assertEqual([ONE, TWO, TWO], self.asked())

    def test_where_none_may_be_asked_the_file_is_named(self) -> None:
        mirror = fake_mirror(self.transport, ONE, capabilities=PULL)
        store = fake_store(self.transport, "r.example/a:1", mirror)
        error = self.failureResultOf(store.resolve(AMD64), NoHost).value
        self.assertIn("hosts.toml", str(error))

    def test_headers_go_to_their_own_host_only(self) -> None:
        self.answers[ONE] = lambda request: request.respond(307, Location=f"{TWO}/elsewhere")
        self.answers[TWO] = status(404)
        self.successResultOf(self.resolve(headers={"X-Secret": "swordfish"}))
        sent = [(host_of(request), request.headers.get("x-secret")) for request in self.agent.requests]
        self.assertEqual([(ONE, "swordfish"), (TWO, None), (TWO, "swordfish"), (OWN, None)], sent)
