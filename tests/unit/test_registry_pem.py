"""Files of certificates and keys: what is in them, and what is wrong with them."""

from __future__ import annotations

import os
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric import dsa, ec, ed25519, rsa
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_pem_private_key,
)
from hypothesis import given
from hypothesis import strategies as st
from twisted.trial.unittest import SynchronousTestCase

from erofs_twisted.registry import pem, pemfiles
from erofs_twisted.registry.errors import InvalidTLSFile
from erofs_twisted.registry.pemfiles import Watched, read_authorities, read_client, signature
from tests.certificates import issue, make_authority
from tests.certificates import pem as pem_of

AUTHORITY = make_authority("test authority")
CERTIFICATE = pem_of(AUTHORITY[1])


class PEMTestCase(SynchronousTestCase):
    def file(self, content: bytes) -> str:
        path = Path(self.mktemp()).absolute()
        path.write_bytes(content)
        return str(path)

    def pair(self) -> tuple[bytes, bytes]:
        chain, key = issue(AUTHORITY, ["a.example"], Path(self.mktemp()))
        return chain.read_bytes(), key.read_bytes()

    def refuses(self, *contents: bytes | str) -> str:
        """What is said of a file of authorities, or of a pair, without the path that it begins with."""
        paths = [content if isinstance(content, str) else self.file(content) for content in contents]
        if len(paths) == 1:
            said = str(self.assertRaises(InvalidTLSFile, read_authorities, paths[0]))
        else:
            said = str(self.assertRaises(InvalidTLSFile, read_client, *paths))
        path = next(path for path in paths if said.startswith(f"{path}: "))
        return said.removeprefix(f"{path}: ")


class AuthoritiesTests(PEMTestCase):
    def test_every_certificate_is_read_and_all_else_passed_over(self) -> None:
        content = b"# CN=a\r\n\xff" + CERTIFICATE + b"text between\n" + CERTIFICATE.replace(b"\n", b"\r\n")
        self.assertEqual((AUTHORITY[1],) * 2, read_authorities(self.file(content)))

    def test_a_file_that_is_out_of_reach_is_named_with_the_reason(self) -> None:
        self.assertEqual("No such file or directory", self.refuses("/nowhere/ca.pem"))
        self.assertEqual("Is a directory", self.refuses(os.getcwd()))
        self.assertIn("not a file", self.refuses("/dev/null"))
        fifo = str(Path(self.mktemp()).absolute())
        os.mkfifo(fifo)
        self.assertIn("not a file", self.refuses(fifo))

    def test_a_file_that_may_not_be_read_is_named_with_the_reason(self) -> None:
        def refuse(path: str, flags: int) -> int:
            raise PermissionError(13, "Permission denied", path)

        path = self.file(CERTIFICATE)
        self.patch(pemfiles.os, "open", refuse)
        self.assertEqual("Permission denied", self.refuses(path))

    def test_a_file_without_a_certificate_is_refused(self) -> None:
        for content in (b"", b"hello", self.pair()[1]):
            self.assertIn("no PEM certificate", self.refuses(content))

    def test_a_certificate_in_der_comes_with_the_cure(self) -> None:
        self.assertIn("openssl x509 -inform der", self.refuses(AUTHORITY[1].public_bytes(Encoding.DER)))

    def test_a_damaged_certificate_is_refused(self) -> None:
        for content in (
            CERTIFICATE[:200],
            CERTIFICATE.replace(b"MII", b"MMI"),
            CERTIFICATE + CERTIFICATE[:99],
        ):
            self.assertIn("a certificate in it is damaged", self.refuses(content))

    def test_a_file_that_is_far_too_large_is_refused(self) -> None:
        for module in (pem, pemfiles):
            self.patch(module, "MAX_PEM", len(CERTIFICATE) - 1)
        self.assertIn("larger than", self.refuses(CERTIFICATE))

    @given(
        st.binary(max_size=200)
        | st.binary(max_size=200).map(lambda b: CERTIFICATE[:60] + b + CERTIFICATE[60:])
    )
    def test_no_content_raises_anything_but_the_error_of_the_file(self, content: bytes) -> None:
        path = self.file(content)
        for read in (lambda: read_authorities(path), lambda: read_client(path, path)):
            try:
                read()
            except InvalidTLSFile as error:
                self.assertTrue(str(error).startswith(path))

    @given(st.text(max_size=20))
    def test_no_path_raises_anything_but_that(self, path: str) -> None:
        self.assertRaises(InvalidTLSFile, read_authorities, f"/nowhere/{path}")
        self.assertIsNone(signature(f"/nowhere/{path}"))


class ClientTests(PEMTestCase):
    def test_a_pair_is_a_chain_and_its_key(self) -> None:
        chain, key = self.pair()
        pair = read_client(self.file(chain + CERTIFICATE), self.file(key))
        self.assertEqual(2, len(pair.chain))
        self.assertEqual(pair.chain[0].public_key(), pair.key.public_key())
        self.assertEqual({AUTHORITY[1].subject}, pair.issuers)

    def test_one_file_may_hold_both_in_any_order(self) -> None:
        chain, key = self.pair()
        parameters = b"-----BEGIN EC PARAMETERS-----\nBggqhkjOPQMBBw==\n-----END EC PARAMETERS-----\n"
        for content in (chain + key, key + chain, chain + parameters + key):
            path = self.file(content)
            self.assertEqual(1, len(read_client(path, path).chain))

    def test_keys_may_have_their_old_form(self) -> None:
        chain, key = self.pair()
        old = load_pem_private_key(key, None).private_bytes(
            Encoding.PEM, PrivateFormat.TraditionalOpenSSL, NoEncryption()
        )
        self.assertIn(b"BEGIN EC PRIVATE KEY", old)
        read_client(self.file(chain), self.file(old))

    def test_the_key_of_another_certificate_is_refused(self) -> None:
        chain, _ = self.pair()
        _, key = self.pair()
        self.assertIn("does not belong to the certificate in", self.refuses(chain, key))
        self.assertIn("the first one there", self.refuses(CERTIFICATE + chain, key))
        for other in (rsa.generate_private_key(65537, 1024), ed25519.Ed25519PrivateKey.generate()):
            self.assertIn("does not belong", self.refuses(chain, self.pem_key(other)))

    def test_an_encrypted_key_comes_with_the_cure(self) -> None:
        chain, _ = self.pair()
        key = ec.generate_private_key(ec.SECP256R1())
        for form in (PrivateFormat.PKCS8, PrivateFormat.TraditionalOpenSSL):
            content = key.private_bytes(Encoding.PEM, form, BestAvailableEncryption(b"secret"))
            self.assertIn("openssl pkey", self.refuses(chain, content))

    def test_what_is_no_key_is_refused(self) -> None:
        chain, key = self.pair()
        self.assertIn("no PEM private key", self.refuses(chain, chain))
        self.assertIn("damaged", self.refuses(chain, key[:100] + b"\n-----END PRIVATE KEY-----\n"))
        self.assertIn("no PEM certificate", self.refuses(key, key))
        self.assertIn("no use for", self.refuses(chain, self.pem_key(dsa.generate_private_key(2048))))

    def pem_key(self, key: rsa.RSAPrivateKey | ed25519.Ed25519PrivateKey | dsa.DSAPrivateKey) -> bytes:
        return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())


class WatchedTests(PEMTestCase):
    def setUp(self) -> None:
        self.path = self.file(b"1")
        self.warnings: list[str] = []
        self.watched = Watched((self.path,), self.make, self.warnings.append)

    def make(self) -> int:
        try:
            return int(Path(self.path).read_bytes())
        except (OSError, ValueError) as error:
            raise InvalidTLSFile(self.path) from error

    def test_what_does_not_change_is_made_once(self) -> None:
        self.assertFalse(self.watched.refresh())
        self.assertEqual(1, self.watched.value)

    def test_what_changes_is_made_anew(self) -> None:
        Path(self.path).write_bytes(b"22")
        self.assertTrue(self.watched.refresh())
        self.assertEqual(22, self.watched.value)
        self.assertFalse(self.watched.refresh())

    def test_a_file_put_in_its_place_is_seen_whatever_its_size_and_time(self) -> None:
        before = os.stat(self.path)
        other = self.file(b"2")
        os.utime(other, ns=(before.st_atime_ns, before.st_mtime_ns))
        os.rename(other, self.path)
        self.assertTrue(self.watched.refresh())
        self.assertEqual(2, self.watched.value)

    def test_what_breaks_keeps_its_value_and_warns_once(self) -> None:
        for content in (b"broken", b"more broken"):
            Path(self.path).write_bytes(content)
            self.assertFalse(self.watched.refresh())
            self.assertFalse(self.watched.refresh())
        self.assertEqual((1, 2), (self.watched.value, len(self.warnings)))

    def test_what_cannot_be_made_the_first_time_is_an_error(self) -> None:
        Path(self.path).unlink()
        self.assertRaises(InvalidTLSFile, Watched, (self.path,), self.make, self.warnings.append)
        self.assertEqual([], self.warnings)
