"""What the rooms of this house know of each other.

A read goes one way: NBD server → `IExport` → `IBlobReader`. Control goes beside it: the service asks an
`IImageStore` for an image, and an `IDeviceConnector` for a device on which an `INBDServer` serves the export.
"""

from __future__ import annotations

import socket
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import attrs
from zope.interface import Attribute, Interface

if TYPE_CHECKING:
    from twisted.internet.defer import Deferred
    from twisted.internet.interfaces import IListeningPort

    from erofs_twisted.registry.digest import Digest
    from erofs_twisted.registry.manifest import Descriptor, ResolvedImage
    from erofs_twisted.registry.platform import Platform
    from erofs_twisted.registry.probe import Probe
    from erofs_twisted.registry.push import Artifact

Delivery = Callable[[bytes], None]
"""Takes the next piece of a byte range, in order, without gaps."""

Tell = Callable[[str], None]
"""Takes a line on what was done, for who wants to know each step: no credentials, no query of a URL."""


def silent(line: str) -> None:
    """A `Tell` for who doesn't. To compare with, so that no line is made in vain."""


@attrs.frozen(slots=True)
class FileSpan:
    """``length`` bytes at ``offset`` of the open file ``fd``: what a transport can send without a copy."""

    fd: int
    offset: int
    length: int


Segment = FileSpan | bytes
"""A part of a read's answer: a span of a file, or the bytes themselves."""


class IBlobReader(Interface):
    """The bytes of one blob at their origin (a registry, a directory), by ranges. It does not cache."""

    digest: str = Attribute("The blob's digest, ``sha256:…``.")
    size: int = Attribute("The blob's size in bytes, as its descriptor says.")

    def read(offset: int, length: int, deliver: Delivery) -> Awaitable[None]:
        """Fetch ``length`` bytes at ``offset``, giving them to ``deliver`` piece by piece as they come.

        Retries, refreshed tokens and followed redirects are the reader's own affair: ``deliver`` sees every
        byte of the range exactly once, in order.

        Returns an awaitable that ends with None when exactly ``length`` bytes were delivered, or fails with
        `erofs_twisted.errors.ReadError`: with `erofs_twisted.errors.RangesIgnored`, before anything was
        delivered, where the origin gives nothing less than the whole blob. Cancelling it ends the transfer at
        once.
        """


class IExport(Interface):
    """A read-only run of bytes that an NBD server serves."""

    name: str = Attribute("The export's name; '' is the default export.")
    description: str = Attribute("One line for people.")
    size: int = Attribute("Bytes; a multiple of 4096.")

    def read(offset: int, length: int) -> list[Segment] | Deferred[list[Segment]]:
        """The bytes at [offset, offset + length), which lie within the export; length > 0.

        Returns a list of `Segment` whose lengths add up to ``length`` where they are at hand, otherwise a
        Deferred of such a list, which fails with `erofs_twisted.errors.ReadError`. Cancelling the Deferred
        withdraws this reader's interest. A `FileSpan` stays valid as long as the export is served.
        """

    def prefetch(offset: int, length: int) -> Deferred[None]:
        """Bring [offset, offset + length) near; returns a Deferred of None when it is there."""

    def extents(offset: int, length: int) -> list[tuple[int, bool]]:
        """What [offset, offset + length) is made of: a list of (length, is_hole), each length > 0, which add
        up to ``length``. A hole reads as zeros."""


@attrs.frozen(kw_only=True)
class HandedConnection:
    """A client in the transmission phase, for another server to go on with: its socket, the ``requests`` of
    its that are still to be answered, as it sent them, and what was negotiated with it."""

    sock: socket.socket
    requests: bytes = b""
    structured: bool = False
    allocation: bool = False


class INBDServer(Interface):
    """Serves exports to NBD clients."""

    def adopt(sock: socket.socket, export: IExport) -> Deferred[None]:
        """Serve ``export`` on ``sock``, an AF_UNIX stream socket whose other end starts in the transmission
        phase (a kernel device). Takes the socket over. Returns a Deferred that fires with None when the
        connection is lost, whichever side ended it."""

    def go_on(connection: HandedConnection, export: IExport) -> Deferred[None]:
        """As `adopt`, with a connection that another server has handed over."""

    def listen(path: str, exports: Sequence[IExport]) -> Deferred[IListeningPort]:
        """Serve ``exports`` (the first is the default) on a UNIX socket at ``path``, mode 0600, starting
        with the handshake. Returns a Deferred of the IListeningPort."""


@attrs.frozen(kw_only=True)
class HandedDevice:
    """A device for another process to go on with: its path, its size in bytes, what it says of its server,
    the connections to whom it is served, and what its back end needs to know of it, and has open."""

    path: str
    size: int = 0
    identifier: str = ""
    connections: Sequence[HandedConnection] = ()
    facts: Mapping[str, Any] = attrs.field(factory=dict)
    files: Mapping[str, int] = attrs.field(factory=dict)


class IBlockDevice(Interface):
    """An export as the kernel sees it, ready to be mounted."""

    path: str = Attribute("What to mount: ``/dev/nbd3``, or a file.")
    lost: Deferred[None] = Attribute(
        "A Deferred that fires with None when the device has ended without `detach`."
    )

    def is_held() -> Deferred[bool]:
        """A Deferred of bool: does anything (a mount in any namespace, an open file) still use it?"""

    def leave() -> HandedDevice:
        """Its server is about to go, and the device to stay, for another process to `adopt`: what that has
        to have of it, but for the connections. What is open stays so as long as this process."""

    def detach() -> Deferred[None]:
        """Give the device back; a Deferred of None when the kernel has let go of it. Idempotent."""


@attrs.frozen(kw_only=True)
class Connected:
    """A device of the kernel's that has a connection: its path, its size in bytes, what it says of its
    server, and whether anything holds it."""

    path: str
    size: int
    identifier: str
    is_held: bool


class IDeviceConnector(Interface):
    """A way to make an export a device: one of the back ends of ``--attach``."""

    name: str = Attribute("As ``--attach`` has it.")

    def check() -> Deferred[None]:
        """A Deferred of None where this machine can do it, else it fails with
        `erofs_twisted.errors.MountError` that says what is missing and the cure."""

    def attach(export: IExport, server: INBDServer, identifier: str | None = None) -> Deferred[IBlockDevice]:
        """A Deferred of an `IBlockDevice` of the export's size, or a failure that leaves nothing behind.
        ``identifier`` is what the device is to say of its server, where it can say anything, in place of the
        export's description."""

    def connected(identifier: str) -> Deferred[list[Connected]]:
        """A Deferred of the devices that say this of their server, and that may get a new one."""

    def adopt(path: str, export: IExport, server: INBDServer, identifier: str) -> Deferred[IBlockDevice]:
        """Serve a device whose server has handed it over, or was killed, as one of `connected` said of it. A
        Deferred of it, or a failure that leaves it as it was."""

    def disconnect(path: str) -> Deferred[None]:
        """Take away a device of `connected` that nobody serves or uses. Fails with
        `erofs_twisted.errors.MountError`."""


class IMounts(Interface):
    """The mounts of a daemon, as its control socket has them. What is said of one is a dict, fit for JSON."""

    def status() -> dict[str, Any]:
        """Of the daemon as a whole."""

    def log_lines(mountpoint: str, after: int) -> dict[str, Any]:
        """The last lines of its log since number ``after``, those about a mount or ('') all; and the number
        to ask for next. Raises `erofs_twisted.control.errors.NoSuchMount`."""

    def upgrade() -> None:
        """Begin to go on as the program that is installed now, with the same mounts. Raises
        `erofs_twisted.errors.MountError` where that cannot be."""

    def mounts() -> list[dict[str, Any]]:
        """All of them."""

    def one(mountpoint: str) -> dict[str, Any]:
        """One of them. Raises `erofs_twisted.control.errors.NoSuchMount`."""

    def mount(
        mountpoint: str, options: Mapping[str, str | bool], reach: str = ""
    ) -> Deferred[tuple[bool, dict[str, Any]]]:
        """Mount an image, with options as they are typed. A Deferred that fires when it can be used: with
        whether it is new, and what it is. It fails with `erofs_twisted.control.errors.MountedOtherwise`, or
        another `erofs_twisted.errors.ErofsTwistedError`. A caller that goes away does not end it.

        ``reach`` is as `erofs_twisted.mount.mountpoint.Mountpoint` has it, and '' or the caller's own."""

    def unmount(mountpoint: str, lazy: bool) -> Deferred[None]:
        """A Deferred of None when nothing is left of it; with ``lazy``, when it is out of the directory tree.
        It fails with `erofs_twisted.mount.mountpoint.Busy`, which leaves the mount."""

    def prefetch(mountpoint: str) -> Deferred[None]:
        """A Deferred of None when all of the image is in the cache, and was compared with its digest."""


class IImageStore(Interface):
    """Where an image lies: a repository of a registry, or a layout on disk."""

    def resolve(platform: Platform) -> Deferred[ResolvedImage]:
        """A Deferred of the `erofs_twisted.registry.manifest.ResolvedImage` for a `Platform`."""

    def blob(descriptor: Descriptor) -> IBlobReader:
        """The `IBlobReader` of a layer's `erofs_twisted.registry.manifest.Descriptor`."""

    def referrers(subject: Digest, artifact_type: str) -> Deferred[tuple[Descriptor, ...]]:
        """A Deferred of the descriptors of the manifests of that type which refer to the manifest
        ``subject``, as far as is known here. Whether they do is for the caller to check."""

    def fetch(descriptor: Descriptor) -> Deferred[bytes]:
        """A Deferred of the content of a manifest or of a small blob, compared with its digest."""

    def probe(descriptor: Descriptor) -> Deferred[Probe | None]:
        """A Deferred of how a blob can be had from its registry; None where there is no registry."""

    def push_referrer(image: ResolvedImage, artifact: Artifact) -> Deferred[Digest]:
        """Add an `erofs_twisted.registry.push.Artifact` that refers to an image; a Deferred of the digest of
        its manifest."""

    def close() -> Deferred[None]:
        """A Deferred of None when every connection and file is closed."""
