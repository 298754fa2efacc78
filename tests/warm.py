"""Programs without the time that imports take: daemons, which may be killed at a step of theirs, and
``erofs-nbd``; a process of its own.

    python -m tests.warm

It has imported what they need, but no reactor, and forks one for each command. Commands are JSON objects, one
a line, on standard input; each is answered by one, ``{"pid": N}``. The end of standard input ends this
process, and none of those.

    {"arguments": [ARGUMENT…], "log": PATH, "steps": PATH, "die_after": STEP or null, "scarcity": PATH}

``arguments`` are those of ``twistd -n erofs-nbd``. The daemon is an orphan when the answer comes. It writes
the steps that it has come to into ``steps``, one a line, and kills itself by SIGKILL after ``die_after``. As
long as there is a file ``scarcity``, the calls that it names find no memory; see `tests.scarcity`. None of
the three must be given. It has no command that it could begin anew by, so it cannot be upgraded.

    {"words": [WORD…], "directory": PATH, "said": [PATH, PATH]}

``words`` are those of ``erofs-nbd``, which runs in ``directory`` with its output and its errors in files.
"""

from __future__ import annotations

import atexit
import functools
import importlib
import inspect
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from threading import Lock
from typing import Any

import attrs

from tests.daemon import PATIENCE, PROJECT, Daemon, exit_status, until
from tests.scarcity import Scarcity, find_attribute, without_memory

STEPS = (
    "erofs_twisted.state.journal.Journal.claim",
    "erofs_twisted.state.journal.replace_file",
    "erofs_twisted.state.journal.MountState.release",
    "erofs_twisted.mount.mountpoint._prepare",
    "erofs_twisted.mount.mountpoint.mount",
    "erofs_twisted.mount.mountpoint.umount",
    "erofs_twisted.taking.find_image",
    "erofs_twisted.device.driver._request",
    "erofs_twisted.device.driver._set",
    "erofs_twisted.device.fuse.FuseConnector._make_directory",
    "erofs_twisted.device.fuse._make_mountable",
    "erofs_twisted.device.fuse._unmount",
    "erofs_twisted.device.fuse._remove_directory",
    "erofs_twisted.device.nbdfuse.NBDFuse.start",
    "erofs_twisted.image.OpenImage.check",
    "erofs_twisted.image.OpenImage.close",
    "erofs_twisted.nbd.server.NBDServer.stop",
)
"""What may leave something behind, and what stands beside that: each is a step, known by the last word of its
name and by how often it was taken."""

NEEDED = (
    "erofs_twisted.cli",
    "erofs_twisted.control.client",
    "erofs_twisted.listing",
    "erofs_twisted.reattaching",
    "erofs_twisted.tap",
    "erofs_twisted.reclaiming",
    "erofs_twisted.supervising",
    "erofs_twisted.service",
    "erofs_twisted.mountsservice",
    "erofs_twisted.registry.client",
    "erofs_twisted.registry.layout",
    "erofs_twisted.registry.logins",
    "erofs_twisted.registry.tls",
    "twisted.internet.epollreactor",
)


@attrs.define
class Steps:
    """Counts them, from `install` on."""

    path: str
    die_after: str | None
    _taken: Counter[str] = attrs.field(factory=Counter)

    def install(self) -> None:
        for name in STEPS:
            owner, attribute = find_attribute(name)
            setattr(owner, attribute, self._counted(attribute.strip("_"), getattr(owner, attribute)))

    def _counted(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        if inspect.iscoroutinefunction(call):

            @functools.wraps(call)
            async def counted(*arguments: Any, **keywords: Any) -> Any:
                result = await call(*arguments, **keywords)
                self._took(name)
                return result
        else:

            @functools.wraps(call)
            def counted(*arguments: Any, **keywords: Any) -> Any:
                result = call(*arguments, **keywords)
                self._took(name)
                return result

        return counted

    def _took(self, name: str) -> None:
        self._taken[name] += 1
        step = f"{name} {self._taken[name]}"
        with open(self.path, "a") as file:
            print(step, file=file)
        if step == self.die_after:
            os.kill(os.getpid(), signal.SIGKILL)


@attrs.define
class WarmProcess:
    """This module as a program, for as long as the process that asks it."""

    _process: subprocess.Popen[str] = attrs.field(init=False)
    _lock: Lock = attrs.field(init=False, factory=Lock)

    def __attrs_post_init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.warm"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=PROJECT,
        )
        atexit.register(self.end)

    def start(self, **command: Any) -> int:
        """The process number of a new one."""
        assert self._process.stdin is not None and self._process.stdout is not None
        with self._lock:
            print(json.dumps(command), file=self._process.stdin, flush=True)
            return int(json.loads(self._process.stdout.readline())["pid"])

    def end(self) -> None:
        self._process.communicate()


@functools.cache
def warm_process() -> WarmProcess:
    """The one of this process."""
    return WarmProcess()


@attrs.define
class Forked:
    """A process that `WarmProcess` has begun, with what `subprocess.Popen` says of its own."""

    pid: int
    _status: int | None = None

    def poll(self) -> int | None:
        if self._status is None:
            self._status = exit_status(self.pid)
        return self._status

    def wait(self, timeout: float = PATIENCE) -> int:
        until(f"the end of process {self.pid}", lambda: self.poll() is not None, timeout)
        assert self._status is not None
        return self._status


def warm_erofs_nbd(*words: str | Path, cwd: Path) -> subprocess.CompletedProcess[str]:
    """Run it to its end, whatever its status."""
    with tempfile.TemporaryDirectory() as home:
        said = [Path(home) / "output", Path(home) / "errors"]
        given = [str(word) for word in words]
        pid = warm_process().start(words=given, directory=str(cwd), said=[str(path) for path in said])
        process = Forked(pid)
        try:
            status = process.wait()
        except AssertionError:
            os.kill(pid, signal.SIGKILL)
            process.wait()
            raise
        return subprocess.CompletedProcess(given, status, *(path.read_text() for path in said))


@attrs.define(eq=False)
class WarmDaemon(Daemon):
    """A `Daemon` that is up at once, and dies after a step if it is told to. It writes no pidfile."""

    die_after: str | None = None
    below: str = ""
    """Where below the usual directory its mount point is."""

    @property
    def mountpoint(self) -> Path:
        return self.directory / "target" / self.below

    def start(self) -> None:
        command = self.command()
        self.steps_file.unlink(missing_ok=True)
        self.pid = warm_process().start(
            arguments=command[command.index("erofs-nbd") + 1 :],
            log=str(self.directory / "log"),
            steps=str(self.steps_file),
            die_after=self.die_after,
            scarcity=str(self.scarcity_file),
        )

    @property
    def scarcity_file(self) -> Path:
        return self.directory.with_suffix(".scarcity")

    def without_memory(
        self, *calls: str, error: str = "ENOMEM", times: int | None = None
    ) -> AbstractContextManager[None]:
        """For those calls; see `tests.scarcity.without_memory`."""
        return without_memory(self.scarcity_file, *calls, error=error, times=times)

    @property
    def steps_file(self) -> Path:
        return self.directory.with_suffix(".steps")

    def steps(self) -> list[str]:
        """Those that it has come to."""
        return self.steps_file.read_text().splitlines()


def main() -> None:
    for name in NEEDED:
        importlib.import_module(name)
    assert "twisted.internet.reactor" not in sys.modules, (
        "a reactor cannot be shared by those that are forked"
    )
    for line in sys.stdin:
        command = json.loads(line)
        reading, writing = os.pipe()
        child = os.fork()
        if child == 0:
            # Twice: so that whoever has asked for it becomes its parent.
            daemon = os.fork()
            if daemon == 0:
                os.close(reading)
                os.close(writing)
                if "words" in command:
                    call(**command)
                else:
                    serve(**command)
                return
            os.write(writing, str(daemon).encode())
            os._exit(0)
        os.close(writing)
        os.waitpid(child, 0)
        print(json.dumps({"pid": int(os.read(reading, 20))}), flush=True)
        os.close(reading)


def open_standard(*paths: str) -> None:
    """As standard input, output and errors."""
    for number, path in enumerate(paths):
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o600)
        os.dup2(descriptor, number)
        os.close(descriptor)


def call(words: list[str], directory: str, said: list[str]) -> None:
    """As the script that pip installs does it."""
    open_standard(os.devnull, *said)
    os.chdir(directory)
    from erofs_twisted.cli import main

    sys.argv = ["erofs-nbd", *words]
    main()


def serve(
    arguments: list[str],
    log: str,
    steps: str | None = None,
    die_after: str | None = None,
    scarcity: str | None = None,
) -> None:
    """As twistd does it."""
    os.setsid()
    open_standard(os.devnull, log, log)
    from twisted.logger import globalLogBeginner, textFileLogObserver

    from erofs_twisted.tap import Options, makeService

    globalLogBeginner.beginLoggingTo([textFileLogObserver(sys.stderr)], redirectStandardIO=False)
    if steps is not None:
        Steps(steps, die_after).install()
    if scarcity is not None:
        Scarcity(scarcity).install()
    options = Options()
    options.parseOptions(arguments)
    service: Any = makeService(options)
    from twisted.internet import reactor

    running: Any = reactor
    running.addSystemEventTrigger("before", "shutdown", service.stopService)
    service.startService()
    running.run()


if __name__ == "__main__":
    main()
