"""A daemon that knows every kind of secret, and says all that it does, tells none of them.

Its registry's name leads, through a proxy with a password, to docker-registry with tokens of 2 s, whose blobs
are at a CDN with signed URLs of 1 to 2 s; a part of the CDN's answers are errors.
"""

from __future__ import annotations

import base64
import json
import os
import subprocess
import urllib.parse
from collections.abc import Iterator
from pathlib import Path

from tests.daemon import Daemon, DaemonTestCase, FaultRegistry
from tests.faults import BREAKS, REFUSALS, Fault
from tests.images import Layout, push
from tests.processes import BIN, descendants, run, until
from tests.scenery import scenery
from tests.servers import DockerRegistry, Nginx, SignedURLs, Tinyproxy, TokenServer

REGISTRY, TOKENS = "registry.test", "tokens.test"
"""Names that only the proxy knows."""
IMAGE = f"{REGISTRY}/team/app:1"
USER, PASSWORD = "alice", "hush-password"
PROXY_USER, PROXY_PASSWORD = "wanda", "hush-proxy"
IDENTITY, HEADER, WRONG = "hush-identity", "hush-header", "hush-wrong"
CDN_FAULTS = (*BREAKS, *REFUSALS, Fault(status=500))


class SecretTests(DaemonTestCase):
    attach = "fuse"

    def setUp(self) -> None:
        self.tokens = self.enterContext(TokenServer(users={USER: PASSWORD}, lifetime=2, identity=IDENTITY))
        ours = self.tokens.registry_auth
        auth = {"token": {**ours["token"], "realm": f"http://{TOKENS}/token"}}
        self.server = self.enterContext(DockerRegistry(auth=auth))
        self.urls = self.enterContext(SignedURLs())
        layout = object.__new__(Layout)
        layout.directory = scenery().layout
        cdn = self.enterContext(Nginx(self.urls.directives(scenery().layout / "blobs" / "sha256")))
        self.cdn = self.enterContext(FaultRegistry(cdn.url))
        self.urls.cdn = self.cdn.url
        front = self.enterContext(self.urls.front(self.server.url, self.urls.LET_IN))
        proxy = self.enterContext(
            Tinyproxy(
                user=f"{PROXY_USER}:{PROXY_PASSWORD}",
                directives=f'Upstream http {front.authority} "{REGISTRY}"\n'
                f'Upstream http {self.tokens.authority} "{TOKENS}"\n',
            )
        )
        super().setUp()
        authorization = self.tokens.authorization("team/app")
        self.secrets = [
            PASSWORD,
            PROXY_PASSWORD,
            IDENTITY,
            HEADER,
            WRONG,
            authorization["Authorization"][-40:],
        ]
        push(layout, scenery().manifests["plain"], self.server.url, "team/app:1", headers=authorization)
        self.environment = {"http_proxy": f"http://{PROXY_USER}:{PROXY_PASSWORD}@{proxy.authority}"}
        self.options = ["--plain-http", "--verbose", "--hosts-dir", str(self.hosts_dir())]

    def hosts_dir(self) -> Path:
        """With a header that is a secret."""
        directory = self.directory / "certs.d"
        (directory / REGISTRY).mkdir(parents=True)
        (directory / REGISTRY / "hosts.toml").write_text(
            f'server = "http://{REGISTRY}"\n[host."http://{REGISTRY}".header]\nX-Secret = "{HEADER}"\n'
        )
        return directory

    def password_file(self, password: str) -> list[str]:
        path = self.directory / f"password-{len(password)}"
        path.write_text(password)
        return ["--username", USER, "--password-file", str(path)]

    def identity_file(self) -> list[str]:
        path = self.directory / "auth.json"
        path.write_text(json.dumps({"auths": {REGISTRY: {"identitytoken": IDENTITY}}}))
        return ["--auth-file", str(path)]

    def inspect(self, *options: str) -> subprocess.CompletedProcess[str]:
        words = [BIN / "erofs-nbd", "inspect", IMAGE, *self.options, *options]
        return run(*words, env={**os.environ, "HOME": str(self.directory), **self.environment})

    def known(self) -> Iterator[bytes]:
        """All secrets, and in the ways that they are sent."""
        for user, password in ((USER, PASSWORD), (USER, WRONG), (PROXY_USER, PROXY_PASSWORD)):
            yield base64.b64encode(f"{user}:{password}".encode())
        # The end of a token is its signature; what is before it is no secret, and the same in all.
        signed = [*(token[-40:] for token in self.tokens.tokens), *self.tokens.identities]
        queries = [urllib.parse.parse_qs(query)["signature"][0] for query in self.urls.given]
        for secret in (*self.secrets, *signed, *queries):
            yield secret.encode()

    def assert_shows_none(self, shown: bytes) -> None:
        self.assertEqual([], [secret for secret in self.known() if secret in shown])

    def test_a_mount_that_goes_through_all_of_it(self) -> None:
        self.cdn.set("", *(fault.fields() for fault in CDN_FAULTS), rate=0.3, seed=1)
        options = [*self.options, *self.password_file(PASSWORD), "--fill", "full", "--fill-rate", "1M"]
        daemon = self.mounted(IMAGE, *options, environment=self.environment)
        until("tokens and URLs have expired", self.has_seen_all, patience=60)
        for path in sorted(daemon.mountpoint.rglob("*")):
            if path.is_file() and not path.is_symlink():
                path.read_bytes()
        shown = self.of_processes(daemon)
        waited = daemon.erofs_nbd("wait")
        unmounted = daemon.erofs_nbd("umount")
        self.assertEqual((0, 0), (waited.returncode, unmounted.returncode))
        shown += (waited.stdout + waited.stderr + unmounted.stdout + unmounted.stderr).encode()
        shown += self.of_files(daemon)
        self.assert_ends_well(daemon)
        self.assertIn("trying again", daemon.log)
        self.assertIn(REGISTRY, daemon.log)
        self.assert_shows_none(shown)

    def has_seen_all(self) -> bool:
        return len(self.tokens.tokens) >= 4 and len(self.urls.given) >= 4

    def of_processes(self, daemon: Daemon) -> bytes:
        """What anybody may see of them."""
        places = [Path(f"/proc/{pid}/cmdline") for pid in descendants(daemon.pid)]
        return b"".join(place.read_bytes() for place in (*places, Path("/proc/mounts")))

    def of_files(self, daemon: Daemon) -> bytes:
        """All that it has written."""
        written = [path for path in daemon.directory.rglob("*") if daemon.mountpoint not in path.parents]
        names = "\n".join(map(str, written)).encode()
        return names + b"".join(path.read_bytes() for path in written if path.is_file())

    def test_commands_that_let_in_and_that_do_not(self) -> None:
        right = self.inspect(*self.password_file(PASSWORD))
        self.assertEqual(0, right.returncode, right.stderr)
        self.assertNotIn(f"credentials for {REGISTRY}: none", right.stderr, "a mirror of its own name")
        by_identity = self.inspect(*self.identity_file())
        self.assertEqual(0, by_identity.returncode, by_identity.stderr)
        self.assertEqual(1, len(self.tokens.identities), "another one was given out")
        wrong = self.inspect(*self.password_file(WRONG))
        self.assertEqual(1, wrong.returncode)
        nobody = self.inspect()
        self.assertEqual(1, nobody.returncode)
        self.environment["http_proxy"] = self.environment["http_proxy"].replace(PROXY_PASSWORD, WRONG)
        refused = self.inspect(*self.password_file(PASSWORD))
        self.assertEqual(1, refused.returncode)
        self.assertIn("Tinyproxy", refused.stderr)
        done = (right, by_identity, wrong, nobody, refused)
        self.assert_shows_none("".join(each.stdout + each.stderr for each in done).encode())
