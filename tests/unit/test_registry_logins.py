"""The keychain of Docker's and Podman's logins: what it reads, whom it asks, how often, and what it says."""

from __future__ import annotations

import base64
import json
import os
from pathlib import Path
from typing import Any

from twisted.internet.defer import CancelledError, Deferred
from twisted.internet.error import ProcessDone, ProcessExitedAlready, ProcessTerminated
from twisted.logger import LogEvent, LogLevel, formatEvent, globalLogPublisher
from twisted.python.failure import Failure
from twisted.trial.unittest import SynchronousTestCase
from zope.interface.verify import verifyObject

from erofs_twisted.registry import logins
from erofs_twisted.registry.credentialhelper import MAX_OUTPUT, PATIENCE, HelperFailed
from erofs_twisted.registry.credentials import Credentials, Identity, RegistryToken
from erofs_twisted.registry.dockerconfig import MAX_CONFIG, DockerConfig, LoginFiles, parse_docker_config
from erofs_twisted.registry.errors import AccessDenied
from erofs_twisted.registry.keychain import Given, IKeychain
from erofs_twisted.registry.logins import PAUSE, Logins
from tests.unit.threadless import HeldPool, ThreadlessReactor

HOST = "r.example"
ALICE, BOB = Credentials("alice", "hush-a"), Credentials("bob", "hush-b")


def auths(credentials: Credentials, host: str = HOST) -> dict[str, Any]:
    auth = base64.b64encode(f"{credentials.username}:{credentials.password}".encode()).decode()
    return {"auths": {host: {"auth": auth}}}


class FakeHelper:
    """A run of docker-credential-NAME: the transport of its protocol."""

    def __init__(self, protocol: Any, command: list[str], env: object) -> None:
        self.command, self.env = command, env
        self.input = b""
        self.is_told = self.is_killed = self.has_ended = self.is_let_go = False
        self._protocol = protocol
        protocol.makeConnection(self)

    def write(self, data: bytes) -> None:
        self.input += data

    def closeStdin(self) -> None:
        self.is_told = True

    def signalProcess(self, name: str) -> None:
        if self.has_ended:
            raise ProcessExitedAlready
        self.is_killed = name == "KILL"

    def loseConnection(self) -> None:
        self.is_let_go = True

    def end(self, output: bytes, status: int = 0, errors: bytes = b"") -> None:
        if errors:
            self._protocol.childDataReceived(2, errors)
        self._protocol.childDataReceived(1, output)
        self.has_ended = True
        self._protocol.processEnded(Failure(ProcessTerminated(status) if status else ProcessDone(0)))

    def give(self, who: Credentials) -> None:
        self.end(json.dumps({"ServerURL": "", "Username": who.username, "Secret": who.password}).encode())


class SpawningReactor(ThreadlessReactor):
    def __init__(self) -> None:
        super().__init__()
        self.runs: list[FakeHelper] = []

    def spawnProcess(self, protocol: Any, executable: str, args: list[str], env: object) -> None:
        assert executable == args[0]
        self.runs.append(FakeHelper(protocol, args, env))


class LoginsTests(SynchronousTestCase):
    def setUp(self) -> None:
        self.directory = Path(self.mktemp()).absolute()
        self.directory.mkdir()
        self.first, self.second = self.directory / "first.json", self.directory / "second.json"
        self.reactor, self.pool = SpawningReactor(), HeldPool(held=False)
        self.keychain = self.make()
        for name in ("keys", "other"):
            program = self.directory / f"docker-credential-{name}"
            program.touch(0o755)
        self.patch(os, "environ", {**os.environ, "PATH": str(self.directory)})
        self.events: list[LogEvent] = []
        globalLogPublisher.addObserver(self.events.append)
        self.addCleanup(globalLogPublisher.removeObserver, self.events.append)

    def make(self, *, is_named: bool = False, registry: str = HOST) -> Logins:
        paths = (self.first,) if is_named else (self.first, self.second)
        files = LoginFiles(tuple(map(str, paths)), is_named)
        self.keychain = Logins(self.reactor, self.pool, files, registry, "team/app")
        return self.keychain

    def write(self, file: Path, content: object) -> None:
        """As programs do: the new one takes the old one's place."""
        temporary = self.directory / "temporary"
        temporary.write_text(content if isinstance(content, str) else json.dumps(content))
        temporary.rename(file)

    def found(self) -> Identity | None:
        return self.successResultOf(self.keychain.credentials())

    def warnings(self) -> list[str]:
        return [formatEvent(event) for event in self.events if event["log_level"] is LogLevel.warn]


class InterfaceTests(LoginsTests):
    def test_keychains_are_keychains(self) -> None:
        for keychain in (self.keychain, Given(ALICE)):
            verifyObject(IKeychain, keychain)

    def test_what_was_given_stays(self) -> None:
        given = Given(ALICE)
        given.refused(ALICE)
        self.assertEqual(ALICE, self.successResultOf(given.credentials()))


class FileTests(LoginsTests):
    def test_where_nobody_has_logged_in_there_is_nobody_and_no_fuss(self) -> None:
        self.write(self.second, auths(ALICE, "other.example"))
        self.assertIsNone(self.found())
        self.assertEqual([], self.warnings())

    def test_the_first_file_that_knows_the_registry_wins(self) -> None:
        self.write(self.first, auths(BOB, "other.example"))
        self.write(self.second, auths(ALICE))
        self.assertEqual(ALICE, self.found())
        self.write(self.first, auths(BOB))
        self.assertEqual(BOB, self.found())

    def test_a_file_that_changed_is_read_again(self) -> None:
        self.write(self.first, auths(ALICE))
        self.found()
        self.write(self.first, auths(BOB))
        self.assertEqual(BOB, self.found())

    def test_a_file_that_did_not_change_is_not_parsed_again(self) -> None:
        self.write(self.first, auths(ALICE))
        self.found()
        self.patch(logins, "parse_docker_config", None)
        self.assertEqual(ALICE, self.found())

    def test_what_was_refused_makes_it_read_again_whatever_it_looks_like(self) -> None:
        self.write(self.first, auths(ALICE))
        self.found()
        parsed: list[bytes] = []

        def parse(data: bytes) -> DockerConfig:
            parsed.append(data)
            return parse_docker_config(data)

        self.patch(logins, "parse_docker_config", parse)
        self.keychain.refused(ALICE)
        self.assertEqual(ALICE, self.found())
        self.assertEqual(1, len(parsed))

    def test_a_file_that_is_not_needed_yet_counts_as_it_was_all_the_same(self) -> None:
        self.write(self.first, auths(ALICE))
        self.write(self.second, auths(BOB))
        self.found()
        self.first.unlink()
        self.second.write_text('{"auths": {')
        self.assertEqual(BOB, self.found())

    def test_after_a_logout_there_is_nobody(self) -> None:
        self.write(self.first, auths(ALICE))
        self.found()
        self.first.unlink()
        self.assertIsNone(self.found())

    def test_what_cannot_be_read_is_named_once_and_passed_over(self) -> None:
        self.write(self.second, auths(ALICE))
        for spoil in (
            lambda: self.write(self.first, '{"auths": {"r.example": {"auth": "hush'),
            lambda: self.write(self.first, " " * (MAX_CONFIG + 1)),
            lambda: self.write(self.first, {"auths": {HOST: {"auth": "hush"}}}),
            lambda: self.write(self.first, {"credsStore": "../hush"}),
            lambda: (self.first.unlink(), self.first.mkdir()),
        ):
            spoil()
            self.make()
            self.events.clear()
            self.assertEqual([ALICE, ALICE], [self.found(), self.found()])
            (warning,) = self.warnings()
            self.assertIn(str(self.first), warning)
            self.assertNotIn("hush", warning)

    def test_a_file_that_is_half_written_counts_as_it_was(self) -> None:
        self.write(self.first, auths(ALICE))
        self.found()
        self.first.write_text('{"auths": {')
        self.assertEqual(ALICE, self.found())
        self.write(self.first, auths(BOB))
        self.assertEqual(BOB, self.found())
        self.assertEqual(1, len(self.warnings()))

    def test_where_credentials_come_from_is_said_once_and_not_what_they_are(self) -> None:
        self.write(self.first, auths(ALICE))
        self.assertEqual([ALICE, ALICE], [self.found(), self.found()])
        (said,) = [formatEvent(event) for event in self.events if event["log_level"] is LogLevel.info]
        self.assertEqual(f"credentials for r.example: {self.first}", said)
        shown = repr(self.events) + repr(self.keychain)
        for secret in ("hush", "alice", base64.b64encode(b"alice:hush-a").decode()):
            self.assertNotIn(secret, shown)


class NamedFileTests(LoginsTests):
    """The one of --auth-file."""

    def setUp(self) -> None:
        super().setUp()
        self.make(is_named=True)

    def test_it_has_to_be_there_and_to_be_right(self) -> None:
        for content in (None, "[]", auths(ALICE) | {"credsStore": "/x"}):
            if content is not None:
                self.write(self.first, content)
            error = self.failureResultOf(self.keychain.credentials(), AccessDenied).value
            self.assertIn(f"--auth-file: {self.first}: ", str(error))

    def test_it_counts_as_it_was_when_it_goes(self) -> None:
        self.write(self.first, auths(ALICE))
        self.found()
        self.first.unlink()
        self.assertEqual(ALICE, self.found())
        self.assertIn("there is no such file", self.warnings()[0])

    def test_its_helper_has_to_answer(self) -> None:
        self.write(self.first, {"credsStore": "keys"})
        asked = self.keychain.credentials()
        self.reactor.runs[0].end(b"no keychain here\n", 1)
        error = self.failureResultOf(asked, HelperFailed).value
        self.assertEqual("docker-credential-keys failed: no keychain here", str(error))
        self.assertTrue(error.temporary)


class HelperTests(LoginsTests):
    def setUp(self) -> None:
        super().setUp()
        self.write(self.first, {"credsStore": "keys", **auths(BOB)})

    def asked(self) -> tuple[Deferred[Identity | None], FakeHelper]:
        before = len(self.reactor.runs)
        asked = self.keychain.credentials()
        self.assertEqual(before + 1, len(self.reactor.runs))
        return asked, self.reactor.runs[-1]

    def answered(self, who: Credentials = ALICE) -> None:
        asked, run = self.asked()
        run.give(who)
        self.assertEqual(who, self.successResultOf(asked))

    def test_it_is_given_the_registry_on_standard_input_and_no_secret_among_its_arguments(self) -> None:
        _, run = self.asked()
        self.assertEqual([str(self.directory / "docker-credential-keys"), "get"], run.command)
        self.assertEqual((b"r.example", True), (run.input, run.is_told))
        self.assertIsNone(run.env)

    def test_docker_hub_is_what_docker_calls_it(self) -> None:
        self.make(registry="docker.io")
        self.assertEqual(b"https://index.docker.io/v1/", self.asked()[1].input)

    def test_what_it_says_counts_more_than_the_file(self) -> None:
        self.answered(ALICE)

    def test_what_it_does_not_know_may_be_in_the_file(self) -> None:
        asked, run = self.asked()
        run.end(b"credentials not found in native keychain\n", 1)
        self.assertEqual(BOB, self.successResultOf(asked))
        self.assertEqual([], self.warnings())

    def test_it_is_asked_once_as_long_as_its_answer_is_accepted(self) -> None:
        self.answered()
        self.reactor.advance(1_000_000)
        self.assertEqual(ALICE, self.found())
        self.assertEqual(1, len(self.reactor.runs))

    def test_however_many_want_to_know_it_is_asked_once(self) -> None:
        asked, run = self.asked()
        others = [self.keychain.credentials() for _ in range(5)]
        run.give(ALICE)
        self.assertEqual([ALICE] * 6, [self.successResultOf(each) for each in (asked, *others)])

    def test_a_refused_answer_is_asked_for_again(self) -> None:
        self.answered(ALICE)
        self.reactor.advance(PAUSE)
        self.keychain.refused(ALICE)
        self.answered(BOB)
        self.assertEqual(BOB, self.found())

    def test_an_answer_that_others_got_refused_is_not(self) -> None:
        self.answered(ALICE)
        self.reactor.advance(PAUSE)
        self.keychain.refused(BOB)
        self.keychain.refused(RegistryToken("t"))
        self.assertEqual(ALICE, self.found())

    def test_a_registry_that_refuses_all_the_time_does_not_make_it_run_all_the_time(self) -> None:
        self.answered(ALICE)
        for _ in range(20):
            self.keychain.refused(ALICE)
            self.assertEqual(ALICE, self.found())
        self.assertEqual(1, len(self.reactor.runs))

    def test_one_that_fails_is_named_and_passed_over(self) -> None:
        for output, status, errors, said in (
            (b"gpg: no key\n", 1, b"", "docker-credential-keys failed: gpg: no key"),
            (b"", 127, b"warned\nno such keychain\n", "docker-credential-keys failed: no such keychain"),
            (b"", 1, b"", "docker-credential-keys failed: in silence"),
            (b'{"Secret": "hush"', 1, b"", "docker-credential-keys failed: in silence"),
            (b'["hush"]', 0, b"", "docker-credential-keys gave an answer that is none"),
        ):
            self.make()
            self.events.clear()
            asked, run = self.asked()
            run.end(output, status, errors)
            self.assertEqual(BOB, self.successResultOf(asked))
            (warning,) = self.warnings()
            self.assertIn(said, warning)
            self.assertNotIn("hush", warning)

    def test_one_that_is_not_installed_is_named(self) -> None:
        self.write(self.first, {"credHelpers": {HOST: "missing"}, **auths(BOB)})
        self.assertEqual(BOB, self.found())
        self.assertIn("docker-credential-missing is not in $PATH", self.warnings()[0])

    def test_one_in_the_current_directory_is_not_run(self) -> None:
        self.patch(os, "environ", {"PATH": ".::bin"})
        before = os.getcwd()
        os.chdir(self.directory)
        self.addCleanup(os.chdir, before)
        self.assertEqual(BOB, self.found())
        self.assertEqual([], self.reactor.runs)

    def test_one_that_hangs_is_ended(self) -> None:
        asked, run = self.asked()
        self.reactor.advance(PATIENCE)
        self.assertEqual(BOB, self.successResultOf(asked))
        self.assertEqual((True, True), (run.is_killed, run.is_let_go))
        self.assertIn("has not answered in 30 s", self.warnings()[0])
        run.end(b"", 9)

    def test_one_that_never_stops_talking_is_ended(self) -> None:
        asked, run = self.asked()
        run._protocol.childDataReceived(1, b"x" * (MAX_OUTPUT + 1))
        self.assertTrue(run.is_killed)
        run.end(b"", 9)
        self.assertEqual(BOB, self.successResultOf(asked))

    def test_who_waits_no_longer_ends_it(self) -> None:
        asked, run = self.asked()
        asked.cancel()
        self.failureResultOf(asked, CancelledError)
        self.assertTrue(run.is_killed)
        run.end(b"", 9)
        self.assertEqual([], self.flushLoggedErrors())

    def test_one_that_failed_is_asked_again_after_a_pause(self) -> None:
        asked, run = self.asked()
        run.end(b"", 1)
        self.successResultOf(asked)
        self.assertEqual(BOB, self.found())
        self.reactor.advance(PAUSE)
        self.answered(ALICE)

    def test_one_that_answered_before_and_fails_now_is_waited_for(self) -> None:
        self.answered(ALICE)
        self.reactor.advance(PAUSE)
        self.keychain.refused(ALICE)
        asked, run = self.asked()
        run.end(b"the cloud is away\n", 1)
        self.assertTrue(self.failureResultOf(asked, HelperFailed).value.temporary)
