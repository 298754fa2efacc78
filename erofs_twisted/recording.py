"""Recording the first reads of one command: a mount of its own, the command on it, and the end of both.

All of it blocks, and no reactor runs: the mount is served by a twistd of its own.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import IO, Any

import attrs

from erofs_twisted.blocks.trace import Trace
from erofs_twisted.blocks.tracefile import TraceFiles
from erofs_twisted.errors import MountError
from erofs_twisted.image import choose_layer
from erofs_twisted.options import ImageConfig
from erofs_twisted.registry.manifest import ResolvedImage
from erofs_twisted.registry.reference import ImageReference
from erofs_twisted.state.journal import Journal
from erofs_twisted.waiting import wait_until_ready

TWISTD = (sys.executable, "-P", "-c", "from twisted.scripts.twistd import run; run()")
"""The twistd of the interpreter that runs this, wherever its script may be."""
MOUNTPOINT_VARIABLE = "EROFS_NBD_MOUNTPOINT"
PLACEHOLDER = "{}"
PATIENCE = 5.0
"""Seconds for the mount's end, before what the command has left behind loses it."""
SPELT_OUT = frozenset({"platform", "layer", "username", "password-file", "oci", "state-dir"})
"""Options that are not passed on as they were typed."""


@attrs.frozen
class Recorded:
    """What a command read, where that is kept, and the status that the command ended with."""

    trace: Trace
    path: str
    status: int


class Interrupted(MountError):
    """Told to stop."""


def record_command(
    config: ImageConfig,
    image: ResolvedImage,
    options: Mapping[str, str | bool],
    command: Sequence[str],
    state_dir: Path,
    timeout: float,
) -> Recorded:
    """Mount ``image``, run ``command``, unmount. ``options`` are those that were typed.

    Raises `MountError` where one of it cannot be done, `Interrupted` on SIGINT, SIGTERM and SIGHUP; mount,
    daemon and directory are gone in any case.
    """
    layer = choose_layer(image, config.layer)
    files = TraceFiles(str(config.cache_dir))
    before = _identity(files.path(layer.digest))
    with ExitStack() as undo:
        signals = undo.enter_context(_Signals())
        # The command need not be root's: it may look at the mount, and at nothing else.
        with signals.held():
            directory = tempfile.mkdtemp(prefix="erofs-nbd-trace-")
            undo.callback(shutil.rmtree, directory, ignore_errors=True)
        os.chmod(directory, 0o755)
        mountpoint = os.path.join(directory, "mnt")
        os.mkdir(mountpoint)
        arguments = [
            *("--nodaemon", "--pidfile=", f"--logfile={directory}/log", "erofs-nbd"),
            *_options(config, image, options),
            f"--mountpoint={mountpoint}",
            f"--state-dir={state_dir}",
        ]
        journal = Journal(state_dir)
        # A pipe that it held open would end only with it, which may be later than with us.
        said = undo.enter_context(tempfile.TemporaryFile())
        with signals.held():
            daemon = _start(
                arguments, config.registry.credentials.password if config.registry.credentials else None, said
            )
            undo.callback(_end, daemon, mountpoint)

        def check() -> None:
            if daemon.poll() is not None and journal.read(mountpoint) is None:
                said.seek(0)
                raise MountError(said.read().decode(errors="replace").strip() or "twistd ended at once")

        wait_until_ready(journal, mountpoint, timeout, check)
        status = _run(command, mountpoint, signals)
    path = files.path(layer.digest)
    trace = files.load(layer.digest, layer.size)
    if trace is None or _identity(path) == before:
        raise MountError(f"nothing was recorded: {command[0]} read nothing, or {path} cannot be written")
    return Recorded(trace, path, status)


def _options(config: ImageConfig, image: ResolvedImage, typed: Mapping[str, str | bool]) -> Iterator[str]:
    """What is passed on to twistd. The image is the one that was resolved, whatever its tag means by then."""
    reference = config.reference
    if isinstance(reference, ImageReference):
        reference = attrs.evolve(reference, digest=image.index_digest or image.digest)
    yield f"--image={reference}"
    yield f"--platform={config.platform}"
    yield "--trace=record"
    if config.layer is not None:
        yield f"--layer={config.layer}"
    if config.registry.credentials is not None:
        yield f"--username={config.registry.credentials.username}"
        yield "--password-file=-"
    for name, value in typed.items():
        if name not in SPELT_OUT:
            yield f"--{name}" if value is True else f"--{name}={value}"


def _start(arguments: Sequence[str], password: str | None, said: IO[bytes]) -> subprocess.Popen[bytes]:
    """Start twistd, in a session of its own: Ctrl-C on the terminal is for the command, and for us."""
    daemon = subprocess.Popen(
        [*TWISTD, *arguments],
        stdin=subprocess.DEVNULL if password is None else subprocess.PIPE,
        stdout=said,
        stderr=said,
        start_new_session=True,
    )
    if daemon.stdin is not None and password is not None:
        with suppress(BrokenPipeError), daemon.stdin as pipe:
            pipe.write(password.encode() + b"\n")
    return daemon


def _run(command: Sequence[str], mountpoint: str, signals: _Signals) -> int:
    """Run the command with our own standard streams; its exit status, 128 and more for a signal."""
    words = [word.replace(PLACEHOLDER, mountpoint) for word in command]
    process: subprocess.Popen[bytes] | None = None
    try:
        with signals.held():
            process = subprocess.Popen(words, env={**os.environ, MOUNTPOINT_VARIABLE: mountpoint})
        status = process.wait()
    except OSError as error:
        raise MountError(f"{words[0]}: {error.strerror}") from error
    except Interrupted:
        if process is None:
            raise
        process.terminate()
        try:
            process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        raise
    return status if status >= 0 else 128 - status


def _end(daemon: subprocess.Popen[bytes], mountpoint: str) -> None:
    """Unmount, and wait for the daemon's end. Processes that the command left in the mount lose it."""
    for _ in range(2):
        daemon.send_signal(signal.SIGTERM)
        try:
            daemon.wait(PATIENCE)
            return
        except subprocess.TimeoutExpired:
            continue
    raise MountError(
        f"what the command has left behind still uses {mountpoint}; process {daemon.pid} serves it until "
        "that ends"
    )


class _Signals:
    """Within, signals to end raise `Interrupted`, once: what follows from that is not interrupted again."""

    def __init__(self) -> None:
        self._handlers: dict[signal.Signals, Any] = {}
        self._held = False
        self._came: signal.Signals | None = None

    def __enter__(self) -> _Signals:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            self._handlers[number] = signal.signal(number, self._take)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)

    @contextmanager
    def held(self) -> Iterator[None]:
        """Within, what is begun is also noted down, for a signal raises at the end."""
        self._held = True
        try:
            yield
        finally:
            self._held = False
        if self._came is not None:
            self._interrupt(self._came)

    def _take(self, number: int, frame: FrameType | None) -> None:
        if self._held:
            self._came = self._came or signal.Signals(number)
        else:
            self._interrupt(signal.Signals(number))

    def _interrupt(self, number: signal.Signals) -> None:
        for each in self._handlers:
            signal.signal(each, signal.SIG_IGN)
        raise Interrupted(f"interrupted by {number.name}")


def _identity(path: str) -> tuple[int, int] | None:
    """Tells whether a file has been replaced."""
    with suppress(OSError):
        status = os.stat(path)
        return status.st_ino, status.st_mtime_ns
    return None
