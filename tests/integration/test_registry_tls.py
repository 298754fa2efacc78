"""TLS to a registry whose certificate is by an authority of our own."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any
from unittest import mock

from twisted.internet import reactor
from twisted.internet.ssl import Certificate, trustRootFromCertificates
from twisted.trial.unittest import TestCase

from erofs_twisted.registry.errors import TransferFailed
from erofs_twisted.registry.platform import Platform
from erofs_twisted.registry.reference import parse_reference
from erofs_twisted.registry.store import open_store
from tests.certificates import issue, make_authority, pem
from tests.images import EROFS, Layout, push
from tests.servers import DockerRegistry, Nginx

CONTENT = os.urandom(300_000)
AMD64 = Platform.parse("linux/amd64")


class TLSTests(TestCase):
    timeout = 60

    def setUp(self) -> None:
        self.authority = make_authority("test authority")
        self.trust_root = trustRootFromCertificates([Certificate.loadPEM(pem(self.authority[1]))])

    def serve(self, *hosts: str) -> DockerRegistry:
        """A registry with one image, that speaks TLS as ``hosts``."""
        layout = Layout(Path(self.mktemp()).absolute())
        entry = layout.manifest([layout.blob(CONTENT, EROFS)])
        plain = self.enterContext(DockerRegistry())
        push(layout, entry, plain.url, "a:1")
        front = self.enterContext(DockerRegistry(certificate=self.make_certificate(*hosts)))
        plain.stop()
        (front.directory / "storage").symlink_to(plain.directory / "storage")
        return front

    def open(self, name: str, **how: Any) -> Any:
        no_pool: Any = None
        store = open_store(reactor, parse_reference(name), pool=no_pool, **how)
        self.addCleanup(store.close)
        return store

    async def check(self, name: str, **how: Any) -> None:
        store = self.open(name, **how)
        image = await store.resolve(AMD64)
        got: list[bytes] = []
        await store.blob(image.layers[0]).read(1000, 200_000, got.append)
        self.assertEqual(CONTENT[1000:201_000], b"".join(got))

    async def refusal(self, name: str, **how: Any) -> str:
        return str(await self.assertFailure(self.open(name, **how).resolve(AMD64), TransferFailed))

    async def test_a_registry_on_this_machine_that_wants_tls_gets_it(self) -> None:
        registry = self.serve("localhost")
        await self.check(f"localhost:{registry.port}/a:1", trust_root=self.trust_root)

    async def test_an_address_can_be_certified_too(self) -> None:
        registry = self.serve("127.0.0.1")
        await self.check(f"127.0.0.1:{registry.port}/a:1", trust_root=self.trust_root)

    async def test_the_authority_can_be_named_by_the_environment(self) -> None:
        registry = self.serve("localhost")
        with tempfile.NamedTemporaryFile() as file:
            file.write(pem(self.authority[1]))
            file.flush()
            with mock.patch.dict(os.environ, SSL_CERT_FILE=file.name):
                await self.check(f"localhost:{registry.port}/a:1")

    async def test_an_unknown_authority_is_refused_at_once_with_the_cure(self) -> None:
        registry = self.serve("localhost")
        said = await self.refusal(f"localhost:{registry.port}/a:1")
        self.assertIn("SSL_CERT_FILE", said)

    async def test_the_certificate_of_another_host_is_refused(self) -> None:
        registry = self.serve("registry.example")
        said = await self.refusal(f"localhost:{registry.port}/a:1", trust_root=self.trust_root)
        self.assertIn("another host", said)

    def make_certificate(self, *hosts: str) -> tuple[Path, Path]:
        directory = Path(self.mktemp()).absolute()
        directory.mkdir()
        return issue(self.authority, list(hosts), directory)

    async def test_a_redirect_out_of_tls_is_refused(self) -> None:
        certificate = self.make_certificate("localhost")
        front = self.enterContext(Nginx("location / { return 307 http://127.0.0.1:1/x; }", tls=certificate))
        said = await self.refusal(f"localhost:{front.port}/a:1", trust_root=self.trust_root)
        self.assertIn("--plain-http", said)
