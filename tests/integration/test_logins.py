"""Credentials from Docker's files and from credential helpers, at docker-registry with htpasswd."""

from __future__ import annotations

import base64
import json
import os
import shutil
import signal
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

from twisted.internet import reactor
from twisted.internet.defer import Deferred
from twisted.internet.task import deferLater
from twisted.trial.unittest import SynchronousTestCase, TestCase

from erofs_twisted.pool import SystemCallPool
from erofs_twisted.registry.credentialhelper import HelperFailed, ask_helper
from erofs_twisted.registry.credentials import Credentials
from erofs_twisted.registry.dockerconfig import LoginFiles
from erofs_twisted.registry.errors import AccessDenied
from erofs_twisted.registry.logins import PAUSE
from erofs_twisted.registry.platform import Platform
from erofs_twisted.registry.reference import parse_reference
from erofs_twisted.registry.settings import RegistrySettings
from erofs_twisted.registry.store import open_store
from tests.daemon import DaemonTestCase
from tests.images import EROFS, Layout, push
from tests.processes import BIN, run
from tests.scenery import scenery
from tests.servers import DockerRegistry, tool

AMD64 = Platform.parse("linux/amd64")
CONTENT = os.urandom(100_000)
OLD, NEW = Credentials("alice", "hush-old"), Credentials("alice", "hush-new")
HELPER = """#!/bin/sh
# Notes down what it is asked, and says what is in the file "answer".
cd {directory}
{{ echo "$@"; cat; echo; }} >> asked
exec cat answer
"""
KEEPER = """#!/bin/sh
# A keychain of one entry, which is a file.
cd {directory}
case $1 in
  store) cat > kept;;
  get) cat >/dev/null; cat kept 2>/dev/null || {{ echo credentials not found in native keychain; exit 1; }};;
esac
"""


def auths(registry: DockerRegistry, who: Credentials) -> str:
    auth = base64.b64encode(f"{who.username}:{who.password}".encode()).decode()
    return json.dumps({"auths": {registry.authority: {"auth": auth}}})


def answer(who: Credentials) -> str:
    return json.dumps({"ServerURL": "", "Username": who.username, "Secret": who.password})


def _runs(pid: int) -> bool:
    return os.path.exists(f"/proc/{pid}")


class RegistryTests(TestCase):
    """With a registry of which only ``alice`` may read."""

    timeout = 60

    def setUp(self) -> None:
        self.directory = Path(tempfile.mkdtemp(prefix="logins-"))
        self.addCleanup(shutil.rmtree, self.directory)
        self.config = self.directory / "config.json"
        layout = Layout(self.directory / "layout")
        self.registry = self.enterContext(DockerRegistry(users={"alice": OLD.password}))
        push(
            layout, layout.manifest([layout.blob(CONTENT, EROFS)]), self.registry.url, "team/app:1",
            headers={"Authorization": OLD.authorization()},
        )  # fmt: skip
        self.pool = SystemCallPool(reactor)
        self.addCleanup(self.pool.stop)
        self.patch(os, "environ", {**os.environ, "PATH": f"{self.directory}:/usr/bin:/bin"})

    def helper(self, name: str, script: str) -> None:
        path = self.directory / f"docker-credential-{name}"
        path.write_text(script.format(directory=self.directory))
        path.chmod(0o755)

    def asked(self) -> list[str]:
        """The arguments and the input of each run of the helper."""
        return (self.directory / "asked").read_text().splitlines()

    def replace(self, file: Path, content: str) -> None:
        temporary = file.with_suffix(".temporary")
        temporary.write_text(content)
        temporary.rename(file)

    async def layer(self) -> Any:
        reference = parse_reference(f"{self.registry.authority}/team/app:1")
        files = LoginFiles((str(self.directory / "absent.json"), str(self.config)))
        store = open_store(reactor, reference, RegistrySettings(logins=files), pool=self.pool)
        self.addCleanup(store.close)
        image = await store.resolve(AMD64)
        return store.blob(image.layers[0])

    async def check(self, reader: Any) -> None:
        got: list[bytes] = []
        await reader.read(1000, 50_000, got.append)
        self.assertEqual(CONTENT[1000:51_000], b"".join(got))

    def change_password(self) -> None:
        """The registry takes the new one from now on, and the old one no more."""
        self.registry.stop()
        self.registry.users = {"alice": NEW.password}
        self.registry.start()

    async def test_a_login_of_docker_lets_in(self) -> None:
        self.config.write_text(auths(self.registry, OLD))
        await self.check(await self.layer())

    async def test_a_login_of_skopeo_lets_in(self) -> None:
        self.skopeo_login()
        self.assertIn(self.registry.authority, json.loads(self.config.read_text())["auths"])
        await self.check(await self.layer())

    async def test_what_skopeo_gave_to_a_helper_is_got_from_it(self) -> None:
        self.helper("file", KEEPER)
        self.config.write_text(json.dumps({"credHelpers": {self.registry.authority: "file"}}))
        self.skopeo_login()
        self.assertNotIn("auths", json.loads(self.config.read_text()))
        await self.check(await self.layer())

    def skopeo_login(self) -> None:
        options = ("--tls-verify=false", "--username", OLD.username, "--password-stdin")
        subprocess.run(
            [tool("skopeo"), "login", "--authfile", self.config, *options, self.registry.authority],
            input=OLD.password.encode(), env=dict(os.environ), capture_output=True, check=True,
        )  # fmt: skip

    async def test_a_password_is_replaced_under_an_open_image(self) -> None:
        self.config.write_text(auths(self.registry, OLD))
        reader = await self.layer()
        self.change_password()
        self.replace(self.config, auths(self.registry, NEW))
        await self.check(reader)

    async def test_a_helper_lets_in_and_is_asked_once(self) -> None:
        self.helper("keys", HELPER)
        self.config.write_text(json.dumps({"credHelpers": {self.registry.authority: "keys"}}))
        (self.directory / "answer").write_text(answer(OLD))
        reader = await self.layer()
        await self.check(reader)
        self.assertEqual(["get", self.registry.authority], self.asked())

    async def test_a_helper_is_asked_again_when_its_password_is_refused(self) -> None:
        self.helper("keys", HELPER)
        self.config.write_text(json.dumps({"credsStore": "keys"}))
        (self.directory / "answer").write_text(answer(OLD))
        reader = await self.layer()
        self.change_password()
        (self.directory / "answer").write_text(answer(NEW))
        await deferLater(reactor, PAUSE)
        await self.check(reader)
        self.assertEqual(["get", self.registry.authority] * 2, self.asked())

    async def test_a_wrong_password_is_said_and_not_shown(self) -> None:
        self.config.write_text(auths(self.registry, NEW))
        opened = Deferred.fromCoroutine(self.layer())
        error = await self.assertFailure(opened, AccessDenied)
        self.assertNotIn("hush", str(error))

    async def test_who_is_not_found_is_nobody(self) -> None:
        self.helper("keys", "#!/bin/sh\necho credentials not found in native keychain; exit 1\n")
        self.config.write_text(json.dumps({"credsStore": "keys"}))
        error = await self.assertFailure(Deferred.fromCoroutine(self.layer()), AccessDenied)
        self.assertIn("--username and --password-file", str(error))


class HelperTests(TestCase):
    timeout = 30

    def setUp(self) -> None:
        self.directory = Path(tempfile.mkdtemp(prefix="helper-"))
        self.addCleanup(shutil.rmtree, self.directory)
        self.patch(os, "environ", {**os.environ, "PATH": f"{self.directory}:/usr/bin:/bin"})

    def ask(self, script: str, patience: float = 20.0) -> Deferred[Any]:
        path = self.directory / "docker-credential-test"
        path.write_text(f"#!/bin/sh\n{script}\n")
        path.chmod(0o755)
        return Deferred.fromCoroutine(ask_helper(reactor, "test", "r.example", patience))

    async def test_one_that_hangs_is_killed_also_with_a_child_that_holds_its_output(self) -> None:
        begun = time.monotonic()
        pid = self.directory / "pid"
        error = await self.assertFailure(
            self.ask(f"echo $$ > {pid}; sleep 5 & wait", patience=0.5), HelperFailed
        )
        self.assertIn("has not answered in 0.5 s", str(error))
        self.assertLess(time.monotonic() - begun, 4)
        number = int(pid.read_text())
        while _runs(number):
            await deferLater(reactor, 0.01)

    async def test_one_that_does_not_read_is_no_trouble(self) -> None:
        self.assertEqual(OLD, await self.ask(f"exec 0<&-; echo '{answer(OLD)}'"))

    async def test_one_that_cannot_be_started_is_said(self) -> None:
        path = self.directory / "docker-credential-test"
        path.write_text("#!/nonexistent\n")
        path.chmod(0o755)
        asked = Deferred.fromCoroutine(ask_helper(reactor, "test", "r.example"))
        error = await self.assertFailure(asked, HelperFailed)
        self.assertIn("docker-credential-test cannot be started: No such file", str(error))

    async def test_one_that_never_stops_talking_is_ended(self) -> None:
        await self.assertFailure(self.ask("exec yes"), HelperFailed)


class DaemonLoginTests(DaemonTestCase):
    """A mount whose password comes from a helper."""

    attach = "fuse"

    def setUp(self) -> None:
        self.server = self.enterContext(DockerRegistry(users={"alice": OLD.password}))
        super().setUp()
        push_scenery(self.server)
        config = self.directory / "docker" / "config.json"
        config.parent.mkdir()
        config.write_text(json.dumps({"credsStore": "keys"}))
        helper = self.directory / "docker-credential-keys"
        helper.write_text(HELPER.format(directory=self.directory))
        helper.chmod(0o755)
        (self.directory / "answer").write_text(answer(OLD))
        self.environment = {
            "PATH": f"{self.directory}:{os.environ['PATH']}",
            "DOCKER_CONFIG": str(config.parent),
        }

    def test_it_is_found_by_a_daemon_and_shows_nowhere(self) -> None:
        image = f"{self.server.authority}/team/app:1"
        daemon = self.mounted(image, "--fill", "off", environment=self.environment)
        source = f"{self.directory}/docker/config.json, docker-credential-keys"
        daemon.says(f"credentials for {self.server.authority}: {source}")
        shown = b"".join(Path(f"/proc/{daemon.pid}/{name}").read_bytes() for name in ("cmdline", "environ"))
        for directory in (daemon.state_dir, daemon.cache_dir):
            shown += b"".join(file.read_bytes() for file in directory.rglob("*") if file.is_file())
        self.assertEqual(0, daemon.erofs_nbd("umount").returncode)
        self.assert_ends_well(daemon)
        shown += daemon.log.encode()
        for secret in (b"hush", base64.b64encode(b"alice:hush-old")):
            self.assertNotIn(secret, shown)


def push_scenery(registry: DockerRegistry) -> None:
    layout = object.__new__(Layout)
    layout.directory = scenery().layout
    push(
        layout, scenery().manifests["plain"], registry.url, "team/app:1",
        headers={"Authorization": OLD.authorization()},
    )  # fmt: skip


class CommandTests(SynchronousTestCase):
    """As a user would have it: a home with a login in it, and no option."""

    def setUp(self) -> None:
        self.directory = Path(tempfile.mkdtemp(prefix="logins-"))
        self.addCleanup(shutil.rmtree, self.directory)
        self.registry = self.enterContext(DockerRegistry(users={"alice": OLD.password}))
        push_scenery(self.registry)
        self.image = f"{self.registry.authority}/team/app:1"
        config = self.directory / ".docker" / "config.json"
        config.parent.mkdir()
        config.write_text(auths(self.registry, OLD))
        self.environment = {"PATH": os.environ["PATH"], "HOME": str(self.directory)}

    def test_a_login_is_found(self) -> None:
        done = run(BIN / "erofs-nbd", "inspect", "--json", self.image, env=self.environment)
        self.assertEqual((0, ""), (done.returncode, done.stderr))
        self.assertEqual(scenery().manifests["plain"]["digest"], json.loads(done.stdout)["digest"])

    def test_a_named_file_is_the_only_one(self) -> None:
        named = self.directory / "named.json"
        named.write_text(auths(self.registry, NEW))
        done = run(BIN / "erofs-nbd", "inspect", self.image, "--auth-file", named, env=self.environment)
        self.assertEqual(1, done.returncode)
        self.assertIn("wrong user name or password", " ".join(done.stderr.split()))
        self.assertNotIn("hush", done.stdout + done.stderr)

    def test_what_is_served_shows_no_secret_anywhere(self) -> None:
        words = [self.image, "--socket", self.directory / "socket", "--cache-dir", self.directory / "cache"]
        with (self.directory / "log").open("wb") as log:
            server = subprocess.Popen(
                [BIN / "erofs-nbd", "serve", *words], env=self.environment, stdout=log, stderr=log
            )
        try:
            deadline = time.monotonic() + 30
            while not (self.directory / "socket").exists():
                self.assertIsNone(server.poll(), (self.directory / "log").read_text())
                self.assertLess(time.monotonic(), deadline)
                time.sleep(0.02)
            places = [Path(f"/proc/{server.pid}/{name}") for name in ("cmdline", "environ")]
            shown = b"".join(place.read_bytes() for place in places)
        finally:
            server.send_signal(signal.SIGTERM)
            self.assertEqual(0, server.wait(20))
        for file in (self.directory / "log", *(self.directory / "cache").rglob("*")):
            shown += file.read_bytes() if file.is_file() else b""
        for secret in (b"hush", base64.b64encode(b"alice:hush-old")):
            self.assertNotIn(secret, shown)
