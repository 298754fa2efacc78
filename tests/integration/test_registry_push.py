"""Pushing to docker-registry: what arrives, who may, and what it costs."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import attrs
from twisted.internet import reactor
from twisted.internet.defer import Deferred
from twisted.internet.task import deferLater
from twisted.internet.threads import deferToThread
from twisted.python.threadpool import ThreadPool
from twisted.trial.unittest import TestCase

from erofs_twisted.registry.content import FileContent, sender
from erofs_twisted.registry.credentials import Credentials
from erofs_twisted.registry.digest import Digest
from erofs_twisted.registry.errors import AccessDenied, DigestMismatch
from erofs_twisted.registry.manifest import OCI_MANIFEST, Descriptor
from erofs_twisted.registry.platform import Platform
from erofs_twisted.registry.push import Artifact, push_referrer
from erofs_twisted.registry.reference import parse_reference
from erofs_twisted.registry.repository import Repository
from erofs_twisted.registry.settings import RegistrySettings
from erofs_twisted.registry.store import open_store
from erofs_twisted.registry.tlssettings import TLSSettings
from erofs_twisted.registry.urls import with_parameters
from tests.certificates import issue, make_authority, pem
from tests.images import EROFS, OCI_CONFIG, build_erofs
from tests.referrersregistry import send
from tests.servers import DockerRegistry, Nginx, TokenServer, tool
from tests.threadserver import ThreadServer

ALICE = Credentials("alice", "secret")
AMD64 = Platform.parse("linux/amd64")
MIB = 1 << 20
CONFIG = json.dumps({"os": "linux", "architecture": "amd64", "rootfs": {"type": "layers", "diff_ids": []}})
BIN = Path(sys.executable).parent


class SlowPool(ThreadPool):
    """Threads that take ``pause`` seconds more for each piece of work."""

    def __init__(self, pause: float) -> None:
        super().__init__(1, 1)
        self._pause = pause

    def callInThreadWithCallback(self, onResult: Any, func: Any, *args: Any, **kw: Any) -> None:
        def slowly() -> Any:
            time.sleep(self._pause)
            return func(*args, **kw)

        super().callInThreadWithCallback(onResult, slowly)


@attrs.define(eq=False)
class HalfSaid(ThreadServer):
    """Refuses uploads before it has read them, in two pieces, and hangs up."""

    puts: int = 0

    def answer(self, request: BaseHTTPRequestHandler) -> None:
        if request.command != "PUT":
            status = 202 if request.command == "POST" else 404
            send(request, status, b"", Location="/upload?state=1")
            return
        self.puts += 1
        request.wfile.write(
            b"HTTP/1.1 413 Too Large\r\nContent-Type: text/plain\r\nContent-Length: 9\r\n\r\n"
        )
        time.sleep(0.2)
        request.wfile.write(b"too large")
        time.sleep(0.2)
        request.close_connection = True


class PushTestCase(TestCase):
    timeout = 120

    def setUp(self) -> None:
        # The name of a socket may not be as long as a path of mktemp's is.
        self.directory = Path(self.enterContext(tempfile.TemporaryDirectory()))
        self.tls = TLSSettings()
        self.pool: Any = reactor.getThreadPool()  # type: ignore[attr-defined]

    def open(self, registry: DockerRegistry | Nginx | HalfSaid, name: str = "team/app:1", **how: Any) -> Any:
        reference = parse_reference(f"{registry.authority}/{name}")
        settings = RegistrySettings(**{"tls": self.tls, **how})
        store = open_store(reactor, reference, settings, pool=self.pool)
        self.addCleanup(store.close)
        return store

    async def repository(self, *where: Any, **how: Any) -> Repository:
        repository: Repository = await self.open(*where, **how).repository()
        self.addCleanup(repository.close)
        return repository

    def file(self, size: int, pool: ThreadPool | None = None) -> FileContent:
        """A file of random bytes."""
        path = self.directory / "layer"
        content = os.urandom(size)
        path.write_bytes(content)
        return FileContent(str(path), Digest.of(content), size, pool or self.pool)

    def open_files(self) -> list[str]:
        """The paths of this process's open files."""
        return [os.path.realpath(f"/proc/self/fd/{fd}") for fd in os.listdir("/proc/self/fd")]

    def slow_pool(self, pause: float) -> ThreadPool:
        pool = SlowPool(pause)
        pool.start()
        self.addCleanup(pool.stop)
        return pool

    async def check(self, store: Any, file: FileContent) -> None:
        """The registry gives back what the file holds."""
        assert isinstance(file.file, str)
        hasher, reader = hashlib.sha256(), store.blob(Descriptor(EROFS, file.digest, file.size))
        await reader.read(0, file.size, hasher.update)
        self.assertEqual(file.digest.encoded, hasher.hexdigest())

    async def push_image(self, repository: Repository, layer: FileContent, tag: str) -> Digest:
        config = CONFIG.encode()
        parts = [(OCI_CONFIG, await repository.push_blob(config), len(config))]
        parts.append((EROFS, await repository.push_blob(layer), layer.size))
        described = [{"mediaType": kind, "digest": digest, "size": size} for kind, digest, size in parts]
        document = {
            "schemaVersion": 2,
            "mediaType": OCI_MANIFEST,
            "config": described[0],
            "layers": described[1:],
        }
        return await repository.push_manifest(OCI_MANIFEST, json.dumps(document).encode(), tag)


class ImageTests(PushTestCase):
    def setUp(self) -> None:
        super().setUp()
        self.registry = self.enterContext(DockerRegistry())

    def skopeo(self, *words: str) -> bytes:
        return subprocess.run([tool("skopeo"), *words], check=True, capture_output=True).stdout

    async def test_skopeo_agrees_with_what_was_pushed(self) -> None:
        layer = self.file(3 * MIB + 17)
        digest = await self.push_image(await self.repository(self.registry), layer, "1")
        name, layout = f"docker://{self.registry.authority}/team/app:1", self.directory / "copy"
        raw = await deferToThread(self.skopeo, "inspect", "--raw", "--tls-verify=false", name)
        self.assertEqual(digest, Digest.of(raw))
        copy = ("--insecure-policy", "copy", "--src-tls-verify=false", name, f"oci:{layout}:1")
        await deferToThread(self.skopeo, *copy)
        (entry,) = json.loads((layout / "index.json").read_bytes())["manifests"]
        self.assertEqual(digest, entry["digest"])
        copied = layout / "blobs" / layer.digest.replace(":", "/")
        self.assertEqual(layer.digest, Digest.of(copied.read_bytes()))

    async def test_an_image_of_erofs_is_resolved_and_served(self) -> None:
        tree = self.directory / "tree"
        tree.mkdir()
        (tree / "hello").write_bytes(b"world\n" * 100_000)
        image = build_erofs(tree, self.directory / "image")
        layer = FileContent(str(image), Digest.of(image.read_bytes()), image.stat().st_size, self.pool)
        store = self.open(self.registry)
        repository = await store.repository()
        self.addCleanup(repository.close)
        digest = await self.push_image(repository, layer, "1")
        resolved = await store.resolve(AMD64)
        self.assertEqual((digest, layer.digest), (resolved.digest, resolved.layers[0].digest))
        copied = await deferToThread(self.serve, f"{self.registry.authority}/team/app:1")
        self.assertEqual(image.read_bytes(), copied[: layer.size])

    def serve(self, name: str) -> bytes:
        """What nbdcopy gets from ``erofs-nbd serve``."""
        socket, copy = self.directory / "socket", self.directory / "served"
        words = ["serve", name, "--socket", str(socket), "--cache-dir", str(self.directory / "cache")]
        server = subprocess.Popen([BIN / "erofs-nbd", *words], stderr=subprocess.PIPE, text=True)
        with server:
            try:
                assert server.stderr is not None
                self.assertIn("serving", server.stderr.readline())
                uri = f"nbd+unix:///?socket={socket}"
                subprocess.run([tool("nbdcopy"), uri, str(copy)], check=True, capture_output=True)
            finally:
                server.terminate()
        return copy.read_bytes()

    async def test_what_refers_to_an_image_is_listed_with_it(self) -> None:
        store = self.open(self.registry)
        repository = await store.repository()
        self.addCleanup(repository.close)
        digest = await self.push_image(repository, self.file(1000), "1")
        data = json.dumps({"not": "looked at"}).encode()
        subject = Descriptor(OCI_MANIFEST, digest, len(data))
        pushed = [
            await push_referrer(repository, subject, Artifact("application/vnd.test", content))
            for content in (b"one", b"two")
        ]
        listed = await store.referrers(digest, "application/vnd.test")
        self.assertEqual(pushed, [entry.digest for entry in listed])

    async def test_a_manifest_whose_parts_are_missing_is_refused_in_the_registrys_words(self) -> None:
        repository = await self.repository(self.registry)
        part = {"mediaType": OCI_CONFIG, "digest": Digest.of(b"x"), "size": 1}
        document = {"schemaVersion": 2, "mediaType": OCI_MANIFEST, "config": part, "layers": []}
        with self.assertRaisesRegex(Exception, "MANIFEST_BLOB_UNKNOWN"):
            await repository.push_manifest(OCI_MANIFEST, json.dumps(document).encode())


class BlobTests(PushTestCase):
    def setUp(self) -> None:
        super().setUp()
        self.registry = self.enterContext(DockerRegistry())

    def requests(self, method: str, path: str) -> list[str]:
        """What the registry says it was asked: ``path`` is a regular expression."""
        return re.findall(rf'"{method} (/v2/{path}\S*) HTTP', self.registry.log)

    async def test_a_blob_that_is_there_is_not_sent_again(self) -> None:
        repository, file = await self.repository(self.registry), self.file(MIB)
        self.assertFalse(await repository.has_blob(file.digest))
        for _ in range(2):
            await repository.push_blob(file)
            self.assertTrue(await repository.has_blob(file.digest))
        self.assertEqual(1, len(self.requests("PUT", "team/app/blobs/uploads/")))

    async def test_a_blob_of_another_repository_is_taken_over_without_a_byte(self) -> None:
        file = self.file(MIB)
        await (await self.repository(self.registry, "team/base:1")).push_blob(file)
        store = self.open(self.registry)
        repository = await store.repository()
        self.addCleanup(repository.close)
        gone = FileContent("/nowhere", file.digest, file.size, self.pool)
        await repository.push_blob(gone, mount_from="team/base")
        await self.check(store, file)
        self.assertEqual([], self.requests("PUT", "team/app/"))

    async def test_a_blob_that_the_other_repository_has_not_is_sent(self) -> None:
        store, file = self.open(self.registry), self.file(MIB)
        repository = await store.repository()
        self.addCleanup(repository.close)
        await repository.push_blob(file, mount_from="team/base")
        await self.check(store, file)
        self.assertEqual(1, len(self.requests("POST", "team/app/")))

    async def test_a_file_that_changed_is_an_error_that_names_it(self) -> None:
        repository, file = await self.repository(self.registry), self.file(MIB)
        self.fill(file)
        error = await self.assertFailure(self.pushing(repository, file), DigestMismatch)
        self.assertIn("layer is no longer what the digest", str(error))
        self.assertFalse(await repository.has_blob(file.digest))

    def fill(self, file: FileContent) -> None:
        Path(str(file.file)).write_bytes(bytes(file.size))

    def pushing(self, repository: Repository, file: FileContent) -> Deferred[Digest]:
        return Deferred.fromCoroutine(repository.push_blob(file))

    async def test_a_registry_that_is_started_again_in_the_middle_gets_it_all_the_same(self) -> None:
        store = self.open(self.registry)
        repository = await store.repository()
        self.addCleanup(repository.close)
        file = self.file(8 * MIB, self.slow_pool(0.05))
        pushing = self.pushing(repository, file)

        def restart() -> None:
            time.sleep(0.6)
            self.registry.stop()
            self.registry.start()

        await deferToThread(restart)
        await pushing
        await self.check(store, file)
        self.assertEqual(2, len(self.requests("POST", "team/app/")))

    async def test_a_large_file_takes_little_memory(self) -> None:
        path, size = self.directory / "large", 200 * MIB
        hasher = hashlib.sha256()
        with path.open("wb") as file:
            for number in range(size // MIB):
                piece = hashlib.sha256(b"%d" % number).digest() * (MIB // 32)
                hasher.update(piece)
                file.write(piece)
        words = [f"{self.registry.authority}/team/app", str(path), f"sha256:{hasher.hexdigest()}"]
        done = await deferToThread(self.run_pushing, *words)
        self.assertEqual(size, done["size"])
        self.assertLess(done["growth"], 16 * MIB)
        stored = self.registry.directory / "storage/docker/registry/v2/blobs/sha256"
        encoded = hasher.hexdigest()
        self.assertEqual(size, (stored / encoded[:2] / encoded / "data").stat().st_size)
        shutil.rmtree(stored)

    def run_pushing(self, *words: str) -> Any:
        command = [sys.executable, "-m", "tests.pushing", *words]
        done = subprocess.run(command, check=True, capture_output=True, cwd=Path(__file__).parents[2])
        return json.loads(done.stdout)


class LoginTests(PushTestCase):
    async def test_a_user_pushes_by_name_and_password(self) -> None:
        registry = self.enterContext(DockerRegistry(users={"alice": "secret"}))
        repository = await self.repository(registry, credentials=ALICE)
        await self.push_image(repository, self.file(MIB), "1")
        image = await self.open(registry, credentials=ALICE).resolve(AMD64)
        self.assertEqual(MIB, image.layers[0].size)

    async def test_who_has_no_login_is_told_so(self) -> None:
        registry = self.enterContext(DockerRegistry(users={"alice": "secret"}))
        repository = await self.repository(registry)
        with self.assertRaisesRegex(AccessDenied, "--username and --password-file"):
            await repository.push_blob(b"x")

    async def test_an_upload_that_is_refused_while_it_is_sent_is_sent_again(self) -> None:
        # A session that has asked for nothing yet learns in the middle of the body that it has to log in.
        registry = self.enterContext(DockerRegistry(users={"alice": "secret"}))
        file = self.file(64 * MIB, self.slow_pool(0.002))
        first, fresh = [await self.repository(registry, credentials=ALICE) for _ in range(2)]
        begun = await first.session.request("POST", f"{first.base}/blobs/uploads/", {}, 10)
        url = with_parameters(first.session.location(begun.response, begun.url), [("digest", file.digest)])
        taken: list[list[float]] = []

        def send(extend: Any) -> Any:
            taken.append([])
            return sender(file, reactor, 10)(lambda seconds: (taken[-1].append(seconds), extend(seconds)))

        answer = await fresh.session.request("PUT", url, {}, 10, send)
        self.assertEqual(201, answer.response.code)
        self.assertLess(2 * len(taken[0]), len(taken[1]), "the first was broken off soon")
        await self.check(self.open(registry, credentials=ALICE), file)


class TokenTests(PushTestCase):
    def setUp(self) -> None:
        super().setUp()
        self.tokens = self.enterContext(TokenServer(users={"alice": "secret"}, lifetime=2))
        self.registry = self.enterContext(DockerRegistry(auth=self.tokens.registry_auth))

    async def test_a_token_may_expire_while_a_large_file_goes_up_slowly(self) -> None:
        store = self.open(self.registry, credentials=ALICE)
        repository = await store.repository()
        self.addCleanup(repository.close)
        file = self.file(16 * MIB, self.slow_pool(0.08))
        started = time.monotonic()
        await self.push_image(repository, file, "1")
        self.assertGreater(time.monotonic() - started, 2 * self.tokens.lifetime)
        self.assertGreaterEqual(self.tokens.granted, 2)
        await self.check(store, file)

    async def test_a_blob_is_taken_over_with_a_token_for_both_repositories(self) -> None:
        file = self.file(MIB)
        base = await self.repository(self.registry, "team/base:1", credentials=ALICE)
        await base.push_blob(file)
        store = self.open(self.registry, credentials=ALICE)
        repository = await store.repository()
        self.addCleanup(repository.close)
        gone = FileContent("/nowhere", file.digest, file.size, self.pool)
        await repository.push_blob(gone, mount_from="team/base")
        await self.check(store, file)

    async def test_a_repository_that_this_user_may_not_read_gives_nothing_away(self) -> None:
        file = self.file(MIB)
        base = await self.repository(self.registry, "team/base:1", credentials=ALICE)
        await base.push_blob(file)
        real = self.tokens._token

        def grant_less(scopes: Any, lifetime: int) -> str:
            return real([scope for scope in scopes if ":team/base:" not in scope], lifetime)

        self.patch(TokenServer, "_token", lambda tokens, scopes, lifetime: grant_less(scopes, lifetime))
        store = self.open(self.registry, credentials=ALICE)
        repository = await store.repository()
        self.addCleanup(repository.close)
        gone = FileContent("/nowhere", file.digest, file.size, self.pool)
        with self.assertRaisesRegex(Exception, "/nowhere"):
            await repository.push_blob(gone, mount_from="team/base")
        await repository.push_blob(file, mount_from="team/base")
        await self.check(store, file)


class OtherServerTests(PushTestCase):
    def certificate(self) -> tuple[Path, Path]:
        authority = make_authority("test authority")
        path = self.directory / "ca.pem"
        path.write_bytes(pem(authority[1]))
        self.tls = TLSSettings(authorities=(str(path),))
        return issue(authority, ["127.0.0.1"], self.directory)

    async def test_a_registry_on_loopback_that_wants_tls_gets_it(self) -> None:
        registry = self.enterContext(DockerRegistry(certificate=self.certificate()))
        store = self.open(registry)
        repository = await store.repository()
        self.addCleanup(repository.close)
        file = self.file(3 * MIB)
        await repository.push_blob(file)
        await self.check(store, file)

    async def test_a_proxy_that_takes_less_says_so_while_the_file_is_sent(self) -> None:
        await self.check_limit(Nginx.proxy)

    async def test_a_proxy_with_tls_does_too(self) -> None:
        certificate = self.certificate()
        proto = "proxy_set_header X-Forwarded-Proto https;"
        await self.check_limit(lambda url: attrs.evolve(Nginx.proxy(url, proto), tls=certificate))

    async def check_limit(self, proxy: Callable[[str], Nginx]) -> None:
        registry = self.enterContext(DockerRegistry())
        front = proxy(registry.url)
        front.directives = front.directives.replace("client_max_body_size 0", "client_max_body_size 1m")
        self.enterContext(front)
        repository = await self.repository(front)
        file = self.file(32 * MIB, self.slow_pool(0.002))
        with self.assertRaisesRegex(Exception, "413"):
            await repository.push_blob(file)
        await deferLater(reactor, 0.1)
        self.assertNotIn(file.file, self.open_files())
        self.assertEqual(1, registry.log.count('"POST /v2/'), "no second attempt")

    async def test_an_answer_in_pieces_while_the_file_is_sent_is_heard_out(self) -> None:
        server = self.enterContext(HalfSaid())
        repository = await self.repository(server)
        with self.assertRaisesRegex(Exception, "413 Too Large: too large"):
            await repository.push_blob(self.file(64 * MIB))
        self.assertEqual(1, server.puts)
