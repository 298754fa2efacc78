"""Real servers on loopback, for as long as a ``with`` block lasts.

Each takes a free port, keeps its files in a directory of its own, is ready when the block begins, and is gone
when it ends.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import shutil
import socket
import subprocess
import tempfile
import time
import uuid
from collections.abc import Mapping, Sequence
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from types import TracebackType
from typing import Any, Self
from urllib.parse import parse_qs, urlsplit

import attrs

from tests.threadserver import ThreadServer

READY_SECONDS = 60.0
"""A slow machine, such as User-Mode Linux, takes long to start a server."""

PACKAGES = {"nginx": "nginx-light", "htpasswd": "apache2-utils", "systemd-analyze": "systemd"}
"""What has a program, where it is called otherwise."""


def free_port() -> int:
    """A port on 127.0.0.1 that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def tool(name: str) -> str:
    """Where a program is; a RuntimeError says which package has it."""
    path = shutil.which(name, path=os.environ.get("PATH", "") + ":/usr/sbin:/sbin")
    if path is None:
        raise RuntimeError(f"{name} is missing: apt-get install {PACKAGES.get(name, name)}")
    return path


@attrs.define(eq=False)
class Process:
    """A server that is a process of its own, listening on ``port``."""

    port: int = attrs.field(factory=free_port, kw_only=True)
    directory: Path = attrs.field(init=False)
    _process: subprocess.Popen[bytes] | None = attrs.field(init=False, default=None)

    @property
    def authority(self) -> str:
        return f"127.0.0.1:{self.port}"

    @property
    def url(self) -> str:
        return f"http://{self.authority}"

    @property
    def log(self) -> str:
        """All that it has printed."""
        return (self.directory / "log").read_text(errors="replace")

    def command(self) -> Sequence[str]:
        """Write what the server needs below `directory`; what starts it."""
        raise NotImplementedError

    def __enter__(self) -> Self:
        self.directory = Path(tempfile.mkdtemp(prefix="erofs-twisted-test-"))
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()
        shutil.rmtree(self.directory)

    def start(self) -> None:
        """Start, and wait until the port answers. Also after `stop`, on the same port and files."""
        with (self.directory / "log").open("ab") as log:
            self._process = subprocess.Popen(
                self.command(), stdin=subprocess.DEVNULL, stdout=log, stderr=log, cwd=self.directory
            )
        deadline = time.monotonic() + READY_SECONDS
        while True:
            try:
                socket.create_connection(("127.0.0.1", self.port), 1).close()
                return
            except OSError:
                if self._process.poll() is not None or time.monotonic() > deadline:
                    self.stop()
                    raise RuntimeError(f"{type(self).__name__} does not start:\n{self.log}") from None
                time.sleep(0.02)

    def stop(self) -> None:
        """End the process, at once. Its files stay."""
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            process.wait()


@attrs.define(eq=False)
class DockerRegistry(Process):
    """Debian's docker-registry.

    ``auth`` is a section of its configuration, such as `TokenServer.registry_auth`; ``users`` makes it
    ask for basic authentication; ``certificate`` is a file for the chain and one for the key, and makes it
    speak TLS; ``clients`` is a file of the authorities whose certificates its clients must show then. With
    ``upstream``, the URL of another registry, it is a pull-through cache of that.
    """

    auth: Mapping[str, Any] | None = None
    users: Mapping[str, str] | None = None
    certificate: tuple[Path, Path] | None = None
    upstream: str | None = None
    clients: Path | None = None

    @property
    def url(self) -> str:
        return f"{'https' if self.certificate else 'http'}://{self.authority}"

    def command(self) -> Sequence[str]:
        http: dict[str, Any] = {"addr": self.authority, "secret": "test"}
        if self.certificate:
            chain, key = self.certificate
            http["tls"] = {"certificate": str(chain), "key": str(key)}
            if self.clients:
                http["tls"]["clientcas"] = [str(self.clients)]
        configuration: dict[str, Any] = {
            "version": "0.1",
            "log": {"level": "info", "accesslog": {"disabled": False}},
            "storage": {
                "filesystem": {"rootdirectory": str(self.directory / "storage")},
                "delete": {"enabled": True},
            },
            "http": http,
        }
        if self.upstream:
            configuration["proxy"] = {"remoteurl": self.upstream}
        if self.auth:
            configuration["auth"] = dict(self.auth)
        if self.users:
            configuration["auth"] = {"htpasswd": {"realm": "test", "path": str(self._htpasswd(self.users))}}
        path = self.directory / "config.yml"
        path.write_text(json.dumps(configuration))  # JSON is YAML
        return [tool("docker-registry"), "serve", str(path)]

    def _htpasswd(self, users: Mapping[str, str]) -> Path:
        path = self.directory / "htpasswd"
        lines = [
            subprocess.run(
                [tool("htpasswd"), "-niB", user], input=password.encode(), capture_output=True, check=True
            ).stdout
            for user, password in users.items()
        ]
        path.write_bytes(b"".join(lines))
        return path


@attrs.define(eq=False)
class Nginx(Process):
    """nginx with ``directives`` in its one server block, and ``outside`` before that; ``tls`` is a file each
    for the chain and the key."""

    directives: str
    tls: tuple[Path, Path] | None = None
    outside: str = ""

    @property
    def url(self) -> str:
        return f"{'https' if self.tls else 'http'}://{self.authority}"

    @classmethod
    def proxy(cls, upstream: str, extra: str = "") -> Nginx:
        """In front of another server, adding ``extra`` directives to the location."""
        return cls(
            f"location / {{ proxy_pass {upstream}; proxy_set_header Host $http_host; {extra} }}"
            " client_max_body_size 0;"
        )

    @classmethod
    def without_ranges(cls, upstream: str) -> Nginx:
        """In front of another server, answering 200 to every Range."""
        return cls.proxy(upstream, 'proxy_set_header Range ""; max_ranges 0; proxy_force_ranges off;')

    @classmethod
    def limited(cls, upstream: str, rate: int, burst: int) -> Nginx:
        """In front of another server, with so many requests a second, and so many above that at once, and
        429 for all others."""
        front = cls.proxy(upstream, f"limit_req zone=all burst={burst} nodelay; limit_req_status 429;")
        front.outside = f"limit_req_zone $binary_remote_addr zone=all:1m rate={rate}r/s;"
        return front

    def command(self) -> Sequence[str]:
        temporary = "".join(
            f"{kind}_temp_path {self.directory}/{kind};"
            for kind in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
        )
        listen = f"listen {self.authority};"
        if self.tls:
            chain, key = self.tls
            listen = f"listen {self.authority} ssl; ssl_certificate {chain}; ssl_certificate_key {key};"
        path = self.directory / "nginx.conf"
        path.write_text(
            f"daemon off; master_process off; pid {self.directory}/pid; error_log stderr info;\n"
            "events {}\n"
            f"http {{ access_log {self.directory}/access.log; {temporary} keepalive_requests 100000;\n"
            f"{self.outside}\n"
            f"server {{ {listen} {self.directives} }} }}\n"
        )
        return [tool("nginx"), "-p", str(self.directory), "-c", str(path), "-e", "stderr"]

    @property
    def accesses(self) -> list[str]:
        """A line for each request answered."""
        return (self.directory / "access.log").read_text().splitlines()


@attrs.define(eq=False)
class Tinyproxy(Process):
    """A forward proxy for ``user``, USER:PASSWORD, or for anybody; ``directives`` are lines of its own
    configuration."""

    user: str = ""
    directives: str = ""

    def command(self) -> Sequence[str]:
        path = self.directory / "tinyproxy.conf"
        login = f"BasicAuth {self.user.replace(':', ' ', 1)}\n" if self.user else ""
        path.write_text(
            f"Port {self.port}\nListen 127.0.0.1\nTimeout 600\nLogLevel Info\n{login}{self.directives}\n"
        )
        return [tool("tinyproxy"), "-d", "-c", str(path)]


@attrs.define(eq=False)
class TokenServer(ThreadServer):
    """Gives out bearer tokens that a `DockerRegistry` with `registry_auth` accepts.

    It runs in a thread, so it also answers while a test blocks. Without ``users`` anyone may pull and push.
    ``lifetime`` is in seconds; `granted` counts the tokens, `tokens` are they, and `granted_at` says when, by
    `time.monotonic`. Who posts the ``identity`` token as an OAuth2
    refresh token gets one too, and another identity token, which is the only one that counts from then on.
    """

    users: Mapping[str, str] = attrs.field(factory=dict)
    lifetime: int = 60
    answer_key: str = "token"
    identity: str = ""
    tokens: list[str] = attrs.field(init=False, factory=list)
    granted_at: list[float] = attrs.field(init=False, factory=list)
    identities: list[str] = attrs.field(init=False, factory=list)
    """The identity tokens that it gave out."""
    refused: int = attrs.field(init=False, default=0)
    directory: Path = attrs.field(init=False)
    _key: Any = attrs.field(init=False)
    _certificate: Any = attrs.field(init=False)

    protocol = "HTTP/1.0"
    service = "test-registry"
    issuer = "test-issuer"

    @property
    def granted(self) -> int:
        return len(self.tokens)

    @property
    def realm(self) -> str:
        return f"{self.url}/token"

    @property
    def registry_auth(self) -> dict[str, Any]:
        """The ``auth`` section that makes docker-registry trust this server."""
        bundle = self.directory / "issuer.pem"
        return {
            "token": {
                "realm": self.realm,
                "service": self.service,
                "issuer": self.issuer,
                "rootcertbundle": str(bundle),
            }
        }

    def __enter__(self) -> Self:
        self.directory = Path(tempfile.mkdtemp(prefix="erofs-twisted-test-"))
        self.change_key()
        return super().__enter__()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        super().__exit__(kind, error, trace)
        shutil.rmtree(self.directory)

    def change_key(self) -> None:
        """Sign with a new key from now on; a registry must be started again to know it."""
        from tests.certificates import make_authority, pem

        self._key, self._certificate = make_authority("token issuer")
        (self.directory / "issuer.pem").write_bytes(pem(self._certificate))

    def authorization(self, repository: str, actions: Sequence[str] = ("pull", "push")) -> dict[str, str]:
        """Headers that let a pusher in."""
        scope = f"repository:{repository}:{','.join(actions)}"
        return {"Authorization": f"Bearer {self._token([scope], 600)}"}

    def answer(self, request: BaseHTTPRequestHandler) -> None:
        """Answer one request for a token, as the token specification says."""
        if request.command == "POST":
            self._answer_form(request)
            return
        if not self._lets_in(request.headers.get("Authorization")):
            self.refused += 1
            request.send_error(401)
            return
        self._grant(request, parse_qs(urlsplit(request.path).query).get("scope", []))

    def _answer_form(self, request: BaseHTTPRequestHandler) -> None:
        """Answer one request by OAuth2."""
        form = parse_qs(request.rfile.read(int(request.headers["Content-Length"])).decode())
        if form["grant_type"] != ["refresh_token"] or form["refresh_token"] != [self.identity]:
            self.refused += 1
            request.send_error(401)
            return
        self.identity = uuid.uuid4().hex
        self.identities.append(self.identity)
        self._grant(request, form["scope"][0].split(), refresh_token=self.identity)

    def _grant(self, request: BaseHTTPRequestHandler, scopes: Sequence[str], **more: str) -> None:
        token = self._token(scopes, self.lifetime)
        self.tokens.append(token)
        self.granted_at.append(time.monotonic())
        body = json.dumps({self.answer_key: token, "expires_in": self.lifetime, **more})
        request.send_response(200)
        request.send_header("Content-Type", "application/json")
        request.send_header("Content-Length", str(len(body)))
        request.end_headers()
        request.wfile.write(body.encode())

    def _lets_in(self, authorization: str | None) -> bool:
        if not self.users:
            return True
        scheme, _, encoded = (authorization or "").partition(" ")
        if scheme != "Basic":
            return False
        user, _, password = base64.b64decode(encoded).decode().partition(":")
        return self.users.get(user) == password

    def _token(self, scopes: Sequence[str], lifetime: int) -> str:
        import jwt
        from cryptography.hazmat.primitives.serialization import Encoding

        access = []
        for scope in scopes:
            kind, name, actions = scope.split(":", 2)
            access.append({"type": kind, "name": name, "actions": actions.split(",")})
        now = int(time.time())
        claims = {
            "iss": self.issuer,
            "sub": "test",
            "aud": self.service,
            "iat": now,
            "nbf": now - 10,
            "exp": now + lifetime,
            "jti": uuid.uuid4().hex,
            "access": access,
        }
        chain = [base64.b64encode(self._certificate.public_bytes(Encoding.DER)).decode()]
        return jwt.encode(claims, self._key, algorithm="RS256", headers={"x5c": chain})


@attrs.define(eq=False)
class SignedURLs(ThreadServer):
    """Redirects every request for a blob to a CDN, by a URL that expires: what is before an object store.

    The CDN is an `Nginx` with `directives`. The parameter ``name`` of a URL says until when it works: for 1
    to 2 seconds. It runs in a thread. `given` are the queries of the URLs that it gave out, `given_at` says
    when, by `time.monotonic`.
    """

    name: str = "Expires"
    given: list[str] = attrs.field(init=False, factory=list)
    given_at: list[float] = attrs.field(init=False, factory=list)
    cdn: str = attrs.field(init=False, default="")
    """The URL of the CDN; set it before the first request."""

    LET_IN = "auth_request /let-in;"
    """For `front`: its blobs are for those whom the registry lets in."""
    _SECRET = "swordfish"

    def directives(self, root: Path) -> str:
        """For an nginx that serves the files below ``root`` to those whose URL is right and not too old."""
        argument = f"$arg_{self.name.lower()}"
        return (
            f"root {root}; secure_link $arg_signature,{argument}; "
            f'secure_link_md5 "{argument}$uri {self._SECRET}"; '
            'if ($secure_link = "") { return 401; } if ($secure_link = "0") { return 403; }'
        )

    def front(self, registry: str, behind: str = "") -> Nginx:
        """A server that answers as the registry at a URL does, but for blobs, which are ours; ``behind`` are
        directives for them."""
        return Nginx(
            f"location ~ ^/v2/.*/blobs/ {{ {behind} proxy_pass {self.url}; }} "
            f"location / {{ proxy_pass {registry}; proxy_set_header Host $http_host; }} "
            f"location = /let-in {{ internal; proxy_pass {registry}/v2/; proxy_set_header Host $http_host; "
            "proxy_pass_request_body off; }"
        )

    def answer(self, request: BaseHTTPRequestHandler) -> None:
        """Send a reader on."""
        request.send_response(307)
        request.send_header("Location", self._sign(request.path))
        request.send_header("Content-Length", "0")
        request.end_headers()

    def _sign(self, path: str) -> str:
        path = "/" + path.rpartition(":")[2]
        # nginx lets in until the second that it names is over.
        expires = str(int(time.time()) + 2)
        digest = hashlib.md5(f"{expires}{path} {self._SECRET}".encode(), usedforsecurity=False).digest()
        signature = base64.urlsafe_b64encode(digest).decode().rstrip("=")
        query = f"{self.name}={expires}&signature={signature}&number={len(self.given)}"
        self.given.append(query)
        self.given_at.append(time.monotonic())
        return f"{self.cdn}{path}?{query}"
