"""A keychain of what others have logged in with: Docker's and Podman's files, and credential helpers."""

from __future__ import annotations

import os
import stat
from typing import Any

import attrs
from twisted.internet.defer import Deferred
from twisted.internet.threads import deferToThreadPool
from twisted.logger import Logger
from twisted.python.threadpool import ThreadPool
from zope.interface import implementer

from erofs_twisted.registry.credentials import Identity
from erofs_twisted.registry.dockerconfig import (
    MAX_CONFIG,
    DockerConfig,
    InvalidDockerConfig,
    LoginFiles,
    parse_docker_config,
    server_of,
)
from erofs_twisted.registry.errors import AccessDenied, RegistryError
from erofs_twisted.registry.keychain import IKeychain
from erofs_twisted.registry.shared import Shared

PAUSE = 5.0
"""Seconds after which a helper is asked again, if what it said is not accepted, or it said nothing."""

_Signature = tuple[int, ...]


@attrs.define
class _File:
    """One file: as it was seen last, and what it said when it could be read last."""

    signature: _Signature | None = None
    config: DockerConfig | None = None
    trouble: str = ""


@attrs.define
class _Answer:
    """What a helper said at a time."""

    asked_at: float
    identity: Identity | None = None
    failure: RegistryError | None = None
    is_refused: bool = False


@attrs.frozen
class _Seen:
    """What came of a look at a file: ``data`` is None if it is as before, or gone, or in ``trouble``."""

    signature: _Signature | None = None
    data: bytes | None = None
    trouble: str = ""


@implementer(IKeychain)
@attrs.define(eq=False)
class Logins:
    """For ``repository`` at ``registry``. Files that changed are read again, helpers asked again when what
    they said was refused. A file that cannot be read any more counts as it was.
    """

    _reactor: Any
    _pool: ThreadPool
    _files: LoginFiles
    _registry: str
    _repository: str
    _known: dict[str, _File] = attrs.field(init=False, factory=dict)
    _answers: dict[str, _Answer] = attrs.field(init=False, factory=dict)
    _helpful: set[str] = attrs.field(init=False, factory=set)
    """The helpers that have answered once: of these, a failure is no reason to look elsewhere."""
    _search: Shared[Identity | None] = attrs.field(init=False)
    _warned: dict[str, str] = attrs.field(init=False, factory=dict)
    source: str = attrs.field(init=False, default="")
    """As `IKeychain.source`."""
    _log = Logger()

    def __attrs_post_init__(self) -> None:
        self._search = Shared(self._find)

    def credentials(self) -> Deferred[Identity | None]:
        """As `IKeychain.credentials`."""
        return self._search.join()

    def refused(self, credentials: Identity) -> None:
        """As `IKeychain.refused`."""
        for answer in self._answers.values():
            if answer.identity == credentials:
                answer.is_refused = True
        for file in self._known.values():
            file.signature = None

    async def _find(self) -> Identity | None:
        before = {path: self._known.setdefault(path, _File()).signature for path in self._files.paths}
        seen = await deferToThreadPool(self._reactor, self._pool, _look_at_all, before)
        configs = {path: self._take(path, look) for path, look in seen.items()}
        for path, config in configs.items():
            if config is not None and (found := await self._find_in(path, config)) is not None:
                return found
        return None

    async def _find_in(self, path: str, config: DockerConfig) -> Identity | None:
        source = path
        try:
            found = None
            helper = config.helper(self._registry, self._repository)
            if helper is not None and (found := await self._ask(path, helper)) is not None:
                source = f"{path}, docker-credential-{helper}"
            found = found or config.identity(self._registry, self._repository)
        except InvalidDockerConfig as error:
            self._give_up(path, str(error))
            return None
        if found is not None and source != self.source:
            self._log.info("credentials for {registry}: {source}", registry=self._registry, source=source)
            self.source = source
        return found

    async def _ask(self, path: str, helper: str) -> Identity | None:
        """What a helper says now, or said. Raises `HelperFailed` where there is nothing in its place."""
        from erofs_twisted.registry.credentialhelper import HelperFailed, ask_helper

        before = self._answers.get(helper)
        now = self._reactor.seconds()
        if before is None or _is_stale(before, now):
            answer = _Answer(now)
            try:
                answer.identity = await ask_helper(self._reactor, helper, server_of(self._registry))
            except HelperFailed as error:
                answer.failure = error
            self._answers[helper] = answer
            if answer.identity is not None:
                self._helpful.add(helper)
        answer = self._answers[helper]
        if answer.failure is not None:
            if self._files.is_named or helper in self._helpful:
                raise answer.failure
            self._warn(path, str(answer.failure))
        return answer.identity

    def _take(self, path: str, seen: _Seen) -> DockerConfig | None:
        file = self._known[path]
        if seen.data is not None:
            try:
                file.config, file.trouble = parse_docker_config(seen.data), ""
                self._warned.pop(path, None)
            except InvalidDockerConfig as error:
                file.trouble = str(error)
        elif seen.trouble:
            file.trouble = seen.trouble
        elif seen.signature is None:
            file.trouble = "there is no such file" if self._files.is_named else ""
            file.config = file.config if self._files.is_named else None
        file.signature = seen.signature
        if file.trouble:
            if file.config is None:
                self._give_up(path, file.trouble)
            else:
                self._warn(path, f"{file.trouble}; what it said before still counts")
        return file.config

    def _give_up(self, path: str, trouble: str) -> None:
        if self._files.is_named:
            raise AccessDenied(f"--auth-file: {path}: {trouble}")
        self._warn(path, trouble)

    def _warn(self, path: str, trouble: str) -> None:
        """Once for each trouble, not each time that credentials are needed."""
        if self._warned.get(path) != trouble:
            self._warned[path] = trouble
            self._log.warn("credentials in {path} are passed over: {trouble}", path=path, trouble=trouble)


def _is_stale(answer: _Answer, now: float) -> bool:
    is_good = answer.identity is not None and not answer.is_refused
    return not is_good and now >= answer.asked_at + PAUSE


def _look_at_all(before: dict[str, _Signature | None]) -> dict[str, _Seen]:
    """In a thread: home directories may be far away."""
    return {path: _look_at(path, signature) for path, signature in before.items()}


def _look_at(path: str, before: _Signature | None) -> _Seen:
    try:
        with open(os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK), "rb") as file:
            found = os.fstat(file.fileno())
            if not stat.S_ISREG(found.st_mode):
                return _Seen(trouble="it is not a file")
            signature = (found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns)
            if signature == before:
                return _Seen(signature)
            data = file.read(MAX_CONFIG + 1)
    except (FileNotFoundError, NotADirectoryError):
        return _Seen()
    except OSError as error:
        return _Seen(trouble=error.strerror or "it cannot be read")
    return _Seen(signature, data) if len(data) <= MAX_CONFIG else _Seen(signature, trouble="it is too large")
