"""Whom a registry's client trusts, what it shows of itself, and what it says of a certificate it refuses.

Both ends of each handshake are in memory.
"""

from __future__ import annotations

import contextlib
import functools
import os
import tempfile
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any
from unittest import mock

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.x509.oid import ExtendedKeyUsageOID
from OpenSSL import SSL
from OpenSSL.crypto import X509
from twisted.internet.interfaces import IOpenSSLClientConnectionCreator
from twisted.internet.testing import MemoryReactorClock
from twisted.logger import LogEvent, globalLogPublisher
from twisted.trial.unittest import SynchronousTestCase
from twisted.web.iweb import IPolicyForHTTPS
from zope.interface.verify import verifyObject

from erofs_twisted.registry.errors import InvalidTLSFile
from erofs_twisted.registry.hosts import FoundHosts, HostSettings
from erofs_twisted.registry.pemfiles import read_authorities, read_client
from erofs_twisted.registry.reference import parse_reference
from erofs_twisted.registry.settings import RegistrySettings
from erofs_twisted.registry.store import open_store
from erofs_twisted.registry.tls import TLSPolicy
from erofs_twisted.registry.tlssettings import Server, TLSSettings
from erofs_twisted.registry.verdict import TRUST_IT, CertificateRefused
from tests.certificates import DAY, HOUR, Authority, issue, make_authority, pem

HOST = "registry.corp.example"


@functools.cache
def authority(name: str = "test authority") -> Authority:
    """One for all tests: its key takes long to make."""
    return make_authority(name)


class Handshake:
    """Between a connection of ours and a server with this certificate, as far as it comes."""

    def __init__(
        self,
        client: SSL.Connection,
        chain: Path,
        key: Path,
        accepts: Sequence[Authority] = (),
        version: int = SSL.TLS1_3_VERSION,
    ) -> None:
        context = SSL.Context(SSL.TLS_SERVER_METHOD)
        context.set_max_proto_version(version)
        context.use_certificate_chain_file(str(chain))
        context.use_privatekey_file(str(key))
        if accepts:
            self._accept(context, accepts)
        self.server_name: bytes | None = None
        context.set_tlsext_servername_callback(self._note_server_name)
        self.client, self.server = client, SSL.Connection(context, None)
        client.set_connect_state()
        self.server.set_accept_state()
        self.refusal = self._shake()

    @property
    def shown(self) -> list[str]:
        """The subjects of the first two certificates that the client has shown."""
        own = self.server.get_peer_certificate(as_cryptography=True)
        others = self.server.get_peer_cert_chain(as_cryptography=True) or []
        return [] if own is None else [c.subject.rfc4514_string() for c in (own, *others[:1])]

    @staticmethod
    def _accept(context: SSL.Context, accepts: Sequence[Authority]) -> None:
        store = context.get_cert_store()
        assert store is not None
        with tempfile.NamedTemporaryFile() as file:
            for _, certificate in accepts:
                store.add_cert(X509.from_cryptography(certificate))
                file.write(pem(certificate))
            file.flush()
            context.load_client_ca(os.fsencode(file.name))
        context.set_verify(SSL.VERIFY_PEER, lambda *_: True)

    def _note_server_name(self, connection: SSL.Connection) -> None:
        self.server_name = connection.get_servername()

    def _shake(self) -> SSL.Error | None:
        """The error of the client's side, if there is one."""
        for _ in range(4):
            for end, other in ((self.client, self.server), (self.server, self.client)):
                try:
                    end.do_handshake()
                except SSL.WantReadError:
                    pass
                except SSL.Error as error:
                    if end is self.client:
                        return error
                with contextlib.suppress(SSL.WantReadError):
                    other.bio_write(end.bio_read(1 << 16))
        return None


class TLSTestCase(SynchronousTestCase):
    def directory(self) -> Path:
        path = Path(self.mktemp()).absolute()
        path.mkdir(parents=True)
        return path

    def file(self, *authorities: Authority) -> str:
        path = self.directory() / "ca.pem"
        path.write_bytes(b"".join(pem(certificate) for _, certificate in authorities))
        return str(path)

    def client_pair(self, name: str, by: Authority, between: Sequence[Authority] = ()) -> tuple[str, str]:
        chain, key = issue(by, [], self.directory(), common=name, between=between)
        return str(chain), str(key)

    def policy(self, *trusted: Authority, own: frozenset[Server] = frozenset(), **more: object) -> TLSPolicy:
        files = (self.file(*trusted),) if trusted else ()
        return TLSPolicy(TLSSettings(authorities=files, **more), own)  # type: ignore[arg-type]

    def refusal(self, handshake: Handshake) -> str:
        assert isinstance(handshake.refusal, CertificateRefused), handshake.refusal
        return handshake.refusal.reason


class IdentityTests(TLSTestCase):
    """What a certificate by a trusted authority stands for."""

    def setUp(self) -> None:
        self.trusting = self.policy(authority())

    def meet(self, host: str, *certified: str) -> Handshake:
        chain, key = issue(authority(), certified, self.directory(), common="a server")
        return Handshake(self.trusting.connection_to((host, 443)), chain, key)

    def test_a_certified_host_is_taken(self) -> None:
        for host, certified in (
            (HOST, HOST),
            (HOST, "Registry.Corp.EXAMPLE"),
            (f"{HOST}.", HOST),
            (HOST, "*.corp.example"),
            ("xn--bcher-kva.example", "xn--bcher-kva.example"),
            ("192.0.2.7", "192.0.2.7"),
            ("2001:db8::7", "2001:db8::7"),
            ("2001:db8:0:0::7", "2001:db8::7"),
        ):
            with self.subTest(host=host, certified=certified):
                self.assertIsNone(self.meet(host, certified).refusal)

    def test_another_host_is_refused_with_both_names(self) -> None:
        for host, certified in (
            (HOST, "other.example"),
            (HOST, "corp.example"),
            (f"a.{HOST}", "*.corp.example"),
            ("corp.example", "*.corp.example"),
            (HOST, "*.example"),
            ("xn--bcher-kva.corp.example", "*.corp.example"),
            (HOST, "192.0.2.7"),
            ("192.0.2.7", "192.0.2.8"),
            ("192.0.2.7", HOST),
            ("2001:db8::7", "2001:db8::8"),
        ):
            with self.subTest(host=host, certified=certified):
                self.assertEqual(
                    f"the server's certificate is for {certified}, not for {host}",
                    self.refusal(self.meet(host, certified)),
                )

    def test_of_many_names_some_are_listed(self) -> None:
        said = self.refusal(self.meet(HOST, *(f"{'x' * 50}.{n}.example" for n in range(90))))
        self.assertIn(f"{'x' * 50}.4.example and 85 more, not for", said)
        self.assertNotIn(".5.example", said)

    def test_a_common_name_alone_stands_for_no_host(self) -> None:
        chain, key = issue(authority(), [], self.directory(), common=HOST)
        said = self.refusal(Handshake(self.trusting.connection_to((HOST, 443)), chain, key))
        self.assertIn("no subject alternative names", said)
        self.assertIn(f"'CN={HOST}'", said)

    def test_a_name_that_is_none_does_not_spoil_the_others(self) -> None:
        names = [x509.DNSName("192.0.2.7"), x509.DNSName(HOST)]
        with mock.patch("tests.certificates._host", lambda host: names.pop()):
            self.assertIsNone(self.meet(HOST, "1", "2").refusal)

    def test_a_host_that_no_certificate_can_name_is_refused(self) -> None:
        self.assertIn("no host's name", self.refusal(self.meet("12345", HOST)))

    def test_a_name_is_sent_to_the_server_and_an_address_is_not(self) -> None:
        self.assertEqual(HOST.encode(), self.meet(HOST, HOST).server_name)
        self.assertEqual(HOST.encode(), self.meet(f"{HOST}.", HOST).server_name)
        self.assertIsNone(self.meet("192.0.2.7", "192.0.2.7").server_name)
        self.assertIsNone(self.meet("2001:db8::7", "2001:db8::7").server_name)


class ChainTests(TLSTestCase):
    """Which certificates are trusted, and what is said of the others."""

    def meet(self, policy: TLSPolicy, certificate: tuple[Path, Path]) -> Handshake:
        return Handshake(policy.connection_to((HOST, 443)), *certificate)

    def issue(self, by: Authority | None, **how: object) -> tuple[Path, Path]:
        return issue(by, [HOST], self.directory(), **how)  # type: ignore[arg-type]

    def test_an_authority_that_is_unknown_is_named_with_the_cures(self) -> None:
        said = self.refusal(self.meet(self.policy(), self.issue(authority())))
        self.assertIn("issued by 'CN=test authority', an authority that is neither trusted", said)
        self.assertLess(said.index("--tls-ca"), said.index("SSL_CERT_FILE"))
        self.assertIn("ca.crt", said)

    def test_one_that_is_sent_along_is_no_better(self) -> None:
        said = self.refusal(self.meet(self.policy(), self.issue(authority(), between=[authority()])))
        self.assertIn("comes from the authority 'CN=test authority', not trusted here", said)

    def test_a_self_signed_certificate_is_called_so(self) -> None:
        said = self.refusal(self.meet(self.policy(), self.issue(None)))
        self.assertIn(f"'CN={HOST}', is self-signed", said)
        self.assertIn("--tls-ca", said)

    def test_a_self_signed_certificate_can_be_trusted_itself(self) -> None:
        certificate = self.issue(None)
        policy = TLSPolicy(TLSSettings(authorities=(str(certificate[0]),)))
        self.assertIsNone(self.meet(policy, certificate).refusal)

    def test_every_file_and_every_certificate_in_it_counts(self) -> None:
        others = [authority("another"), authority("third")]
        files = (self.file(others[0], authority()), self.file(others[1]))
        policy = TLSPolicy(TLSSettings(authorities=files))
        for by in (authority(), *others):
            self.assertIsNone(self.meet(policy, self.issue(by)).refusal)

    def test_the_environment_names_the_systems_authorities(self) -> None:
        with mock.patch.dict(os.environ, SSL_CERT_FILE=self.file(authority())):
            policy = self.policy(authority("another"))
            self.assertIsNone(self.meet(policy, self.issue(authority())).refusal)
            self.assertIsNone(self.meet(policy, self.issue(authority("another"))).refusal)

    def test_a_system_without_authorities_is_named_as_the_cause(self) -> None:
        with mock.patch.dict(os.environ, SSL_CERT_FILE="/nowhere/ca.pem"):
            said = self.refusal(self.meet(TLSPolicy(), self.issue(authority())))
            self.assertIn(
                "SSL_CERT_FILE in the environment names '/nowhere/ca.pem', which cannot be read", said
            )
        with (
            mock.patch("erofs_twisted.registry.tls._SYSTEM_BUNDLES", ("/nowhere/bundle.pem",)),
            mock.patch.dict(os.environ),
        ):
            os.environ.pop("SSL_CERT_FILE", None)
            os.environ.pop("SSL_CERT_DIR", None)
            said = self.refusal(self.meet(TLSPolicy(), self.issue(authority())))
            self.assertIn("ca-certificates, is missing", said)
        with mock.patch.dict(os.environ, SSL_CERT_FILE=self.file(authority("another"))):
            said = self.refusal(self.meet(TLSPolicy(), self.issue(authority())))
            self.assertTrue(said.endswith(TRUST_IT), said)

    def test_an_authority_in_between_is_sent_by_the_server_or_missed(self) -> None:
        between = make_authority("in between", authority())
        policy = self.policy(authority())
        self.assertIsNone(self.meet(policy, self.issue(between, between=[between])).refusal)
        said = self.refusal(self.meet(policy, self.issue(between)))
        self.assertIn("issued by 'CN=in between'", said)
        self.assertIn("nor sent along", said)

    def test_an_authority_in_between_can_be_trusted_without_the_one_above(self) -> None:
        between = make_authority("in between", authority())
        self.assertIsNone(self.meet(self.policy(between), self.issue(between)).refusal)
        self.refusal(self.meet(self.policy(between), self.issue(authority())))

    def test_an_expired_certificate_is_refused_with_its_date(self) -> None:
        certificate = self.issue(authority(), valid=(-2 * DAY, -HOUR))
        said = self.refusal(self.meet(self.policy(authority()), certificate))
        self.assertRegex(said, r"^the server's certificate expired on \d{4}-\d\d-\d\d \d\d:\d\d UTC")
        self.assertIn("by the clock of this machine it is", said)

    def test_a_certificate_of_the_future_makes_the_clock_suspect(self) -> None:
        certificate = self.issue(authority(), valid=(DAY, 2 * DAY))
        said = self.refusal(self.meet(self.policy(authority()), certificate))
        self.assertRegex(said, r"is not valid before \d{4}-\d\d-\d\d \d\d:\d\d UTC")
        self.assertIn("is the clock right?", said)

    def test_an_authority_that_expired_is_named(self) -> None:
        old = make_authority("old", authority(), valid=(timedelta(days=-3), -HOUR))
        said = self.refusal(self.meet(self.policy(authority()), self.issue(old, between=[old])))
        self.assertIn("the certificate of the authority 'CN=old' expired", said)

    def test_a_signature_by_who_is_no_authority_does_not_count(self) -> None:
        fake = make_authority("fake", authority(), is_authority=False)
        said = self.refusal(self.meet(self.policy(authority()), self.issue(fake, between=[fake])))
        self.assertIn("signed by 'CN=fake', whose own certificate is not that of an authority", said)

    def test_a_certificate_for_clients_is_no_servers(self) -> None:
        certificate = self.issue(authority(), purpose=ExtendedKeyUsageOID.CLIENT_AUTH)
        said = self.refusal(self.meet(self.policy(authority()), certificate))
        self.assertIn("not meant for servers", said)
        certificate = self.issue(authority(), purpose=ExtendedKeyUsageOID.SERVER_AUTH)
        self.assertIsNone(self.meet(self.policy(authority()), certificate).refusal)

    def test_an_authority_certifies_no_names_but_those_that_it_may(self) -> None:
        for permitted, is_taken in (("example", True), ("elsewhere.example", False)):
            by = make_authority("limited", permitted=[permitted])
            handshake = self.meet(self.policy(by), self.issue(by))
            if is_taken:
                self.assertIsNone(handshake.refusal)
            else:
                self.assertIn("may not certify it", self.refusal(handshake))

    def test_an_impostor_of_a_trusted_authority_is_refused(self) -> None:
        impostor = make_authority("test authority")
        said = self.refusal(self.meet(self.policy(authority()), self.issue(impostor)))
        self.assertIn("signature of the server's certificate", said)

    def test_what_a_stranger_wrote_is_one_short_line(self) -> None:
        long = make_authority("two\nlines\x1b[31m" + "x" * 50)
        said = self.refusal(self.meet(self.policy(), self.issue(long)))
        self.assertTrue(said.isprintable(), said)

    def test_no_version_before_1_2_is_spoken_however_lax_the_system_is(self) -> None:
        lax = b"ALL:@SECLEVEL=0"

        class LaxContext(SSL.Context):
            def __init__(self, method: int) -> None:
                super().__init__(method)
                self.set_cipher_list(lax)
                self.set_min_proto_version(SSL.TLS1_VERSION)

        self.patch(SSL, "Context", LaxContext)
        certificate = self.issue(authority())
        for version, is_spoken in ((SSL.TLS1_1_VERSION, False), (SSL.TLS1_2_VERSION, True)):
            connection = self.policy(authority()).connection_to((HOST, 443))
            refusal = Handshake(connection, *certificate, version=version).refusal
            self.assertEqual(is_spoken, refusal is None, refusal)


class UnverifiedTests(TLSTestCase):
    def meet(self, policy: TLSPolicy, host: str, port: int) -> Handshake:
        chain, key = issue(None, ["other.example"], self.directory(), valid=(-DAY, -HOUR))
        return Handshake(policy.connection_to((host, port)), chain, key)

    def test_only_the_host_and_port_that_are_named_are_not_verified(self) -> None:
        policy = self.policy(unverified=frozenset({(HOST, 5000)}))
        self.assertIsNone(self.meet(policy, HOST, 5000).refusal)
        for host, port in ((HOST, 443), (f"a.{HOST}", 5000), ("corp.example", 5000)):
            self.refusal(self.meet(policy, host, port))

    def test_an_address_is_the_same_however_it_is_spelt(self) -> None:
        policy = self.policy(unverified=frozenset({("2001:db8::7", 443)}))
        chain, key = issue(None, ["other.example"], self.directory())
        for spelling in (b"2001:db8::7", b"2001:DB8:0:0::7", b"[2001:db8::7]"):
            connection = policy.creatorForNetloc(spelling, 443).clientConnectionForTLS(None)
            self.assertIsNone(Handshake(connection, chain, key).refusal)

    def test_each_of_them_is_warned_of_at_the_start(self) -> None:
        events: list[LogEvent] = []
        globalLogPublisher.addObserver(events.append)
        self.addCleanup(globalLogPublisher.removeObserver, events.append)
        reference = parse_reference("registry.example/app")
        nothing: Any = None
        settings = TLSSettings(unverified=frozenset({(HOST, 443), ("::1", 5000)}))
        mirror = HostSettings(authority="m.example:5000", scheme="https", skip_verify=True, is_mirror=True)
        hosts = FoundHosts((mirror, HostSettings(authority="registry.example")))
        open_store(MemoryReactorClock(), reference, RegistrySettings(tls=settings, hosts=hosts), pool=nothing)
        texts = [event["text"] for event in events if event["log_level"].name == "warn"]
        self.assertEqual(3, len(texts))
        self.assertIn("[::1]:5000 is not verified", texts[0])
        self.assertIn("m.example:5000 is not verified", texts[1])
        self.assertIn(f"{HOST}:443 is not verified", texts[2])


class ClientCertificateTests(TLSTestCase):
    """What is shown to a server that asks."""

    own = frozenset({(HOST, 443)})

    def meet(
        self, policy: TLSPolicy, accepts: Sequence[Authority], server: Server = (HOST, 443), version: int = 0
    ) -> Handshake:
        chain, key = issue(authority(), [server[0]], self.directory())
        connection = policy.connection_to(server)
        handshake = Handshake(connection, chain, key, accepts, version or SSL.TLS1_3_VERSION)
        self.assertIsNone(handshake.refusal)
        return handshake

    def test_the_registry_is_shown_the_certificate_with_its_chain(self) -> None:
        between = make_authority("in between", authority())
        pair = self.client_pair("me", between, between=[between])
        policy = self.policy(authority(), own=self.own, clients=(pair,))
        self.assertEqual(["CN=me", "CN=in between"], self.meet(policy, [authority()]).shown)

    def test_nobody_else_is_shown_it(self) -> None:
        pair = self.client_pair("me", authority())
        policy = self.policy(authority(), own=self.own, clients=(pair,))
        for server in (("cdn.example", 443), (HOST, 5000)):
            self.assertEqual([], self.meet(policy, [authority()], server).shown[:1])

    def test_an_unverified_registry_is_shown_it_too(self) -> None:
        pair = self.client_pair("me", authority())
        policy = self.policy(own=self.own, clients=(pair,), unverified=self.own)
        self.assertEqual(["CN=me"], self.meet(policy, [authority()]).shown[:1])

    def test_of_several_the_one_is_shown_that_the_server_accepts(self) -> None:
        others = [authority("another"), authority("third")]
        pairs = tuple(self.client_pair(f"by {n}", by) for n, by in enumerate((authority(), *others)))
        policy = self.policy(authority(), own=self.own, clients=pairs)
        for version in (SSL.TLS1_2_VERSION, SSL.TLS1_3_VERSION):
            for number, by in enumerate((authority(), *others)):
                self.assertEqual([f"CN=by {number}"], self.meet(policy, [by], version=version).shown[:1])

    def test_where_none_is_accepted_the_first_is_shown(self) -> None:
        pairs = (self.client_pair("first", authority()), self.client_pair("second", authority("another")))
        policy = self.policy(authority(), own=self.own, clients=pairs)
        self.assertEqual(["CN=first"], self.meet(policy, [authority("third")]).shown[:1])

    def test_a_key_may_be_in_the_file_of_its_certificate(self) -> None:
        chain, key = map(Path, self.client_pair("me", authority()))
        chain.write_bytes(chain.read_bytes() + key.read_bytes())
        policy = self.policy(authority(), own=self.own, clients=((str(chain), str(chain)),))
        self.assertEqual(["CN=me"], self.meet(policy, [authority()]).shown[:1])

    def test_a_certificate_that_openssl_finds_too_weak_is_named(self) -> None:
        with mock.patch(
            "tests.certificates.generate_ec_key", lambda _: rsa.generate_private_key(65537, 1024)
        ):
            pair = self.client_pair("weak", authority())
        error = self.assertRaises(InvalidTLSFile, self.policy, own=self.own, clients=(pair,))
        self.assertIn(pair[0], str(error))
        self.assertIn("too small", str(error))


class RotationTests(TLSTestCase):
    """Files are replaced under a policy that goes on."""

    def setUp(self) -> None:
        self.events: list[LogEvent] = []
        globalLogPublisher.addObserver(self.events.append)
        self.addCleanup(globalLogPublisher.removeObserver, self.events.append)
        self.ca = Path(self.file(authority()))

    @property
    def warnings(self) -> list[str]:
        return [event["text"] for event in self.events if event["log_level"].name == "warn"]

    def is_trusted(self, policy: TLSPolicy, by: Authority) -> bool:
        chain, key = issue(by, [HOST], self.directory())
        creator = policy.creatorForNetloc(HOST.encode(), 443)
        return Handshake(creator.clientConnectionForTLS(None), chain, key).refusal is None

    def test_another_authority_counts_from_the_next_connection_on(self) -> None:
        policy = TLSPolicy(TLSSettings(authorities=(str(self.ca),)))
        creator = policy.creatorForNetloc(HOST.encode(), 443)
        self.assertTrue(self.is_trusted(policy, authority()))
        other = Path(self.file(authority("another")))
        other.rename(self.ca)
        chain, key = issue(authority("another"), [HOST], self.directory())
        self.assertIsNone(Handshake(creator.clientConnectionForTLS(None), chain, key).refusal)
        self.assertFalse(self.is_trusted(policy, authority()))
        self.assertEqual([], self.warnings)

    def test_a_broken_file_counts_as_it_was_with_one_warning(self) -> None:
        policy = TLSPolicy(TLSSettings(authorities=(str(self.ca),)))
        self.ca.write_bytes(b"-----BEGIN CERTIFICATE-----\nAAA")
        for _ in range(3):
            self.assertTrue(self.is_trusted(policy, authority()))
        (warning,) = self.warnings
        self.assertIn(str(self.ca), warning)
        self.assertIn("still counts", warning)

    def test_so_does_one_that_has_gone_until_it_is_back(self) -> None:
        policy = TLSPolicy(TLSSettings(authorities=(str(self.ca),)))
        self.ca.unlink()
        for _ in range(3):
            self.assertTrue(self.is_trusted(policy, authority()))
        self.assertEqual(1, len(self.warnings))
        self.ca.write_bytes(pem(authority("another")[1]))
        self.assertTrue(self.is_trusted(policy, authority("another")))
        self.assertEqual(1, len(self.warnings))

    def test_the_systems_authorities_are_followed_too(self) -> None:
        with mock.patch.dict(os.environ, SSL_CERT_FILE=str(self.ca)):
            policy = TLSPolicy()
            self.assertTrue(self.is_trusted(policy, authority()))
            self.ca.write_bytes(pem(authority("another")[1]))
            self.assertTrue(self.is_trusted(policy, authority("another")))

    def test_a_client_pair_is_replaced_once_both_its_files_are(self) -> None:
        chain, key = map(Path, self.client_pair("old", authority()))
        own = frozenset({(HOST, 443)})
        settings = TLSSettings(authorities=(str(self.ca),), clients=((str(chain), str(key)),))
        policy = TLSPolicy(settings, own)
        new_chain, new_key = map(Path, self.client_pair("new", authority()))
        server = issue(authority(), [HOST], self.directory())

        def shown() -> list[str]:
            return Handshake(policy.connection_to((HOST, 443)), *server, accepts=[authority()]).shown[:1]

        self.assertEqual(["CN=old"], shown())
        new_chain.rename(chain)
        self.assertEqual(["CN=old"], shown())
        (warning,) = self.warnings
        self.assertIn("does not belong to the certificate", warning)
        new_key.rename(key)
        self.assertEqual(["CN=new"], shown())

    def test_files_that_do_not_change_are_read_once(self) -> None:
        with mock.patch("erofs_twisted.registry.tls.read_authorities", side_effect=read_authorities) as read:
            policy = TLSPolicy(TLSSettings(authorities=(str(self.ca),)))
            first = policy.connection_to((HOST, 443))
            again = policy.connection_to(("other.example", 443))
        self.assertEqual(1, read.call_count)
        self.assertIs(first.get_context(), again.get_context())


class FirstLoadTests(TLSTestCase):
    def test_a_file_that_cannot_be_used_is_named_at_once(self) -> None:
        chain, key = self.client_pair("me", authority())
        for settings, path in (
            (TLSSettings(authorities=("/nowhere/ca.pem",)), "/nowhere/ca.pem: No such file"),
            (TLSSettings(clients=((chain, "/nowhere/key"),)), "/nowhere/key: No such file"),
            (TLSSettings(clients=((self.file(authority()), key),)), f"{key}: the key does not belong"),
        ):
            error = self.assertRaises(InvalidTLSFile, TLSPolicy, settings)
            self.assertTrue(str(error).startswith(path), error)

    def test_no_key_gets_into_a_message_or_a_repr(self) -> None:
        chain, path = self.client_pair("me", authority())
        secret = Path(path).read_text().splitlines()[1]
        self.assertNotIn(secret, repr(read_client(chain, path)))
        other, _ = self.client_pair("other", authority())
        error = self.assertRaises(InvalidTLSFile, self.policy, clients=((other, path),))
        self.assertNotIn(secret, str(error))

    def test_the_policy_is_what_twisted_asks_for(self) -> None:
        policy = TLSPolicy()
        self.assertTrue(verifyObject(IPolicyForHTTPS, policy))
        creator = policy.creatorForNetloc(b"registry.example", 443)
        self.assertTrue(verifyObject(IOpenSSLClientConnectionCreator, creator))
