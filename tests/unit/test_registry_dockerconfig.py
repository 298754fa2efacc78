"""Docker's and Podman's files: which entry is a repository's, what it says, and that it is not shown."""

from __future__ import annotations

import base64
import contextlib
import json
from collections.abc import Mapping
from typing import Any

from hypothesis import given
from hypothesis import strategies as st
from twisted.trial.unittest import SynchronousTestCase

from erofs_twisted.registry.credentials import Credentials, Identity, IdentityToken, RegistryToken
from erofs_twisted.registry.dockerconfig import (
    InvalidDockerConfig,
    means_not_found,
    parse_docker_config,
    parse_helper_answer,
    server_of,
    standard_files,
)

HOST = "r.example:5000"
HUB = "https://index.docker.io/v1/"

HOSTS = st.from_regex(r"[a-z]{1,5}\.example(:[0-9]{1,4})?", fullmatch=True)
PATHS = st.lists(st.sampled_from("abc"), min_size=1, max_size=4).map("/".join)
NAMES = st.text(st.characters(exclude_characters=":", exclude_categories=["Cs"]), min_size=1).filter(
    lambda name: name != "<token>"
)
PASSWORDS = st.text(st.characters(exclude_categories=["Cs"])).filter(lambda text: not text.endswith("\0"))
ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=9),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=9), inner, max_size=3),
    max_leaves=9,
)


def auth(username: str, password: str) -> dict[str, str]:
    return {"auth": base64.b64encode(f"{username}:{password}".encode()).decode()}


def find(auths: Mapping[str, Any], registry: str = HOST, repository: str = "team/app") -> Identity | None:
    return parse_docker_config(json.dumps({"auths": auths}).encode()).identity(registry, repository)


class EntryTests(SynchronousTestCase):
    @given(NAMES, PASSWORDS)
    def test_name_and_password_are_those_that_were_encoded(self, username: str, password: str) -> None:
        self.assertEqual(Credentials(username, password), find({HOST: auth(username, password)}))

    def test_a_password_may_hold_colons(self) -> None:
        self.assertEqual(Credentials("me", "a:b:c"), find({HOST: auth("me", "a:b:c")}))

    def test_the_padding_of_base64_may_be_missing(self) -> None:
        self.assertEqual(Credentials("me", "word"), find({HOST: {"auth": "bWU6d29yZA"}}))

    def test_name_and_password_may_be_spelt_out(self) -> None:
        self.assertEqual(Credentials("me", "word"), find({HOST: {"username": "me", "password": "word"}}))

    def test_an_identity_token_counts_more_than_the_name_beside_it(self) -> None:
        entry = {"identitytoken": "it", **auth("00000000-0000-0000-0000-000000000000", "")}
        self.assertEqual(IdentityToken("it"), find({HOST: entry}))

    def test_the_name_token_makes_the_password_an_identity_token(self) -> None:
        self.assertEqual(IdentityToken("it"), find({HOST: auth("<token>", "it")}))

    def test_a_registry_token_counts_most(self) -> None:
        self.assertEqual(RegistryToken("rt"), find({HOST: {"registrytoken": "rt", "identitytoken": "it"}}))

    def test_an_entry_for_a_helpers_sake_is_nobody(self) -> None:
        self.assertIsNone(find({HOST: {}}))
        self.assertIsNone(find({HOST: {"auth": "", "email": "me@r.example"}}))

    def test_a_bad_entry_is_named_and_not_shown(self) -> None:
        for entry in (
            "hush", ["hush"], {"auth": "hush!"}, {"auth": base64.b64encode(b"hush").decode()},
            {"auth": base64.b64encode(b"hush\xff:").decode()}, {"auth": 7}, {"username": "hu:sh"},
            {"registrytoken": "hush hush"}, {"identitytoken": "hush\r\nX: y"}, {"password": "hush\ud800"},
        ):  # fmt: skip
            error: BaseException | None = self.assertRaises(InvalidDockerConfig, find, {HOST: entry})
            self.assertIn(HOST, str(error))
            while error is not None:
                self.assertNotIn("hush", repr(error))
                self.assertNotIn("aHVza", repr(error))
                error = error.__context__

    def test_a_bad_entry_of_another_registry_does_no_harm(self) -> None:
        self.assertEqual(Credentials("me", "word"), find({"other.example": 7, HOST: auth("me", "word")}))


class KeyTests(SynchronousTestCase):
    def found(self, *keys: str, registry: str = HOST, repository: str = "team/app") -> str | None:
        """Which of the keys' entries is taken."""
        identity = find({key: auth(key.replace(":", "_"), "") for key in keys}, registry, repository)
        assert identity is None or isinstance(identity, Credentials)
        return next((key for key in keys if identity and key.replace(":", "_") == identity.username), None)

    @given(HOSTS, PATHS, st.data())
    def test_the_longest_key_that_is_a_prefix_wins(self, host: str, path: str, data: st.DataObject) -> None:
        parts = path.split("/")
        prefixes = [host] + [f"{host}/" + "/".join(parts[:count]) for count in range(1, len(parts) + 1)]
        chosen = data.draw(st.lists(st.sampled_from(prefixes), min_size=1, unique=True))
        others = data.draw(st.lists(st.sampled_from(["other", f"{host}/{path}/more", f"{host}/{path}x"])))
        keys = list(dict.fromkeys(data.draw(st.permutations(chosen + others))))
        self.assertEqual(max(chosen, key=len), self.found(*keys, registry=host, repository=path))

    def test_half_a_component_is_no_prefix(self) -> None:
        self.assertIsNone(self.found(f"{HOST}/te", "r.example"))

    def test_another_port_is_another_registry(self) -> None:
        self.assertIsNone(self.found("r.example", "r.example:443"))

    def test_addresses_of_old_times_are_their_hosts(self) -> None:
        for key in (
            f"https://{HOST}",
            f"http://{HOST}/v1/",
            f"{HOST}/v2/",
            f"https://{HOST}/api/x",
            f"HTTPS://{HOST}/",
        ):
            self.assertEqual(key, self.found(key))

    def test_the_plain_name_is_taken_before_an_address(self) -> None:
        self.assertEqual(HOST, self.found(f"https://{HOST}/v1/", HOST))

    def test_case_of_a_host_means_nothing(self) -> None:
        self.assertEqual("R.Example:5000", self.found("R.Example:5000"))

    def test_an_empty_entry_does_not_hide_the_next(self) -> None:
        found = find({f"{HOST}/team": {}, HOST: {}, f"https://{HOST}": auth("me", "word")})
        self.assertEqual(Credentials("me", "word"), found)

    def test_docker_hub_has_many_names(self) -> None:
        names = (HUB, "docker.io", "index.docker.io", "https://registry-1.docker.io/v2/", "docker.io/library")
        for key in names:
            self.assertEqual(key, self.found(key, registry="docker.io", repository="library/app"))
        self.assertIsNone(self.found("hub.docker.com", registry="docker.io", repository="library/app"))


class FileTests(SynchronousTestCase):
    @given(st.binary(max_size=40) | ANYTHING.map(lambda value: json.dumps(value).encode()))
    def test_whatever_a_file_holds_it_is_read_or_refused(self, data: bytes) -> None:
        try:
            config = parse_docker_config(data)
            config.helper(HOST, "a")
            config.identity(HOST, "a")
        except InvalidDockerConfig:
            pass

    @given(ANYTHING, ANYTHING, ANYTHING)
    def test_whatever_its_fields_hold_they_are_read_or_refused(
        self, auths: Any, helpers: Any, store: Any
    ) -> None:
        fields = {"auths": {HOST: auths}, "credHelpers": {HOST: helpers}, "credsStore": store}
        config = parse_docker_config(json.dumps(fields).encode())
        for look in (config.helper, config.identity):
            with contextlib.suppress(InvalidDockerConfig):
                look(HOST, "a")

    def test_what_is_deeply_nested_is_refused(self) -> None:
        self.assertRaises(InvalidDockerConfig, parse_docker_config, b'{"auths":' + b"[" * 100_000)

    def test_a_file_may_say_nothing_and_other_things(self) -> None:
        for text in ("{}", '{"auths": null, "HttpHeaders": {"X": "y"}}', "\ufeff{}"):
            config = parse_docker_config(text.encode())
            self.assertIsNone(config.identity(HOST, "a"))
            self.assertIsNone(config.helper(HOST, "a"))

    def test_its_repr_shows_no_secret(self) -> None:
        entries = {HOST: {"auth": "aHVzaA==", "password": "hush"}}
        self.assertNotIn("aHV", repr(parse_docker_config(json.dumps({"auths": entries}).encode())))

    def test_a_registrys_own_helper_is_asked_before_that_for_all(self) -> None:
        config = parse_docker_config(b'{"credsStore": "all", "credHelpers": {"r.example:5000": "own"}}')
        self.assertEqual("own", config.helper(HOST, "a"))
        self.assertEqual("all", config.helper("other.example", "a"))

    def test_a_helper_is_no_path(self) -> None:
        for name in ("../../tmp/x", "/bin/sh", "a b", "-x", "x\0"):
            config = parse_docker_config(json.dumps({"credsStore": name}).encode())
            self.assertRaises(InvalidDockerConfig, config.helper, HOST, "a")


class HelperAnswerTests(SynchronousTestCase):
    def test_an_answer_has_name_and_secret(self) -> None:
        answer = b'{"ServerURL": "r.example", "Username": "me", "Secret": "word"}\n'
        self.assertEqual(Credentials("me", "word"), parse_helper_answer(answer))

    def test_the_name_token_means_an_identity_token(self) -> None:
        self.assertEqual(IdentityToken("it"), parse_helper_answer(b'{"Username": "<token>", "Secret": "it"}'))

    def test_an_empty_answer_is_nobody(self) -> None:
        self.assertIsNone(parse_helper_answer(b'{"Username": "", "Secret": ""}'))

    @given(st.binary(max_size=40) | ANYTHING.map(lambda value: json.dumps(value).encode()))
    def test_whatever_it_prints_is_read_or_refused(self, data: bytes) -> None:
        with contextlib.suppress(InvalidDockerConfig):
            parse_helper_answer(data)

    def test_what_is_not_found_is_told_from_what_failed(self) -> None:
        self.assertTrue(means_not_found(b"credentials not found in native keychain\n"))
        self.assertFalse(means_not_found(b"error getting credentials: exec: gpg: not found\n"))

    def test_docker_hub_is_asked_for_by_its_address(self) -> None:
        self.assertEqual(
            [HUB, HUB, HOST], [server_of(name) for name in ("docker.io", "index.docker.io", HOST)]
        )


class PlaceTests(SynchronousTestCase):
    def test_files_are_where_docker_and_podman_put_them(self) -> None:
        self.assertEqual(
            (
                "/run/containers/7/auth.json",
                "/home/me/.config/containers/auth.json",
                "/home/me/.docker/config.json",
            ),
            standard_files({}, "/home/me", 7).paths,
        )

    def test_what_the_environment_names_comes_first(self) -> None:
        environ = {
            "DOCKER_CONFIG": "/docker",
            "REGISTRY_AUTH_FILE": "/podman.json",
            "CREDENTIALS_DIRECTORY": "/run/credentials/x",
            "XDG_RUNTIME_DIR": "/run/user/7",
            "XDG_CONFIG_HOME": "/config",
        }
        self.assertEqual(
            (
                "/run/credentials/x/erofs-nbd.auth.json",
                "/podman.json",
                "/docker/config.json",
                "/run/user/7/containers/auth.json",
                "/config/containers/auth.json",
            ),
            standard_files(environ, "/home/me", 7).paths,
        )

    def test_an_empty_variable_names_nothing(self) -> None:
        empty = dict.fromkeys(("DOCKER_CONFIG", "REGISTRY_AUTH_FILE", "CREDENTIALS_DIRECTORY"), "")
        self.assertEqual(standard_files({}, "/h", 0), standard_files(empty, "/h", 0))
