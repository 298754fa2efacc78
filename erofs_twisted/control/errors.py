"""What may be wrong with a call."""

from __future__ import annotations

from erofs_twisted.errors import MountError


class CallError(MountError):
    """A call that is no call of this interface."""


class Forbidden(CallError):
    """Not for this user."""


class NoSuchMount(MountError):
    """The daemon has no mount there."""


class MountedOtherwise(MountError):
    """Another image is mounted there, or the same in another way."""


class NoDaemon(MountError):
    """Nobody listens on the socket."""
