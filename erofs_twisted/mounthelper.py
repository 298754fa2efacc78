"""``mount.erofs-nbd`` and ``umount.erofs-nbd``, which mount(8) and umount(8) call for this type."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import click

from erofs_twisted.control.client import SOCKET, Daemon
from erofs_twisted.control.errors import NoDaemon
from erofs_twisted.control.starting import start_daemon
from erofs_twisted.errors import ErofsTwistedError, MountError
from erofs_twisted.options import OPTIONS, OptionError, read_mount_call, read_state_dir
from erofs_twisted.process import conceal_arguments
from erofs_twisted.state.journal import Journal

NOT_OURS = frozenset(
    {
        *("auto", "noauto", "defaults", "group", "nofail", "nouser", "owner", "user", "users", "_netdev"),
        "rw",  # what mount(8) says where nobody said anything; it is read-only all the same
    }
)
"""Options of fstab that say nothing to a file system."""
OTHER_NAMES = {f"oci.{name}": name for name in ("platform", "layer", "username", "password")}
"""As erofs-utils has them."""
UNFIT = frozenset({"image", "mountpoint", "oci", "options"})
"""Options of ours that have a place of their own in mount(8)'s call."""


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


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("image")
@click.argument("mountpoint")
@click.option("-o", "options", multiple=True, metavar="OPT,…", help="options, as fstab has them")
@click.option("-f", "fake", is_flag=True, help="do all but the mount itself")
@click.option("-n", "no_mtab", is_flag=True, help="of no meaning: no list of mounts is written")
@click.option("-s", "sloppy", is_flag=True, help="leave out what is not known")
@click.option("-v", "verbose", is_flag=True, help="say what is mounted")
@click.option("-t", "fstype", metavar="TYPE", help="of no meaning: the type of file system is known")
@click.option("-N", "namespace", metavar="NAMESPACE", help="refused: the daemon mounts in its own")
def mount(
    image: str,
    mountpoint: str,
    options: tuple[str, ...],
    fake: bool,
    no_mtab: bool,
    sloppy: bool,
    verbose: bool,
    fstype: str | None,
    namespace: str | None,
) -> None:
    """Mount IMAGE on MOUNTPOINT, by a daemon that is started if there is none. For mount(8)."""
    if namespace is not None:
        raise MountError("-N: the daemon mounts in the mount namespace that it runs in")
    values: dict[str, Any] = dict(parse_options(options, sloppy))
    conceal_arguments([str(values["password"])] if "password" in values else [])
    try:
        call = read_mount_call({**values, "image": image, "mountpoint": mountpoint})
    except OptionError as error:
        raise MountError(f"-o {error.option}: {error.message}") from error
    if fake:
        return
    path, state_dir = os.path.realpath(mountpoint), read_state_dir(values)
    daemon = Daemon(state_dir / SOCKET)
    try:
        mounted = daemon.mount(path, call, None)
    except NoDaemon:
        start_daemon(state_dir)
        mounted = daemon.mount(path, call, None)
    if verbose:
        click.echo(f"{mounted['image']} ({mounted['digest']}) on {path} through {mounted['device']}")


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("mountpoint")
@click.option(
    "-l", "lazy", is_flag=True, help="unmount also what is in use; it is served until its users let go"
)
@click.option("-f", "force", is_flag=True, help="of no meaning: a read that hangs ends by itself")
@click.option("-n", "no_mtab", is_flag=True, help="of no meaning: no list of mounts is written")
@click.option("-r", "read_only", is_flag=True, help="of no meaning: it is read-only")
@click.option("-v", "verbose", is_flag=True, help="say what is unmounted")
@click.option("-t", "fstype", metavar="TYPE", help="of no meaning: the type of file system is known")
@click.option("-N", "namespace", metavar="NAMESPACE", help="refused: the daemon mounts in its own")
def umount(
    mountpoint: str,
    lazy: bool,
    force: bool,
    no_mtab: bool,
    read_only: bool,
    verbose: bool,
    fstype: str | None,
    namespace: str | None,
) -> None:
    """Unmount MOUNTPOINT, and wait until nothing is left of it. For umount(8)."""
    from erofs_twisted.ending import end_mount

    if namespace is not None:
        raise MountError("-N: the daemon mounts in the mount namespace that it runs in")
    path = os.path.realpath(mountpoint)
    end_mount(Journal(read_state_dir({})), path, lazy)
    if verbose:
        click.echo(f"{path} unmounted")


def _run(command: Callable[..., Any]) -> NoReturn:
    """As mount(8) has it: status 0, 1 for a wrong call, 32 for a mount that failed."""
    program = os.path.basename(sys.argv[0])
    try:
        command.main(prog_name=program, standalone_mode=False)  # type: ignore[attr-defined]
    except click.ClickException as error:
        error.show()
        sys.exit(1)
    except (click.Abort, KeyboardInterrupt):
        sys.exit(32)
    except ErofsTwistedError as error:
        click.echo(f"{program}: {error}", err=True)
        sys.exit(32)
    sys.exit(0)


def run_mount() -> NoReturn:
    """The program ``mount.erofs-nbd``."""
    _run(mount)


def run_umount() -> NoReturn:
    """The program ``umount.erofs-nbd``."""
    _run(umount)
