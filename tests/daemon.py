"""The programs of the project, run as a user runs them, and what must be left of them afterwards: nothing."""

from __future__ import annotations

import atexit
import functools
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import attrs
from twisted.trial.unittest import SynchronousTestCase

from erofs_twisted.mount.mountinfo import Mount, mount_at, parse_mountinfo
from erofs_twisted.state.journal import Journal
from erofs_twisted.state.records import MountRecord, Status
from tests.processes import (
    BIN,
    PATIENCE,
    PROJECT,
    adopt_orphans,
    children,
    command_line,
    descendants,
    exit_status,
    run,
    until,
)
from tests.scenery import scenery
from tests.warm import begin, warm_process, warm_run


@attrs.frozen
class Counts:
    """Requests to a repository, those of them that met a fault since the faults were set, tokens for it, and
    connections to any repository."""

    requests: int
    hits: int
    tokens: int
    connections: int


@attrs.define
class FaultRegistry:
    """`tests.faultregistry`, a process that lives until `end`; ``origin`` is a layout or a server's URL."""

    origin: str
    port: int = 0
    _process: subprocess.Popen[str] = attrs.field(init=False)

    def __attrs_post_init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.faultregistry", self.origin],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=PROJECT,
        )
        self.port = self._read()["port"]

    @property
    def pid(self) -> int:
        return self._process.pid

    def image(self, repository: str, tag: str = "lz4") -> str:
        """The name of an image in a repository of that name, which needs no other preparation."""
        return f"127.0.0.1:{self.port}/{repository}:{tag}"

    @property
    def authority(self) -> str:
        return f"127.0.0.1:{self.port}"

    @property
    def url(self) -> str:
        return f"http://{self.authority}"

    def set(
        self, repository: str, *faults: Mapping[str, Any], user: str = "", rate: float | None = None,
        seed: int = 0, token_life: float | None = None,
    ) -> None:  # fmt: skip
        """What requests to a repository meet from now on, as `tests.faults.Script` has it; ``user`` is
        ``NAME:PASSWORD``. Where tokens have a life, in seconds, none gets in without."""
        self._tell(
            repository=repository, faults=faults, user=user, rate=rate, seed=seed, token_life=token_life
        )

    def requests(self, repository: str) -> list[dict[str, Any]]:
        """Those that came for a repository: the kind, the reference and the range of each."""
        return list(self._tell(requests=repository)["requests"])

    def counts(self, repository: str) -> Counts:
        """How much came so far."""
        return Counts(**self._tell(counts=repository))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.end()

    def go_down(self) -> None:
        """End every connection, and refuse new ones."""
        self._tell(up=False)

    def come_back(self) -> None:
        self._tell(up=True)

    def end(self) -> None:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.close()
        self._process.stdout.close()
        self._process.wait()

    def _tell(self, **command: Any) -> dict[str, Any]:
        assert self._process.stdin is not None
        print(json.dumps(command), file=self._process.stdin, flush=True)
        return self._read()

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        return dict(json.loads(self._process.stdout.readline()))


@functools.cache
def registry() -> FaultRegistry:
    """The registry of this process."""
    started = FaultRegistry(str(scenery().layout))
    atexit.register(started.end)
    return started


def nbd_devices_in_use() -> set[str]:
    return {path.parent.name for path in Path("/sys/block").glob("nbd*/pid")}


def mounts() -> list[Mount]:
    return parse_mountinfo(Path("/proc/self/mountinfo").read_bytes())


@attrs.define(eq=False)
class Daemon:
    """One ``twistd erofs-nbd``, with a directory of its own for all that it writes."""

    directory: Path
    image: str
    options: Sequence[str]
    foreground: bool = False
    environment: Mapping[str, str] = attrs.field(factory=dict)
    is_warm: bool = False
    """Does it begin without the time that imports take, and the commands that are about it too?"""
    pid: int = attrs.field(init=False, default=0)
    cache_dir: Path = attrs.field(init=False)
    _status: int | None = attrs.field(init=False, default=None)

    def __attrs_post_init__(self) -> None:
        self.cache_dir = self.directory / "cache"
        for name in ("target", "tmp"):
            (self.directory / name).mkdir(parents=True, exist_ok=True)

    @property
    def mountpoint(self) -> Path:
        return self.directory / "target"

    @property
    def state_dir(self) -> Path:
        return self.directory / "state"

    @property
    def pidfile(self) -> Path:
        return self.directory / "twistd.pid"

    @property
    def log(self) -> str:
        path = self.directory / "log"
        return path.read_text(errors="replace") if path.exists() else ""

    def command(self) -> list[str]:
        return [
            str(BIN / "twistd"),
            *(["-n"] if self.foreground else []),
            f"--pidfile={self.pidfile}",
            f"--logfile={self.directory / 'log'}",
            "erofs-nbd",
            *("--image", self.image, "--mountpoint", str(self.mountpoint)),
            *("--cache-dir", str(self.cache_dir), "--state-dir", str(self.state_dir)),
            *self.options,
        ]

    def start(self) -> None:
        """Start it, as a daemon or in the foreground; it goes on by itself."""
        environment = {**os.environ, "TMPDIR": str(self.directory / "tmp"), **self.environment}
        where: Any = {"env": environment, "cwd": self.directory}
        if not self.foreground:
            started = (warm_run if self.is_warm else run)(*self.command(), **where, **self.faults())
            if started.returncode != 0:
                raise AssertionError(f"twistd: status {started.returncode}\n{started.stdout}{started.stderr}")
            self.pid = int(self.pidfile.read_text())
        else:
            self.pid = begin(self.command(), is_warm=self.is_warm, **where, **self.faults()).pid

    def faults(self) -> dict[str, Any]:
        """What `WarmProcess.start` shall have happen to it."""
        return {}

    def record(self) -> MountRecord | None:
        return Journal(self.state_dir).read(str(self.mountpoint))

    def ready(self) -> MountRecord:
        """Once it is mounted: what it says of itself."""

        def look() -> MountRecord | None:
            record = self.record()
            if self.status() is not None:
                raise AssertionError(f"it ended with status {self.status()}:\n{self.log}")
            is_ready = record and record.status is Status.READY and record.pid == self.pid
            return record if is_ready else None

        return until(f"mount of {self.image}", look)

    def says(self, text: str) -> str:
        """Once it has logged a line with ``text``: that line."""
        return until(f"{text!r} in the log", lambda: self._logged(text))

    def _logged(self, text: str) -> str:
        return next((line for line in self.log.splitlines() if text in line), "")

    def status(self) -> int | None:
        """Its exit status; None while it runs."""
        if self._status is None and self.pid:
            self._status = exit_status(self.pid)
        return self._status

    def ended(self, patience: float = PATIENCE) -> int:
        """Its exit status, once it has ended."""
        try:
            until("end of the daemon", lambda: self.status() is not None, patience)
        except AssertionError as error:
            raise AssertionError(f"{error}\n{self.log}") from None
        assert self._status is not None
        return self._status

    def signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def erofs_nbd(self, command: str, *more: str) -> subprocess.CompletedProcess[str]:
        """``erofs-nbd wait`` or ``umount`` of its mount point."""
        words = (BIN / "erofs-nbd", command, self.mountpoint, "--state-dir", self.state_dir, *more)
        return warm_run(*words, cwd=self.directory) if self.is_warm else run(*words)

    def memory(self, field: str) -> int:
        """``VmRSS`` or ``VmHWM``, in bytes, of the process and those below it."""
        total = 0
        for pid in descendants(self.pid):
            lines = Path(f"/proc/{pid}/status").read_text().splitlines()
            total += next(int(line.split()[1]) for line in lines if line.startswith(f"{field}:"))
        return total * 1024

    def kill(self) -> None:
        """Whatever it takes, for a test that has failed."""
        if self.pid and self.status() is None:
            self.signal(signal.SIGKILL)
            self.ended()


class DaemonTestCase(SynchronousTestCase):
    """Has a registry, and starts daemons that must have left nothing when the test ends."""

    attach = "auto"
    is_warm = False
    """Do they begin without the time that imports take, where a test does not say otherwise?"""

    def setUp(self) -> None:
        if os.geteuid() != 0:
            self.fail("mount(2) takes root: run these tests as root")
        adopt_orphans()
        if self.is_warm:
            warm_process()
        self.registry = registry()
        # Short: there will be sockets below it.
        self.directory = Path(tempfile.mkdtemp(prefix="daemon-"))
        self._children_before = children(ended=True)
        self._devices_before = nbd_devices_in_use()
        self._daemons: list[Daemon] = []
        self.addCleanup(self._clean_up)

    def daemon(self, image: str, *options: str, name: str = "d", **more: Any) -> Daemon:
        """One that has not been started."""
        if "--attach" not in options:
            options = (*options, "--attach", self.attach)
        daemon = Daemon(self.directory / name, image, options, **{"is_warm": self.is_warm, **more})
        self._daemons.append(daemon)
        return daemon

    def start(self, image: str, *options: str, **more: Any) -> Daemon:
        daemon = self.daemon(image, *options, **more)
        daemon.start()
        return daemon

    def mounted(self, image: str, *options: str, **more: Any) -> Daemon:
        """One whose mount is ready."""
        daemon = self.start(image, *options, **more)
        daemon.ready()
        return daemon

    def kill(self, daemon: Daemon) -> None:
        daemon.signal(signal.SIGKILL)
        self.assertEqual(-signal.SIGKILL, daemon.ended())
        daemon.pidfile.unlink()

    def again(self, daemon: Daemon, **otherwise: Any) -> Daemon:
        """The same command, which has been started."""
        successor = attrs.evolve(daemon, **otherwise)
        self._daemons.append(successor)
        successor.start()
        return successor

    def assert_same(self, expected: Mapping[str, Any], found: Mapping[str, Any]) -> None:
        """The differences of two dictionaries, not the dictionaries."""
        differences = {key for key in expected.keys() | found.keys() if expected.get(key) != found.get(key)}
        self.assertEqual({}, {key: (expected.get(key), found.get(key)) for key in sorted(differences)[:5]})

    def assert_nothing_left(self, *ended: Daemon) -> None:
        """Of daemons that have ended, only their caches and their logs are there."""
        self.assertEqual([], [mount.path for mount in mounts() if mount.path.startswith(str(self.directory))])
        self.assertEqual(self._devices_before, nbd_devices_in_use())
        running = {daemon.pid for daemon in self._daemons if daemon not in ended}
        left = children() - self._children_before - running
        self.assertEqual({}, {pid: command_line(pid) for pid in left})
        self.assertEqual([], self._sockets())
        for daemon in ended:
            self.assertEqual([], _names(daemon.state_dir))
            self.assertEqual([], _names(daemon.directory / "tmp"))
            self.assertLessEqual(set(_names(daemon.directory)), {"cache", "log", "state", "target", "tmp"})

    def assert_ends_well(self, daemon: Daemon) -> None:
        """It ends by itself, with status 0, and leaves nothing."""
        self.assertEqual(0, daemon.ended(), daemon.log)
        self.assertNotIn("Traceback", daemon.log)
        self.assert_nothing_left(daemon)

    def _sockets(self) -> list[str]:
        lines = Path("/proc/net/unix").read_text().splitlines()
        return [line for line in lines if str(self.directory) in line]

    def _clean_up(self) -> None:
        """After a failure too, the next test shall find a clean machine."""
        for mount in reversed(mounts()):
            if mount.path.startswith(str(self.directory)):
                run("umount", "-l", mount.path)
        for daemon in self._daemons:
            if daemon.pid and daemon.status() is None:
                daemon.signal(signal.SIGTERM)
                daemon.signal(signal.SIGTERM)
                try:
                    daemon.ended(10)
                except AssertionError:
                    daemon.kill()
        for pid in children(ended=True) - self._children_before:
            # One that is left over, or an orphan that has ended, for which nobody else waits.
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
        shutil.rmtree(self.directory)


def _names(directory: Path) -> list[str]:
    return sorted(os.listdir(directory)) if directory.is_dir() else []


def is_mounted(path: Path) -> bool:
    """Is something mounted there, the path of which has no symbolic links?"""
    return mount_at(mounts(), str(path)) is not None


def mount_of(daemon: Daemon) -> Mount | None:
    return mount_at(mounts(), os.path.realpath(daemon.mountpoint))
