"""The options of the plugin and of the commands: one table, one way to read them.

`Option` says how an option is spelt and explained; `read_image_config` and `read_mount_config` turn what the
user typed, as strings, into values. Every mistake is an `OptionError` that names the option.
"""

from __future__ import annotations

import itertools
import os
import platform as host
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TypeVar

import attrs

from erofs_twisted.device.settings import NBDSettings
from erofs_twisted.errors import ErofsTwistedError
from erofs_twisted.mount.options import MountOptions
from erofs_twisted.registry.credentials import Credentials
from erofs_twisted.registry.dockerconfig import (
    MAX_CONFIG,
    LoginFiles,
    parse_docker_config,
    standard_files,
)
from erofs_twisted.registry.errors import InvalidProxy
from erofs_twisted.registry.hosts import FoundHosts, InvalidHosts
from erofs_twisted.registry.hostsdir import STANDARD, find_hosts
from erofs_twisted.registry.platform import Platform
from erofs_twisted.registry.proxies import Proxies
from erofs_twisted.registry.reference import ImageReference, LayoutReference, parse_reference
from erofs_twisted.registry.settings import RegistrySettings
from erofs_twisted.registry.tlssettings import TLSSettings, parse_unverified

Values = Mapping[str, str | bool | None]
"""What the user typed, by option name: a flag is a bool, an option that was not given is None."""

Read = TypeVar("Read")

MAX_PASSWORD = 64 * 1024


class OptionError(ErofsTwistedError):
    """What was given for one option cannot be used."""

    def __init__(self, option: str, message: str) -> None:
        super().__init__(f"--{option}: {message}")
        self.option = option
        self.message = message


class VariableError(OptionError):
    """What a variable of the environment holds cannot be used."""

    def __init__(self, variable: str, message: str) -> None:
        ErofsTwistedError.__init__(self, f"{variable}: {message}")
        self.option = variable
        self.message = message


@attrs.frozen
class Option:
    """``metavar`` is None for a flag. The default stands in brackets at the end of ``help``."""

    name: str
    metavar: str | None
    help: str

    @property
    def choices(self) -> list[str]:
        """What it may be, where that is one of a few words."""
        return self.metavar.split("|") if self.metavar and "|" in self.metavar else []


IMAGE_OPTIONS = (
    Option("platform", "OS/ARCH[/VARIANT]", "which image of an index [this host's own]"),
    Option("layer", "N", "only this layer, counted from 0 [all]"),
    Option("username", "NAME", "user at the registry; goes with --password-file"),
    Option("password-file", "PATH", "file that holds the password or token; - is standard input"),
    Option("auth-file", "PATH", "Docker's config.json or Podman's auth.json [those that are there]"),
    Option(
        "hosts-dir",
        "DIR[:DIR…]",
        "hosts.toml trees that name mirrors [/etc/containerd/certs.d:/etc/docker/certs.d]",
    ),
    Option("plain-http", None, "speak HTTP without TLS to the registry (loopback hosts: always)"),
    Option("tls-ca", "PATH", "authorities to trust beside the system's, a file of PEM certificates"),
    Option(
        "insecure-skip-verify",
        "HOST[:PORT],…",
        "servers whose certificates are not verified, at port 443 or PORT",
    ),
    Option("oci", "KEY=VALUE,…", "platform=, layer=, username= and password= in one, as mkfs.erofs has it"),
    Option("cache-dir", "DIR", "where fetched blocks are kept [/var/cache/erofs-twisted]"),
    Option("cache-size", "SIZE", "how much of the disk all that may take; K, M, G, T [no limit]"),
    Option(
        "trace",
        "auto|record|off",
        "fetch first what a trace names; record: also write one; off: neither [auto]",
    ),
    Option("fill", "auto|off|full", "the rest of the image: while idle, never, or before the mount [auto]"),
    Option("fill-rate", "SIZE", "bytes a second that an idle link is filled with; K, M, G [no limit]"),
    Option("io-timeout", "SECONDS", "how long a read is retried before it fails with EIO [120]"),
    Option("stall-timeout", "SECONDS", "how long a request may bring nothing before it is made again [15]"),
    Option("verbose", None, "say each request, and where credentials come from: in the log, or on stderr"),
)

MOUNT_OPTIONS = (
    Option("image", "IMAGE", "HOST[:PORT]/REPOSITORY[:TAG][@DIGEST], or oci:DIR[:TAG]"),
    Option("mountpoint", "DIR", "directory to mount the image on"),
    Option("mkdir", None, "make the mount point where it is missing, and remove it at the end"),
    Option("options", "OPT,…", "mount options for EROFS, such as cache_strategy=readaround"),
    Option("attach", "auto|nbd|fuse", "how the image becomes a device [auto: nbd, else fuse]"),
    Option(
        "on-stop", "wait|lazy", "told to stop while in use: wait for the mount's users, or umount -l [wait]"
    ),
    Option("state-dir", "DIR", "where mounts are recorded [/run/erofs-twisted]"),
    Option(
        "supervise", None, "with twistd -n: a parent process starts the daemon anew, at once, when it dies"
    ),
    Option("nbd-io-timeout", "MS", "the block layer's queue/io_timeout of the device [1000]"),
    Option("nbd-timeout", "SECONDS", "the driver's request timeout; 0: none, a slow reply hurts nobody [0]"),
    Option("nbd-dead-conn-timeout", "SECONDS", "how long the kernel keeps reads of a dead daemon [300]"),
    Option(
        "nbd-backend-identifier",
        "TEXT",
        "names the device's server to the kernel [the layer's digest and the mount's name]",
    ),
    Option("nbd-read-ahead", "KIB", "the device's read_ahead_kb [1024]"),
    Option("nbd-max-request", "KIB", "the device's max_sectors_kb [1024]"),
)

OPTIONS = {option.name: option for option in (*MOUNT_OPTIONS[:2], *IMAGE_OPTIONS, *MOUNT_OPTIONS[2:])}
"""All of them, by name, in the order in which a mount's help lists them."""

OCI_KEYS = ("platform", "layer", "username", "password")


@attrs.frozen(kw_only=True)
class ImageConfig:
    """Which image, and how to get at it. ``layer`` None means all layers.

    ``trace`` is 'auto', 'record' or 'off'; ``fill`` 'auto', 'off' or 'full'; ``cache_size`` in bytes and
    ``fill_rate`` in bytes a second, None for no limit.
    """

    reference: ImageReference | LayoutReference
    platform: Platform
    layer: int | None
    registry: RegistrySettings
    cache_dir: Path
    cache_size: int | None
    trace: str
    fill: str
    fill_rate: int | None
    verbose: bool


@attrs.frozen(kw_only=True)
class MountConfig:
    """One mount. ``on_stop`` is 'wait' or 'lazy', ``attach`` 'auto', 'nbd' or 'fuse'.

    ``typed`` are the options that make the same mount again, by name: paths absolute, no user, no password.
    """

    image: ImageConfig
    mountpoint: str
    mkdir: bool
    options: MountOptions
    attach: str
    on_stop: str
    state_dir: Path
    nbd: NBDSettings
    typed: Mapping[str, str | bool]


@attrs.frozen(kw_only=True)
class ServiceConfig:
    """A daemon with as many mounts as are asked for. ``defaults`` are options of all its mounts, as typed."""

    defaults: Mapping[str, str | bool]
    state_dir: Path


def read_image_config(image: str, values: Values) -> ImageConfig:
    """From what was typed, and from the environment; reads the password file. Raises `OptionError`."""
    values = _with_oci_shorthand(values)
    reference = _read("image", image, parse_reference)
    if isinstance(reference, LayoutReference):
        reference = attrs.evolve(reference, directory=os.path.abspath(reference.directory))
    return ImageConfig(
        reference=reference,
        platform=_given(values, "platform", Platform.parse, lambda: Platform.of_host(host.machine())),
        layer=_given(values, "layer", _whole_number, lambda: None),
        registry=_registry_settings(values, reference),
        cache_dir=_given(values, "cache-dir", _directory, default_cache_dir),
        cache_size=_given(values, "cache-size", _size, lambda: None),
        trace=_chosen(values, "trace", "auto"),
        fill=_chosen(values, "fill", "auto"),
        fill_rate=_given(values, "fill-rate", _size, lambda: None),
        verbose=bool(values.get("verbose")),
    )


def _registry_settings(values: Values, reference: ImageReference | LayoutReference) -> RegistrySettings:
    return RegistrySettings(
        credentials=_credentials(values),
        logins=_logins(values),
        hosts=_hosts(values, reference),
        plain_http=bool(values.get("plain-http")),
        tls=TLSSettings(
            authorities=_given(values, "tls-ca", _authorities_file, tuple),
            unverified=_given(values, "insecure-skip-verify", parse_unverified, frozenset),
        ),
        proxies=_proxies(reference),
        io_timeout=_given(values, "io-timeout", _seconds, lambda: 120.0),
        stall_timeout=_given(values, "stall-timeout", _seconds, lambda: 15.0),
    )


def read_mount_config(values: Values, is_resolved: bool = False) -> MountConfig:
    """From what was typed. The mount point is looked up, unless it ``is_resolved``. Raises `OptionError`."""
    for required, example in (("image", "registry.example/app:1.2"), ("mountpoint", "/mnt")):
        if not values.get(required):
            raise OptionError(required, f"is missing; for example: --{required} {example}")
    settings = NBDSettings()
    image = read_image_config(str(values["image"]), values)
    mountpoint = str(values["mountpoint"])
    if not is_resolved:
        mountpoint = os.path.realpath(mountpoint)
    for option, path in _watched_files(image.registry):
        # It is looked at again while the mount lives, by the thread that the mount needs to answer.
        if Path(os.path.realpath(path)).is_relative_to(mountpoint):
            raise OptionError(option, f"{path} is below the mount point, and the mount would hide it")
    return MountConfig(
        typed=_repeatable(values),
        image=image,
        mountpoint=mountpoint,
        mkdir=bool(values.get("mkdir")),
        options=_given(values, "options", MountOptions.parse, MountOptions),
        attach=_chosen(values, "attach", "auto"),
        on_stop=_chosen(values, "on-stop", "wait"),
        state_dir=_given(values, "state-dir", _directory, default_state_dir),
        nbd=NBDSettings(
            io_timeout_ms=_given(values, "nbd-io-timeout", _whole_number, lambda: settings.io_timeout_ms),
            timeout=_given(values, "nbd-timeout", _whole_number, lambda: settings.timeout),
            dead_conn_timeout=_given(
                values, "nbd-dead-conn-timeout", _whole_number, lambda: settings.dead_conn_timeout
            ),
            backend_identifier=_given(values, "nbd-backend-identifier", str, lambda: None),
            read_ahead_kb=_given(values, "nbd-read-ahead", _kib, lambda: settings.read_ahead_kb),
            max_sectors_kb=_given(values, "nbd-max-request", _kib, lambda: settings.max_sectors_kb),
        ),
    )


_OF_ONE_MOUNT = ("username", "password-file", "oci", "nbd-backend-identifier")


def read_service_config(values: Values) -> ServiceConfig:
    """From what was typed, without an image and a mount point. Raises `OptionError`."""
    for name in _OF_ONE_MOUNT:
        if values.get(name) is not None:
            raise OptionError(name, "belongs to one mount: give it to 'erofs-nbd mount'")
    # All that is not of one image is looked at now, and not by the first who asks for a mount.
    config = read_mount_config({**values, "image": "localhost/any", "mountpoint": "/"})
    defaults = {name: value for name, value in config.typed.items() if name not in ("image", "mountpoint")}
    defaults.pop("state-dir", None)
    return ServiceConfig(defaults=defaults, state_dir=config.state_dir)


def read_mount_call(values: Values) -> dict[str, str | bool]:
    """What was typed for a mount that a daemon is to make, looked at here: with absolute paths, and the
    password itself. Raises `OptionError`."""
    config = read_mount_config(values)
    call = {name: value for name, value in config.typed.items() if name not in ("mountpoint", "state-dir")}
    credentials = config.image.registry.credentials
    if credentials is not None:
        call |= {"username": credentials.username, "password": credentials.password}
    return call


_PATHS = frozenset({"auth-file", "cache-dir", "hosts-dir", "mountpoint", "state-dir", "tls-ca"})
_NOT_REPEATED = frozenset({"username", "password", "password-file", "supervise"})
"""What is secret, and what is of the process and not of the mount."""


def _repeatable(values: Values) -> dict[str, str | bool]:
    """What was typed, as it may be kept, and typed again in another directory."""
    kept: dict[str, str | bool] = {}
    for name, value in _with_oci_shorthand(values).items():
        if name not in OPTIONS or name in _NOT_REPEATED or value in (None, False, 0):
            continue
        text = str(value)
        if OPTIONS[name].metavar is None:
            kept[name] = True
        elif name in _PATHS:
            kept[name] = ":".join(map(os.path.abspath, text.split(":") if name == "hosts-dir" else [text]))
        elif name == "image":
            reference = _read("image", text, parse_reference)
            if isinstance(reference, LayoutReference):
                reference = attrs.evolve(reference, directory=os.path.abspath(reference.directory))
            kept[name] = str(reference)
        else:
            kept[name] = text
    return kept


def _watched_files(settings: RegistrySettings) -> Iterator[tuple[str, str]]:
    """The files of certificates, each with the option that leads to it."""
    yield from (("tls-ca", path) for path in settings.tls.authorities)
    for server in settings.hosts.hosts if settings.hosts else ():
        for path in (*server.authorities, *itertools.chain.from_iterable(server.clients)):
            yield "hosts-dir", path


def read_state_dir(values: Values) -> Path:
    """``--state-dir`` alone, for commands that only look at mounts. Raises `OptionError`."""
    return _given(values, "state-dir", _directory, default_state_dir)


def read_cache_dir(values: Values) -> Path:
    """``--cache-dir`` alone, for commands that only look after the cache. Raises `OptionError`."""
    return _given(values, "cache-dir", _directory, default_cache_dir)


def read_size(option: str, text: str | None) -> int | None:
    """A size in bytes, as ``--cache-size`` has it. Raises `OptionError`."""
    return None if text is None else _read(option, text, _size)


def default_cache_dir() -> Path:
    if os.geteuid() == 0:
        return Path("/var/cache/erofs-twisted")
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "erofs-twisted"


def default_state_dir() -> Path:
    if os.geteuid() == 0:
        return Path("/run/erofs-twisted")
    runtime = os.environ.get("XDG_RUNTIME_DIR")
    return Path(runtime) / "erofs-twisted" if runtime else Path(f"/tmp/erofs-twisted-{os.geteuid()}")


def passwords_on_command_line(values: Values) -> list[str]:
    """The passwords that ``--oci`` carries: for those who can hide them from other users."""
    pairs = (item.partition("=") for item in str(values.get("oci") or "").split(","))
    return [value for key, _, value in pairs if key == "password" and value]


def _with_oci_shorthand(values: Values) -> dict[str, str | bool | None]:
    """``--oci`` spelt out: each of its keys in the place of the option of the same name."""
    merged = dict(values)
    shorthand = merged.pop("oci", None)
    if shorthand is None:
        return merged
    for item in str(shorthand).split(","):
        key, equals, value = item.partition("=")
        if key not in OCI_KEYS:
            raise OptionError("oci", f"unknown key {key!r}; it takes {', '.join(OCI_KEYS)}")
        if not equals or not value:
            raise OptionError("oci", f"{key}= has no value; leave it out, or give one")
        if merged.get(key) is not None:
            raise OptionError("oci", f"{key}= is given twice, here or as --{key}; give it once")
        merged[key] = value
    return merged


def _credentials(values: Values) -> Credentials | None:
    username, file, password = values.get("username"), values.get("password-file"), values.get("password")
    if file is not None and password is not None:
        raise OptionError("password-file", "the password is also in --oci; give it once")
    if file is not None:
        password = _read("password-file", str(file), _password_in)
    if username is None and password is None:
        return None
    if not username:
        raise OptionError("username", "is missing, though there is a password; give both")
    if password is None:
        raise OptionError("password-file", f"is missing, though there is --username {username}; give both")
    return _read("username", str(username), lambda name: Credentials(name, str(password)))


def _logins(values: Values) -> LoginFiles:
    if values.get("auth-file") is None:
        home = os.path.expanduser("~")
        found = standard_files(os.environ, home if os.path.isabs(home) else "/", os.geteuid())
        return attrs.evolve(found, paths=tuple(map(os.path.abspath, found.paths)))
    if values.get("username") is not None:
        raise OptionError("auth-file", "there is also a --username; give one of them")
    return _read("auth-file", str(values["auth-file"]), _login_file)


def _hosts(values: Values, reference: ImageReference | LayoutReference) -> FoundHosts:
    roots = _given(values, "hosts-dir", _directories, lambda: STANDARD)
    if isinstance(reference, LayoutReference):
        return FoundHosts(())
    try:
        return find_hosts(roots, reference.registry)
    except InvalidHosts as error:
        raise OptionError("hosts-dir", str(error)) from error


def _directories(text: str) -> tuple[str, ...]:
    for path in text.split(":"):
        if not os.path.isdir(path):
            raise ValueError(f"{path!r} is not a directory; several are separated by colons")
    return tuple(map(os.path.abspath, text.split(":")))


def _proxies(reference: ImageReference | LayoutReference) -> Proxies:
    if isinstance(reference, LayoutReference):
        return Proxies()
    try:
        return Proxies.from_environment(os.environ)
    except InvalidProxy as error:
        raise VariableError(error.variable, error.message) from error


def _login_file(path: str) -> LoginFiles:
    """One that the user has named must be there, and be right, before anything is begun."""
    _check_file(path, MAX_CONFIG, parse_docker_config)
    return LoginFiles((os.path.abspath(path),), is_named=True)


def _check_file(path: str, limit: int, parse: Callable[[bytes], object]) -> None:
    if os.path.exists(path) and not os.path.isfile(path):
        raise ValueError(f"{path}: not a file, which could be read again when it changes")
    try:
        with open(path, "rb") as file:
            parse(file.read(limit))
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}") from error
    except ErofsTwistedError as error:
        raise ValueError(f"{path}: {error}") from error


def _authorities_file(path: str) -> tuple[str, ...]:
    """As with logins: what the user has named must be there, and be right, before anything is begun."""
    # What certificates need takes a noticeable part of the start-up: only where there are some.
    from erofs_twisted.registry.pem import MAX_PEM, parse_certificates

    _check_file(path, MAX_PEM + 1, parse_certificates)
    return (os.path.abspath(path),)


def _password_in(path: str) -> str:
    if path == "-":
        password = sys.stdin.read(MAX_PASSWORD)
    else:
        try:
            with open(path, encoding="utf-8") as file:
                password = file.read(MAX_PASSWORD)
        except OSError as error:
            raise ValueError(f"{path}: {error.strerror}") from error
        except UnicodeDecodeError as error:
            raise ValueError(f"{path}: not text in UTF-8") from error
    password = password.removesuffix("\n").removesuffix("\r")
    if not password:
        raise ValueError("standard input was empty" if path == "-" else f"{path} is empty")
    return password


def _read(option: str, text: str, parse: Callable[[str], Read]) -> Read:
    if not text:
        raise OptionError(option, "is empty; leave it out, or give a value")
    try:
        return parse(text)
    except (ValueError, ErofsTwistedError) as error:
        raise OptionError(option, str(error)) from error


def _given(values: Values, option: str, parse: Callable[[str], Read], default: Callable[[], Read]) -> Read:
    text = values.get(option)
    return default() if text is None else _read(option, str(text), parse)


def _whole_number(text: str) -> int:
    if not (text.isascii() and text.isdigit()):
        raise ValueError(f"{text!r} is not a whole number from 0 up")
    return int(text)


def _kib(text: str) -> int:
    number = _whole_number(text)
    if not 4 <= number <= 32768:
        raise ValueError(f"{text} is out of range; it is 4 to 32768, in KiB")
    return number


def _size(text: str) -> int:
    match = re.fullmatch(r"([0-9]{1,15})(?:([KMGT])(?:i?B)?)?", text, re.ASCII | re.IGNORECASE)
    size = int(match[1]) << 10 * ("KMGT".index(match[2].upper()) + 1 if match[2] else 0) if match else 0
    if not size:
        raise ValueError(f"{text!r} is not a size above 0, such as 512M or 20G")
    return size


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = -1.0
    if not 0 < seconds < 1e9:
        raise ValueError(f"{text!r} is not a number of seconds above 0")
    return seconds


def _directory(text: str) -> Path:
    return Path(os.path.abspath(text))


def _chosen(values: Values, option: str, default: str) -> str:
    choices = OPTIONS[option].choices

    def parse(text: str) -> str:
        if text not in choices:
            raise ValueError(f"{text!r} is not known; it is one of {', '.join(choices)}")
        return text

    return _given(values, option, parse, lambda: default)
