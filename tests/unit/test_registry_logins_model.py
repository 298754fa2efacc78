"""The keychain of logins against a model, over any history of two files and a helper."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from pathlib import Path
from unittest import mock

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, rule, run_state_machine_as_test
from twisted.internet.defer import Deferred
from twisted.python.failure import Failure
from twisted.trial.unittest import SynchronousTestCase

from erofs_twisted.registry.credentialhelper import HelperFailed
from erofs_twisted.registry.credentials import Credentials, Identity
from erofs_twisted.registry.dockerconfig import LoginFiles
from erofs_twisted.registry.logins import PAUSE, Logins
from tests.unit.test_registry_logins import HOST, FakeHelper, auths
from tests.unit.threadless import HeldPool, ThreadlessReactor

USERS = {name: Credentials(name, f"hush-{name}") for name in ("alice", "bob", "carol")}
WHO = st.sampled_from([None, *USERS])
BROKEN = "broken"


class AnsweringReactor(ThreadlessReactor):
    """Its helper answers at once: as one of the users, that it knows nobody, or not at all."""

    def __init__(self) -> None:
        super().__init__()
        self.answer: str | None = None
        self.has_helped = False
        self._ran_at = -PAUSE

    def spawnProcess(self, protocol: object, executable: str, args: list[str], env: object) -> None:
        assert self.seconds() >= self._ran_at + PAUSE, "it is asked too often"
        self._ran_at = self.seconds()
        run = FakeHelper(protocol, args, env)
        if self.answer == BROKEN:
            run.end(b"the cloud is away\n", 1)
        elif self.answer is None:
            run.end(b"credentials not found in native keychain\n", 1)
        else:
            self.has_helped = True
            run.give(USERS[self.answer])


class LoginsMachine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.directory = Path(tempfile.mkdtemp(prefix="logins-"))
        (self.directory / "docker-credential-keys").touch(0o755)
        self.environment = mock.patch.dict(os.environ, PATH=str(self.directory))
        self.environment.start()
        self.files = [self.directory / "first.json", self.directory / "second.json"]
        self.reactor = AnsweringReactor()
        files = LoginFiles(tuple(map(str, self.files)))
        self.keychain = Logins(self.reactor, HeldPool(held=False), files, HOST, "team/app")
        self.contents: list[tuple[bool, str | None] | str | None] = [None, None]
        """Of each file: does it name the helper, and whom has it itself; or it is broken, or not there."""
        self.counting: list[tuple[bool, str | None] | None] = [None, None]
        """What counts for the keychain, since it looked last."""

    def teardown(self) -> None:
        self.environment.stop()
        shutil.rmtree(self.directory)

    @rule(which=st.integers(0, 1), helper=st.booleans(), who=WHO)
    def write(self, which: int, helper: bool, who: str | None) -> None:
        config = {} if who is None else auths(USERS[who])
        if helper:
            config["credsStore"] = "keys"
        self._put(which, json.dumps(config))
        self.contents[which] = (helper, who)

    @rule(which=st.integers(0, 1))
    def spoil(self, which: int) -> None:
        self._put(which, '{"auths": {')
        self.contents[which] = BROKEN

    @rule(which=st.integers(0, 1))
    def remove(self, which: int) -> None:
        self.files[which].unlink(missing_ok=True)
        self.contents[which] = None

    @rule(answer=WHO | st.just(BROKEN))
    def change_helper(self, answer: str | None) -> None:
        self.reactor.answer = answer

    @rule(who=st.sampled_from(list(USERS)))
    def refuse(self, who: str) -> None:
        self.keychain.refused(USERS[who])

    @rule(seconds=st.sampled_from([0.1, PAUSE, 1000.0]))
    def wait(self, seconds: float) -> None:
        self.reactor.advance(seconds)

    @rule()
    def ask(self) -> None:
        """What it says may be old, but it says something, and asks nobody too often."""
        found = self._ask()
        assert found is None or isinstance(found, HelperFailed) or found in USERS.values()

    @rule()
    def ask_when_all_is_refused(self) -> None:
        """Then what it says is what is true now."""
        for who in USERS.values():
            self.keychain.refused(who)
        self.reactor.advance(PAUSE)
        found = self._ask()
        expected = self._true()
        if expected == BROKEN:
            assert isinstance(found, HelperFailed)
        else:
            assert found == (USERS[expected] if expected else None), (found, expected)

    def _true(self) -> str | None:
        for counts in self.counting:
            if counts is None:
                continue
            helper, who = counts
            answers = self.reactor.answer != BROKEN or self.reactor.has_helped
            if helper and answers and self.reactor.answer is not None:
                return self.reactor.answer
            if who is not None:
                return who
        return None

    def _ask(self) -> Identity | HelperFailed | None:
        for which, content in enumerate(self.contents):
            if content != BROKEN:
                assert not isinstance(content, str)
                self.counting[which] = content
        results: list[Identity | Failure | None] = []
        asked: Deferred[Identity | None] = self.keychain.credentials()
        asked.addBoth(results.append)
        (result,) = results
        if isinstance(result, Failure):
            result.trap(HelperFailed)
            assert isinstance(result.value, HelperFailed)
            return result.value
        return result

    def _put(self, which: int, text: str) -> None:
        temporary = self.directory / "temporary"
        temporary.write_text(text)
        temporary.rename(self.files[which])


class LoginsModelTests(SynchronousTestCase):
    def test_it_finds_what_the_model_finds(self) -> None:
        run_state_machine_as_test(  # type: ignore[no-untyped-call]
            LoginsMachine, settings=settings(max_examples=200, stateful_step_count=30, deadline=None)
        )
