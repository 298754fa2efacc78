"""The ``erofs-nbd`` plugin of twistd: its options, and the service made of them."""

from __future__ import annotations

import os
import sys

from twisted.application.service import IService
from twisted.python import usage

from erofs_twisted.control import SOCKET
from erofs_twisted.options import (
    OPTIONS,
    MountConfig,
    OptionError,
    ServiceConfig,
    passwords_on_command_line,
    read_mount_config,
    read_service_config,
)
from erofs_twisted.ownerport import find_inherited
from erofs_twisted.process import (
    ExitStatus,
    begun_anew,
    conceal_arguments,
    put_off_collections,
    raise_file_limit,
)
from erofs_twisted.steadyclock import keep_steady


class Options(usage.Options):
    """`config` is what was asked for, once `parseOptions` has returned."""

    synopsis = "[--image IMAGE --mountpoint DIR] [options]"
    longdesc = (
        "Mounts an OCI image straight from its registry on the kernel's EROFS file system, read-only, "
        "fetching only what is read. A daemon, unless twistd is given -n; it ends when the mount point is "
        "unmounted, or on SIGTERM. 'erofs-nbd wait DIR' tells when the mount is usable. Without --image and "
        "--mountpoint it has as many mounts as 'erofs-nbd mount' asks it for, and the options are those of "
        "each. Defaults are in brackets."
    )
    optParameters = [[o.name, None, None, o.help] for o in OPTIONS.values() if o.metavar is not None]
    optFlags = [[o.name, None, o.help] for o in OPTIONS.values() if o.metavar is None]
    compData = usage.Completions(
        optActions={
            "mountpoint": usage.CompleteDirs(),
            "cache-dir": usage.CompleteDirs(),
            "hosts-dir": usage.CompleteDirs(),
            "state-dir": usage.CompleteDirs(),
            "password-file": usage.CompleteFiles(),
            "auth-file": usage.CompleteFiles(),
            "tls-ca": usage.CompleteFiles(),
            **{o.name: usage.CompleteList(o.choices) for o in OPTIONS.values() if o.choices},
        }
    )
    config: MountConfig | ServiceConfig

    def parseOptions(self, options: list[str] | None = None) -> None:
        try:
            super().parseOptions(options)  # type: ignore[no-untyped-call]
        except usage.UsageError as error:
            if self.parent is None:
                raise
            # twistd would print its own help, and this message below all that.
            sys.exit(f"twistd erofs-nbd: {error}\nTry 'twistd erofs-nbd --help'.")

    def parseArgs(self, *unexpected: str) -> None:
        if unexpected:
            raise usage.UsageError(
                f"unexpected argument {unexpected[0]!r}; "
                "the image goes with --image, the directory with --mountpoint"
            )

    def postOptions(self) -> None:
        if self["supervise"] and self.parent is not None and not self.parent["nodaemon"]:
            raise usage.UsageError(
                "--supervise goes with twistd -n: whoever starts that has a process to watch already"
            )
        conceal_arguments(passwords_on_command_line(self))
        try:
            is_one = self["image"] is not None or self["mountpoint"] is not None
            self.config = read_mount_config(self) if is_one else read_service_config(self)
        except OptionError as error:
            raise usage.UsageError(str(error)) from error


def makeService(options: Options) -> IService:
    """Build the service; nothing is opened until it starts, for twistd forks in between."""
    put_off_collections()
    raise_file_limit()
    config = options.config
    if options["supervise"]:
        from erofs_twisted.supervising import supervise

        is_one = isinstance(config, MountConfig)
        # In the file is the parent: it stays, and the daemon does not.
        twistd = options.parent
        pidfile = "" if twistd is None else twistd["pidfile"] or ""
        if twistd is not None:
            twistd["pidfile"] = ""
        before, after = supervise(
            "erofs_twisted.service" if is_one else "erofs_twisted.mountsservice", pidfile
        )
    else:
        begun = begun_anew()
        before, after = None if begun is None else begun[1], None
    from erofs_twisted.reclaiming import reclaim

    reclaimed = reclaim(config.state_dir, config.mountpoint if isinstance(config, MountConfig) else "")
    from twisted.internet import reactor

    from erofs_twisted.succession import Legacy

    legacy = Legacy(before, after, os.getppid() if after is not None else 0, reclaimed)
    keep_steady(reactor)
    exit_status = ExitStatus(is_supervised=bool(options["supervise"]))
    exit_status.install()
    if isinstance(config, MountConfig):
        from erofs_twisted.service import MountService

        return MountService(reactor, config, exit_status, legacy)
    from erofs_twisted.mountsservice import MountsService

    inherited = find_inherited(str(config.state_dir / SOCKET))
    return MountsService(reactor, config.defaults, config.state_dir, exit_status, inherited, legacy)
