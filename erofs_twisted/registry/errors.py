"""What can go wrong between an image's name and its bytes."""

from __future__ import annotations

from erofs_twisted.errors import ErofsTwistedError, ReadError


class RegistryError(ErofsTwistedError):
    """An image or a part of it cannot be had.

    ``temporary`` says whether the same request may succeed later. ``retry_after`` is how many seconds the
    registry asked to wait before it, None where it did not say.
    """

    def __init__(self, message: str, *, temporary: bool = False, retry_after: float | None = None) -> None:
        super().__init__(message)
        self.temporary = temporary
        self.retry_after = retry_after


class InvalidReference(RegistryError):
    """An image's name cannot be read."""


class InvalidDigest(RegistryError):
    """A digest is not of the form ``sha256:…`` or ``sha512:…``."""


class InvalidPlatform(RegistryError):
    """A platform is not of the form OS/ARCH[/VARIANT]."""


class InvalidTLSFile(RegistryError):
    """A file of certificates or keys cannot be used; the message names it."""


class InvalidHeader(RegistryError):
    """A header of a response does not follow its grammar."""


class InvalidProxy(RegistryError):
    """What the environment's ``variable`` holds is no proxy. It is not shown: it may hold a password."""

    def __init__(self, variable: str, message: str) -> None:
        super().__init__(f"{variable}: {message}")
        self.variable = variable
        self.message = message


class InvalidManifest(RegistryError):
    """A manifest, an index or a layout's file is not what the OCI specification says."""


class DigestMismatch(RegistryError):
    """The bytes that came are not those that the digest names."""


class NotInRegistry(RegistryError):
    """The registry or the layout has no such image, manifest or blob."""


class PlatformMissing(RegistryError):
    """The image is not there for the platform asked for."""


class AccessDenied(RegistryError):
    """The registry wants credentials, or refuses those that it was given."""


class TransferFailed(RegistryError):
    """A request was answered by an error or by something else than was asked for, or not at all."""


class WrongAnswer(TransferFailed):
    """An answer that is none to what was asked, or the refusal of a host that the registry has just sent us
    to: it may be one server among many, or one on the way, that is at fault, and the next answer right."""


class Busy(TransferFailed):
    """The server asks to come back later: it has too much to do, or has had too many requests."""


class Unreachable(TransferFailed):
    """No connection came about, so no request was made."""


class NoHost(RegistryError):
    """None of a registry's servers may be asked for that."""


class BlobUnreadable(RegistryError, ReadError):
    """A range of a blob cannot be had, after all that could be tried."""
