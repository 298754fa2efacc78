"""``erofs-nbd``: look at an image, serve it; wait for mounts, cure them, end them. To mount is twistd's."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Coroutine
from contextlib import suppress
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

import click

from erofs_twisted import __version__
from erofs_twisted.control import SOCKET
from erofs_twisted.errors import ErofsTwistedError, MountError
from erofs_twisted.options import (
    IMAGE_OPTIONS,
    MOUNT_OPTIONS,
    OPTIONS,
    ImageConfig,
    Option,
    OptionError,
    passwords_on_command_line,
    read_cache_dir,
    read_image_config,
    read_mount_call,
    read_size,
    read_state_dir,
)
from erofs_twisted.process import conceal_arguments
from erofs_twisted.running import run, run_command
from erofs_twisted.state.journal import Journal
from erofs_twisted.waiting import wait_until_ready

if TYPE_CHECKING:
    from erofs_twisted.control.client import Daemon

IMAGE_OPTION_NAMES = tuple(option.name for option in IMAGE_OPTIONS)
REGISTRY_OPTION_NAMES = (
    "platform",
    "username",
    "password-file",
    "auth-file",
    "hosts-dir",
    "plain-http",
    "tls-ca",
    "insecure-skip-verify",
    "oci",
    "io-timeout",
    "stall-timeout",
    "verbose",
)
DOCTOR_OPTION_NAMES = ("layer", *REGISTRY_OPTION_NAMES[: REGISTRY_OPTION_NAMES.index("io-timeout")])
DOCTORS_PATIENCE = "10"
"""Seconds: that a registry is down shall be known soon, though a mount would be more patient."""

FOLLOW = 0.5
"""Seconds between two looks at a log that grows."""

Command = TypeVar("Command", bound=Callable[..., Any])


def takes(*names: str) -> Callable[[Command], Command]:
    """The plugin's options of these names, for a command."""

    def decorate(command: Command) -> Command:
        for name in reversed(names):
            command = _click_option(OPTIONS[name])(command)
        return command

    return decorate


def _click_option(option: Option) -> Callable[[Command], Command]:
    if option.metavar is None:
        return click.option(f"--{option.name}", option.name.replace("-", "_"), is_flag=True, help=option.help)
    return click.option(
        f"--{option.name}", option.name.replace("-", "_"), metavar=option.metavar, help=option.help
    )


def _image_config(image: str, options: dict[str, Any]) -> ImageConfig:
    values = {name.replace("_", "-"): value for name, value in options.items()}
    conceal_arguments(passwords_on_command_line(values))
    try:
        config = read_image_config(image, values)
    except OptionError as error:
        if error.option == "image":  # here it is an argument
            raise MountError(error.message) from error
        raise
    return config


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, prog_name="erofs-nbd")
def commands() -> None:
    """Mount OCI images from their registry, lazily, on EROFS.

    The mount itself is a service:  twistd erofs-nbd --image IMAGE --mountpoint DIR
    """


@commands.command()
@click.argument("image")
@click.option("--json", "as_json", is_flag=True, help="for programs")
@takes(*REGISTRY_OPTION_NAMES)
def inspect(image: str, as_json: bool, **options: Any) -> None:
    """Show what IMAGE is: its digest, its platforms, its layers, and which of them are EROFS.

    With --verbose also how it is got at: each server that is asked, how one gets in, where the credentials
    come from, redirects, whether ranges are answered, how soon and how fast.
    """
    from erofs_twisted.inspection import as_dict, look_at, show

    config = _image_config(image, options)
    resolved, probe = run(lambda reactor: look_at(reactor, config), config.verbose)
    if as_json:
        click.echo(json.dumps(as_dict(resolved, probe), indent=2))
    else:
        show(resolved, probe)


@commands.command()
@click.argument("image")
@click.option("--socket", metavar="PATH", required=True, help="UNIX socket to listen on")
@takes(*IMAGE_OPTION_NAMES)
def serve(image: str, socket: str, **options: Any) -> None:
    """Serve a layer of IMAGE to NBD clients on a UNIX socket, until Ctrl-C. No root is needed.

    For nbdfuse, nbdcopy, qemu and the like: nbdinfo nbd+unix:///?socket=PATH
    """
    from erofs_twisted.serving import serve_image

    config = _image_config(image, options)
    path = os.path.abspath(socket)

    def main(reactor: Any) -> Coroutine[Any, Any, None]:
        return serve_image(reactor, config, path, ready=lambda text: click.echo(text, err=True))

    run(main, config.verbose)


@commands.command()
@click.argument("image")
@click.argument("mountpoint")
@click.option("--timeout", metavar="SECONDS", type=click.FloatRange(min=0), default=60.0, show_default=True)
@takes(*(option.name for option in (*IMAGE_OPTIONS, *MOUNT_OPTIONS[2:])))
def mount(image: str, mountpoint: str, timeout: float, **options: Any) -> None:
    """Have IMAGE mounted on MOUNTPOINT by the daemon that listens in --state-dir; return when it can be used.

    The same again is no error. The daemon is twistd erofs-nbd without --image. A mount that takes longer than
    --timeout is still made: 'erofs-nbd umount' calls it off.
    """
    values = {name.replace("_", "-"): value for name, value in options.items()}
    conceal_arguments(passwords_on_command_line(values))
    call = read_mount_call({**values, "image": image, "mountpoint": mountpoint})
    _daemon(options["state_dir"]).mount(os.path.realpath(mountpoint), call, timeout)


@commands.command("ls")
@click.option("--json", "as_json", is_flag=True, help="for programs")
@takes("state-dir")
def list_mounts(as_json: bool, state_dir: str | None) -> None:
    """List the mounts on record, of all daemons that share --state-dir."""
    from erofs_twisted.listing import as_dicts, show

    records = Journal(read_state_dir({"state-dir": state_dir})).records()
    if as_json:
        click.echo(json.dumps(as_dicts(records), indent=2))
    else:
        show(records)


@commands.command()
@click.argument("mountpoint", required=False)
@takes("state-dir")
def status(mountpoint: str | None, state_dir: str | None) -> None:
    """Show what the daemon that listens in --state-dir says of itself, or of MOUNTPOINT, as JSON."""
    daemon = _daemon(state_dir)
    said = daemon.status() if mountpoint is None else daemon.one(os.path.realpath(mountpoint))
    click.echo(json.dumps(said, indent=2))


@commands.command()
@click.option("--timeout", metavar="SECONDS", type=click.FloatRange(min=0), default=60.0, show_default=True)
@takes("state-dir")
def upgrade(timeout: float, state_dir: str | None) -> None:
    """Have the daemon that listens in --state-dir replaced by the program that is installed now.

    Its mounts stay; what reads them waits for as long as a start takes. Returns when all are there again.
    """
    said = _daemon(state_dir).upgrade(timeout)
    click.echo(f"version {said['version']}, process {said['pid']}, {said['mounts']} mounts")


@commands.command()
@click.argument("mountpoint", required=False)
@click.option("-f", "--follow", is_flag=True, help="go on with what is logged from now on, until Ctrl-C")
@takes("state-dir")
def logs(mountpoint: str | None, follow: bool, state_dir: str | None) -> None:
    """Print the last lines that the daemon that listens in --state-dir has logged: all, or of MOUNTPOINT."""
    daemon, path = _daemon(state_dir), "" if mountpoint is None else os.path.realpath(mountpoint)
    after = 0
    with suppress(KeyboardInterrupt):
        while True:
            said = daemon.log(path, after)
            for line in said["lines"]:
                click.echo(line)
            if not follow:
                return
            after = said["next"]
            time.sleep(FOLLOW)


@commands.command()
@click.argument("mountpoint")
@takes("state-dir")
def prefetch(mountpoint: str, state_dir: str | None) -> None:
    """Fetch all of the image on MOUNTPOINT now, and compare it with its digest."""
    _daemon(state_dir).prefetch(os.path.realpath(mountpoint))


@commands.command()
@click.argument("mountpoint")
@click.option("--timeout", metavar="SECONDS", type=click.FloatRange(min=0), default=60.0, show_default=True)
@takes("state-dir")
def wait(mountpoint: str, timeout: float, state_dir: str | None) -> None:
    """Return as soon as MOUNTPOINT can be used, or say why it cannot."""
    wait_until_ready(Journal(read_state_dir({"state-dir": state_dir})), os.path.realpath(mountpoint), timeout)


@commands.command()
@click.argument("mountpoint")
@click.option("--lazy", is_flag=True, help="unmount also what is in use; it is served until its users let go")
@takes("state-dir")
def umount(mountpoint: str, lazy: bool, state_dir: str | None) -> None:
    """Unmount MOUNTPOINT and wait until its device and its daemon have gone."""
    from erofs_twisted.ending import end_mount

    end_mount(Journal(read_state_dir({"state-dir": state_dir})), os.path.realpath(mountpoint), lazy)


@commands.command()
@click.argument("mountpoint", required=False)
@click.option("--all", "everything", is_flag=True, help="every mount on record that has no daemon")
@click.option("--dry-run", is_flag=True, help="only say what would be done")
@click.option("--timeout", metavar="SECONDS", type=click.FloatRange(min=0), default=60.0, show_default=True)
@takes("username", "password-file", "state-dir")
def reattach(
    mountpoint: str | None,
    everything: bool,
    dry_run: bool,
    timeout: float,
    state_dir: str | None,
    **credentials: str | None,
) -> None:
    """Start a new daemon for MOUNTPOINT, whose own was killed. What reads the mount waits meanwhile.

    With the options of the daemon before, but for --username and --password-file, which are not on record.
    """
    from erofs_twisted.reattaching import failures, look_at, orphans_on_record, start

    if everything == (mountpoint is not None):
        raise MountError("say which: a mount point, or --all")
    journal = Journal(read_state_dir({"state-dir": state_dir}))
    records = orphans_on_record(journal, None if mountpoint is None else os.path.realpath(mountpoint))
    more = {name.replace("_", "-"): value for name, value in credentials.items() if value is not None}
    errors: list[ErofsTwistedError] = []
    orphans = run(lambda reactor: look_at(reactor, records, errors))
    for orphan in orphans:
        for line in orphan.told():
            click.echo(f"{orphan.record.mountpoint}: {line}")
        if not dry_run:
            try:
                start(journal, orphan.record, more, timeout)
            except ErofsTwistedError as error:
                errors.append(error)
    if errors:
        raise failures(errors)


@commands.command()
@click.argument("image", required=False)
@click.option("--fix", is_flag=True, help="repair what is safe to repair, and say what was done")
@click.option("--json", "as_json", is_flag=True, help="for programs")
@takes("state-dir", "cache-dir", *DOCTOR_OPTION_NAMES)
def doctor(image: str | None, fix: bool, as_json: bool, **options: Any) -> None:
    """Look for mounts and devices that are dead, and for what this machine lacks; say the cure of each.

    With IMAGE also whether its registry can be used as a mount would. The exit status is 1 where something is
    bad.
    """
    from erofs_twisted.doctor.cures import Cures
    from erofs_twisted.doctor.examination import examine
    from erofs_twisted.doctor.registry import ask_registry, findings_of
    from erofs_twisted.doctor.report import as_dict, bad_among, show

    values = {name.replace("_", "-"): value for name, value in options.items()}
    state_dir, cache_dir = read_state_dir(values), read_cache_dir(values)
    config = None
    if image is not None:
        patience = {"io_timeout": DOCTORS_PATIENCE, "stall_timeout": DOCTORS_PATIENCE}
        config = _image_config(image, {**options, **patience})
    elif given := [name for name in DOCTOR_OPTION_NAMES if values[name]]:
        raise MountError(f"--{given[0]} is about an image: name one")
    cures = Cures.of(state_dir) if fix else None
    examination = examine(state_dir, cache_dir)
    outcomes = [] if cures is None else list(cures.apply(examination.findings))
    if outcomes:
        examination = examine(state_dir, cache_dir)
    findings = examination.findings
    if image is not None and config is not None:
        answers = run(lambda reactor: ask_registry(reactor, config))
        findings += findings_of(image, answers, examination.compressors)
    if as_json:
        click.echo(json.dumps(as_dict(findings, outcomes), indent=2))
    else:
        show(findings, outcomes)
    if bad := bad_among(findings):
        raise MountError(f"{bad} of {len(findings)} findings {'is' if bad == 1 else 'are'} bad")


@commands.group()
def trace() -> None:
    """What an image's first reader read: record it, show it, push it beside the image.

    A mount fetches first what the trace of its image names.
    """


@trace.command()
@click.argument("image")
@click.argument("command", nargs=-1, required=True)
@click.option("--timeout", metavar="SECONDS", type=click.FloatRange(min=0), default=60.0, show_default=True)
@takes(*(name for name in IMAGE_OPTION_NAMES if name != "trace"), "options", "attach", "state-dir")
def record(image: str, command: tuple[str, ...], timeout: float, **options: Any) -> None:
    """Mount IMAGE, run COMMAND, and record what is read meanwhile.

    The mount point takes the place of {} in COMMAND, and is in $EROFS_NBD_MOUNTPOINT. The mount gets up to
    --timeout seconds to come up, and ends with the command:

    erofs-nbd trace record registry.example/app:1.2 -- chroot {} python3 -c 'import json'
    """
    from erofs_twisted.inspection import resolve
    from erofs_twisted.recording import record_command
    from erofs_twisted.tracereport import summary

    config = _image_config(image, options)
    resolved = run(lambda reactor: resolve(reactor, config), config.verbose)
    typed = {name.replace("_", "-"): value for name, value in options.items() if value}
    state_dir = read_state_dir(typed)
    recorded = record_command(config, resolved, typed, command, state_dir, timeout)
    click.echo(summary(recorded.trace, recorded.path))
    if recorded.status != 0:
        raise MountError(f"{command[0]} ended with status {recorded.status}; what it read was recorded")


@trace.command("show")
@click.argument("image")
@click.option("--json", "as_json", is_flag=True, help="for programs")
@takes(*REGISTRY_OPTION_NAMES, "layer", "cache-dir")
def show_trace(image: str, as_json: bool, **options: Any) -> None:
    """Show the trace of IMAGE that a mount would use: the cache's, else the registry's."""
    from erofs_twisted.tracereport import as_dict, find, show

    config = _image_config(image, options)
    trace = run(lambda reactor: find(reactor, config), config.verbose)
    if as_json:
        click.echo(json.dumps(as_dict(trace), indent=2))
    else:
        show(trace)


@trace.command("push")
@click.argument("image")
@takes(*REGISTRY_OPTION_NAMES, "layer", "cache-dir")
def push_trace(image: str, **options: Any) -> None:
    """Push the trace in the cache to IMAGE's registry, as a referrer of its manifest; print its digest."""
    from erofs_twisted.tracereport import push

    config = _image_config(image, options)
    click.echo(run(lambda reactor: push(reactor, config), config.verbose))


@commands.group()
def cache() -> None:
    """What was fetched and is kept: list it, check it, remove what is not in use.

    No daemon is needed, and mounts go on meanwhile.
    """


@cache.command("ls")
@click.option("--json", "as_json", is_flag=True, help="for programs")
@takes("cache-dir")
def list_cache(as_json: bool, cache_dir: str | None) -> None:
    """List the blobs in the cache, the least recently used first."""
    from erofs_twisted.cachekeeping import as_dict, blobs_in, show

    path = read_cache_dir({"cache-dir": cache_dir})
    blobs = blobs_in(path)
    if as_json:
        click.echo(json.dumps(as_dict(path, blobs), indent=2))
    else:
        show(blobs)


@cache.command("verify")
@click.argument("digest", nargs=-1)
@takes("cache-dir")
def verify_cache(digest: tuple[str, ...], cache_dir: str | None) -> None:
    """Read complete blobs from the disk and compare them with their digests: these, or all.

    What is wrong is dropped, and not served any more, also by mounts that use it. Then the exit status is 1.
    """
    from erofs_twisted.cachekeeping import count, verify

    wrong = verify(read_cache_dir({"cache-dir": cache_dir}), digest, click.echo)
    if wrong:
        raise MountError(f"wrong in the cache: {count(wrong)}")


@cache.command("prune")
@click.option("--all", "everything", is_flag=True, help="remove all of them")
@click.option("--size", metavar="SIZE", help="the least recently used, until no more is taken; K, M, G, T")
@click.option("--older-than", metavar="DAYS", type=click.FloatRange(min=0), help="those unused for so long")
@click.option("--dry-run", is_flag=True, help="only say what would go")
@takes("cache-dir")
def prune_cache(
    everything: bool, size: str | None, older_than: float | None, dry_run: bool, cache_dir: str | None
) -> None:
    """Remove blobs that are not in use."""
    from erofs_twisted.cachekeeping import prune

    if everything == (size is not None or older_than is not None):
        raise MountError("say what is to go: --all, or --size SIZE and --older-than DAYS, one or both")
    path, limit = read_cache_dir({"cache-dir": cache_dir}), read_size("size", size)
    click.echo(prune(path, everything=everything, size=limit, older_than=older_than, dry_run=dry_run))


def _daemon(state_dir: str | None) -> Daemon:
    from erofs_twisted.control.client import Daemon

    return Daemon(read_state_dir({"state-dir": state_dir}) / SOCKET)


def main() -> NoReturn:
    """The ``erofs-nbd`` program: exit status 0, or 1 with a message."""
    run_command(commands, "erofs-nbd")
