"""``mount.erofs-nbd`` and ``umount.erofs-nbd``, which mount(8) and umount(8) call for this type."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NoReturn, TypeVar

import click

from erofs_twisted.control.starting import have_daemon
from erofs_twisted.errors import MountError
from erofs_twisted.mount.mountinfo import is_trapped
from erofs_twisted.mount.mountpoint import mounts_here
from erofs_twisted.options import OCI_KEYS, OPTIONS, OptionError, read_mount_call, read_state_dir
from erofs_twisted.process import conceal_arguments
from erofs_twisted.running import run_command
from erofs_twisted.state.journal import Journal

NOT_OURS = frozenset(
    {
        *("auto", "noauto", "defaults", "group", "nofail", "nouser", "owner", "user", "users", "_netdev"),
        "rw",  # what mount(8) says where nobody said anything; it is read-only all the same
    }
)
"""Options of fstab that say nothing to a file system."""
OTHER_NAMES = {f"oci.{name}": name for name in OCI_KEYS}
"""As erofs-utils has them."""
UNFIT = frozenset({"image", "mountpoint", "oci", "options"})
"""Options of ours that have a place of their own in mount(8)'s call."""
FAILED = 32
"""mount(8)'s exit status for a mount that failed."""

Command = TypeVar("Command", bound=Callable[..., Any])


def parse_options(texts: Sequence[str], sloppy: bool = False) -> dict[str, str | bool]:
    """What ``-o`` says, as options of the plugin by name, and ``password``. Raises `MountError`."""
    values: dict[str, str | bool] = {}
    passed_on: list[str] = []
    for item in (item for text in texts for item in text.split(",") if item):
        key, equals, value = item.partition("=")
        name = OTHER_NAMES.get(key, key)
        if key in NOT_OURS or key.lower().startswith(("x-", "comment")):
            continue
        if name in UNFIT or (name not in OPTIONS and name != "password"):
            passed_on.append(item)
        elif name == "password" or OPTIONS[name].metavar is not None:
            if not value:
                raise MountError(f"-o {key}: has no value; write {key}={_example(name)}")
            values[name] = value
        elif equals:
            raise MountError(f"-o {key}: takes no value")
        else:
            values[name] = True
    if passed_on and not sloppy:
        values["options"] = ",".join(passed_on)
    return values


def _example(name: str) -> str:
    return "…" if name == "password" else str(OPTIONS[name].metavar)


def _refuse_namespace(context: click.Context, parameter: click.Parameter, value: str | None) -> None:
    if value is not None:
        raise MountError("-N: the daemon mounts in the mount namespace that it runs in")


def for_mount(*meaningless: tuple[str, str]) -> Callable[[Command], Command]:
    """The options with which mount(8) and umount(8) call their programs, beside those that mean something:
    letters, and why they don't."""

    def decorate(command: Command) -> Command:
        for letter, why in (*meaningless, ("n", "no list of mounts is written")):
            command = click.option(
                f"-{letter}", is_flag=True, expose_value=False, help=f"of no meaning: {why}"
            )(command)
        command = click.option(
            "-t", metavar="TYPE", expose_value=False, help="of no meaning: the type of file system is known"
        )(command)
        return click.option(
            "-N",
            metavar="NAMESPACE",
            expose_value=False,
            callback=_refuse_namespace,
            help="refused: the daemon mounts in its own",
        )(command)

    return decorate


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("image")
@click.argument("mountpoint")
@click.option("-o", "options", multiple=True, metavar="OPT,…", help="options, as fstab has them")
@click.option("-f", "fake", is_flag=True, help="do all but the mount itself")
@click.option("-s", "sloppy", is_flag=True, help="leave out what is not known")
@click.option("-v", "verbose", is_flag=True, help="say what is mounted")
@for_mount()
def mount(
    image: str, mountpoint: str, options: tuple[str, ...], fake: bool, sloppy: bool, verbose: bool
) -> None:
    """Mount IMAGE on MOUNTPOINT, by a daemon that is started if there is none. For mount(8)."""
    values: dict[str, Any] = dict(parse_options(options, sloppy))
    conceal_arguments([str(values["password"])] if "password" in values else [])
    try:
        call = read_mount_call({**values, "image": image, "mountpoint": mountpoint})
    except OptionError as error:
        raise MountError(f"-o {error.option}: {error.message}") from error
    if fake:
        return
    path = os.path.realpath(mountpoint)
    daemon = have_daemon(read_state_dir(values))
    with _reach(path) as reach:
        mounted = daemon.mount(path, call, None, reach)
    if verbose:
        click.echo(f"{mounted['image']} ({mounted['digest']}) on {path} through {mounted['device']}")


@contextmanager
def _reach(path: str) -> Iterator[str]:
    """Another way to the directory where an automount waits for it, else ''.

    Whoever looks it up waits until something is mounted there, and so would the daemon. But not those whom
    systemd has started to mount it, in its own process group: such a one has it open for the daemon.
    """
    if not is_trapped(mounts_here(), path):
        yield ""
        return
    descriptor = os.open(path, os.O_PATH | os.O_CLOEXEC)
    try:
        yield f"/proc/{os.getpid()}/fd/{descriptor}"
    finally:
        os.close(descriptor)


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("mountpoint")
@click.option(
    "-l", "lazy", is_flag=True, help="unmount also what is in use; it is served until its users let go"
)
@click.option("-v", "verbose", is_flag=True, help="say what is unmounted")
@for_mount(("f", "a read that hangs ends by itself"), ("r", "it is read-only"))
def umount(mountpoint: str, lazy: bool, verbose: bool) -> None:
    """Unmount MOUNTPOINT, and wait until nothing is left of it. For umount(8)."""
    from erofs_twisted.ending import end_mount

    path = os.path.realpath(mountpoint)
    end_mount(Journal(read_state_dir({})), path, lazy)
    if verbose:
        click.echo(f"{path} unmounted")


def run_mount() -> NoReturn:
    """The program ``mount.erofs-nbd``."""
    run_command(mount, os.path.basename(sys.argv[0]), FAILED)


def run_umount() -> NoReturn:
    """The program ``umount.erofs-nbd``."""
    run_command(umount, os.path.basename(sys.argv[0]), FAILED)
