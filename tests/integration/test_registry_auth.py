"""Authentication at docker-registry: tokens from a token server, short-lived ones too, and htpasswd."""

from __future__ import annotations

import json
import os
from collections.abc import AsyncIterator, Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import pytest_twisted
from twisted.internet import reactor
from twisted.internet.defer import Deferred, gatherResults
from twisted.internet.task import deferLater

from erofs_twisted.registry.credentials import Credentials
from erofs_twisted.registry.dockerconfig import LoginFiles
from erofs_twisted.registry.errors import AccessDenied
from erofs_twisted.registry.platform import Platform
from erofs_twisted.registry.reference import parse_reference
from erofs_twisted.registry.settings import RegistrySettings
from erofs_twisted.registry.store import open_store
from tests.images import EROFS, Layout, push
from tests.servers import DockerRegistry, TokenServer

CONTENT = os.urandom(2_000_000)
ALICE = Credentials("alice", "secret")
AMD64 = Platform.parse("linux/amd64")

Opener = Callable[..., Any]


@pytest_twisted.async_yield_fixture
async def open_image() -> AsyncIterator[Opener]:
    """Opens the store of ``team/app:1`` at a registry; all are closed at the end."""
    stores: list[Any] = []

    def open_one(
        registry: DockerRegistry, credentials: Credentials | None = None, logins: LoginFiles | None = None
    ) -> Any:
        reference = parse_reference(f"{registry.authority}/team/app:1")
        settings = RegistrySettings(credentials=credentials, logins=logins)
        pool: Any = reactor.getThreadPool()  # type: ignore[attr-defined]
        stores.append(open_store(reactor, reference, settings, pool=pool))
        return stores[-1]

    yield open_one
    for store in stores:
        await store.close()


@pytest.fixture
def start(tmp_path: Path) -> Any:
    """Starts a registry with ``team/app:1`` behind a token server, or behind ``users``."""
    layout = Layout(tmp_path / "layout")
    entry = layout.manifest([layout.blob(CONTENT, EROFS)])
    with ExitStack() as servers:

        def start_one(tokens: TokenServer | None = None) -> DockerRegistry:
            if tokens is None:
                registry = servers.enter_context(DockerRegistry(users={"alice": "secret"}))
                headers = {"Authorization": ALICE.authorization()}
            else:
                servers.enter_context(tokens)
                registry = servers.enter_context(DockerRegistry(auth=tokens.registry_auth))
                headers = tokens.authorization("team/app")
            push(layout, entry, registry.url, "team/app:1", headers=headers)
            return registry

        yield start_one


async def check(reader: Any, offset: int, length: int) -> None:
    got: list[bytes] = []
    await reader.read(offset, length, got.append)
    assert b"".join(got) == CONTENT[offset : offset + length]


async def open_layer(store: Any) -> Any:
    image = await store.resolve(AMD64)
    return store.blob(image.layers[0])


@pytest_twisted.ensureDeferred
async def test_an_anonymous_token_serves_the_manifest_and_the_blob(start: Any, open_image: Opener) -> None:
    tokens = TokenServer()
    reader = await open_layer(open_image(start(tokens)))
    await check(reader, 1000, 100_000)
    assert tokens.granted == 1


@pytest_twisted.ensureDeferred
async def test_a_token_may_be_called_access_token(start: Any, open_image: Opener) -> None:
    reader = await open_layer(open_image(start(TokenServer(answer_key="access_token"))))
    await check(reader, 0, 10)


@pytest_twisted.ensureDeferred
async def test_reading_goes_on_when_tokens_expire(start: Any, open_image: Opener) -> None:
    tokens = TokenServer(lifetime=1)
    reader = await open_layer(open_image(start(tokens)))
    for round_ in range(4):
        await gatherResults(
            [Deferred.fromCoroutine(check(reader, 1000 * part + round_, 1000)) for part in range(8)]
        )
        await deferLater(reactor, 1.1)
    assert 3 <= tokens.granted <= 5, "one a round, however many reads wait for it"


@pytest_twisted.ensureDeferred
async def test_a_token_that_the_registry_no_longer_takes_is_renewed(start: Any, open_image: Opener) -> None:
    tokens = TokenServer()
    registry = start(tokens)
    reader = await open_layer(open_image(registry))
    reader_of_all = [Deferred.fromCoroutine(check(reader, 0, 1000))]
    await gatherResults(reader_of_all)
    tokens.change_key()
    registry.stop()
    registry.start()
    await gatherResults([Deferred.fromCoroutine(check(reader, 1000 * part, 1000)) for part in range(8)])
    assert tokens.granted == 2


@pytest_twisted.ensureDeferred
async def test_a_user_gets_a_token(start: Any, open_image: Opener) -> None:
    tokens = TokenServer(users={"alice": "secret"})
    reader = await open_layer(open_image(start(tokens), ALICE))
    await check(reader, 5, 10)


@pytest_twisted.ensureDeferred
async def test_a_token_server_that_wants_a_user_names_the_options(start: Any, open_image: Opener) -> None:
    registry = start(TokenServer(users={"alice": "secret"}))
    with pytest.raises(AccessDenied, match="--username and --password-file"):
        await open_layer(open_image(registry))


@pytest_twisted.ensureDeferred
async def test_a_wrong_password_is_said_and_not_shown(start: Any, open_image: Opener) -> None:
    tokens = TokenServer(users={"alice": "secret"})
    registry = start(tokens)
    with pytest.raises(AccessDenied, match="refuses this user name and password") as refused:
        await open_layer(open_image(registry, Credentials("alice", "guess")))
    assert "guess" not in str(refused.value)
    assert tokens.refused == 1


@pytest_twisted.ensureDeferred
async def test_basic_authentication_lets_a_user_in(start: Any, open_image: Opener) -> None:
    reader = await open_layer(open_image(start(), ALICE))
    await check(reader, 1_000_000, 1_000_000)


@pytest_twisted.ensureDeferred
async def test_basic_authentication_without_a_user_names_the_options(start: Any, open_image: Opener) -> None:
    registry = start()
    with pytest.raises(AccessDenied, match="--username and --password-file"):
        await open_layer(open_image(registry))


@pytest_twisted.ensureDeferred
async def test_basic_authentication_with_a_wrong_password_is_said(start: Any, open_image: Opener) -> None:
    registry = start()
    with pytest.raises(AccessDenied, match="wrong user name or password"):
        await open_layer(open_image(registry, Credentials("alice", "guess")))


@pytest_twisted.ensureDeferred
async def test_a_login_with_an_identity_token_lasts_though_the_server_replaces_it(
    start: Any, open_image: Opener, tmp_path: Path
) -> None:
    tokens = TokenServer(users={"alice": "secret"}, lifetime=1, identity="first")
    registry = start(tokens)
    file = tmp_path / "config.json"
    file.write_text(json.dumps({"auths": {registry.authority: {"identitytoken": "first"}}}))
    reader = await open_layer(open_image(registry, logins=LoginFiles((str(file),), is_named=True)))
    for round_ in range(3):
        await check(reader, 1000 * round_, 1000)
        await deferLater(reactor, 1.1)
    assert tokens.granted >= 3
    assert tokens.refused == 0
