"""The project's programs without the time that imports take: a process of its own, which has imported what
they need, but no reactor, and forks one for each command.

    python -m tests.warm

Commands are JSON objects, one a line, on standard input; each is answered by one, ``{"pid": N}``. The end of
standard input ends this process, and none of those.

    {"command": [PATH, WORD…], "environment": {NAME: VALUE…}, "directory": PATH,
     "standard": [PATH, PATH, PATH], "steps": PATH, "die_after": STEP or null, "scarcity": PATH}

``command`` runs a script of Python's, such as pip makes of entry points, in a session of its own, with those
files as its standard input, output and errors. It is an orphan when the answer comes. It writes the steps
that it has come to into ``steps``, one a line, and kills itself by SIGKILL after ``die_after``. As long as
there is a file ``scarcity``, the calls that it names find no memory; see `tests.scarcity`. None of the last
three must be given.
"""

from __future__ import annotations

import atexit
import functools
import gc
import importlib
import inspect
import json
import os
import runpy
import signal
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from threading import Lock
from typing import Any

import attrs

from tests.processes import PATIENCE, PROJECT, exit_status, until
from tests.scarcity import Scarcity, find_attribute

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
    "twisted.scripts.twistd",
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
class Forked:
    """A process that `WarmProcess` has begun, with what `subprocess.Popen` says of its own."""

    pid: int
    returncode: int | None = None

    def poll(self) -> int | None:
        if self.returncode is None:
            self.returncode = exit_status(self.pid)
        return self.returncode

    def wait(self, timeout: float = PATIENCE) -> int:
        until(f"the end of process {self.pid}", lambda: self.poll() is not None, timeout)
        assert self.returncode is not None
        return self.returncode


@attrs.define
class WarmProcess:
    """This module as a program, for as long as the process that asks it. What it begins are children of that
    one, if it has called `adopt_orphans`."""

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

    def start(
        self,
        command: Sequence[str | Path],
        *,
        cwd: Path,
        env: Mapping[str, str] | None = None,
        standard: Sequence[str | Path] = (os.devnull,) * 3,
        **faults: str | None,
    ) -> Forked:
        """Begin a command; ``faults`` are ``steps``, ``die_after`` and ``scarcity``."""
        asked = {
            "command": [str(word) for word in command],
            "environment": dict(os.environ if env is None else env),
            "directory": str(cwd),
            "standard": [str(path) for path in standard],
            **faults,
        }
        assert self._process.stdin is not None and self._process.stdout is not None
        with self._lock:
            print(json.dumps(asked), file=self._process.stdin, flush=True)
            return Forked(json.loads(self._process.stdout.readline())["pid"])

    def end(self) -> None:
        self._process.communicate()


@functools.cache
def warm_process() -> WarmProcess:
    """The one of this process."""
    return WarmProcess()


def begin(
    command: Sequence[str | Path], *, is_warm: bool, cwd: Path, env: Mapping[str, str], **faults: str | None
) -> subprocess.Popen[bytes] | Forked:
    """Begin a program in a session of its own, with nothing to read and nobody to hear it; it goes on by
    itself. ``faults`` are those of `WarmProcess.start`, for one that is warm."""
    if is_warm:
        return warm_process().start(command, cwd=cwd, env=env, **faults)
    return subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        start_new_session=True, cwd=cwd, env=env,
    )  # fmt: skip


def warm_run(
    *command: str | Path, cwd: Path, env: Mapping[str, str] | None = None, **faults: str | None
) -> subprocess.CompletedProcess[str]:
    """As `run` does: to its end, with its output, whatever its status."""
    with tempfile.TemporaryDirectory() as home:
        said = [Path(home) / "output", Path(home) / "errors"]
        standard = (os.devnull, *said)
        process = warm_process().start(command, cwd=cwd, env=env, standard=standard, **faults)
        try:
            status = process.wait()
        except AssertionError:
            os.kill(process.pid, signal.SIGKILL)
            process.wait()
            raise
        return subprocess.CompletedProcess(command, status, *(path.read_text() for path in said))


def main() -> None:
    for name in NEEDED:
        importlib.import_module(name)
    assert "twisted.internet.reactor" not in sys.modules, (
        "a reactor cannot be shared by those that are forked"
    )
    gc.collect()
    gc.freeze()  # what is looked at again and again is copied by each of them
    for line in sys.stdin:
        reading, writing = os.pipe()
        child = os.fork()
        if child == 0:
            # Twice: so that whoever has asked for it becomes its parent.
            program = os.fork()
            if program == 0:
                os.close(reading)
                os.close(writing)
                os._exit(become(**json.loads(line)))
            os.write(writing, str(program).encode())
            os._exit(0)
        os.close(writing)
        os.waitpid(child, 0)
        print(json.dumps({"pid": int(os.read(reading, 20))}), flush=True)
        os.close(reading)


def become(
    command: list[str],
    environment: dict[str, str],
    directory: str,
    standard: list[str],
    steps: str | None = None,
    die_after: str | None = None,
    scarcity: str | None = None,
) -> int:
    """The status that it is to end with, at once: to take all apart that has been imported takes long."""
    os.setsid()
    for number, path in enumerate(standard):
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o600)
        os.dup2(descriptor, number)
        os.close(descriptor)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(directory)
    if steps is not None:
        Steps(steps, die_after).install()
    if scarcity is not None:
        Scarcity(scarcity).install()
    sys.argv = command
    sys.orig_argv = [sys.executable, *command]
    status = 0
    try:
        runpy.run_path(command[0], run_name="__main__")
    except SystemExit as end:
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    return status


if __name__ == "__main__":
    main()
