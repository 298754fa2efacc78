"""What can go wrong between an NBD server and its clients, and how each thing is told to them."""

from __future__ import annotations

import errno
from enum import IntEnum

from erofs_twisted.errors import ErofsTwistedError, ReadError


class WireError(IntEnum):
    """The error values of a reply: these and no others ("Error values")."""

    EPERM = 1
    EIO = 5
    ENOMEM = 12
    EINVAL = 22
    ENOSPC = 28
    EOVERFLOW = 75
    ENOTSUP = 95
    ESHUTDOWN = 108


class NBDServerError(ErofsTwistedError):
    """The root of what the NBD server raises."""


class FramingLost(NBDServerError):
    """A client sent what is no NBD request: where the next one starts cannot be known any more."""


_TOLD = {
    errno.ENOMEM: WireError.ENOMEM,
    errno.ENOTSUP: WireError.ENOTSUP,
    errno.ESHUTDOWN: WireError.ESHUTDOWN,
}


def wire_error(error: BaseException) -> WireError:
    """The value that tells a client about a failure on this side.

    It is EIO but for the few errno that say more. EPERM, EINVAL, ENOSPC and EOVERFLOW speak of a request, so
    that a system call which failed here with one of them is EIO too.
    """
    if isinstance(error, MemoryError):
        return WireError.ENOMEM
    number = error.errno if isinstance(error, OSError) else None
    return WireError.EIO if number is None else _TOLD.get(number, WireError.EIO)


def wire_message(error: BaseException) -> str:
    """What a client may be told about ``error``: its text if that is meant for people, else only its kind."""
    if isinstance(error, (ErofsTwistedError, OSError)):
        return str(error)
    if isinstance(error, MemoryError):
        return "out of memory"
    return f"internal error ({type(error).__name__})"


def is_expected(error: BaseException) -> bool:
    """Whether ``error`` is one that a read may end with, so that its text is all the log needs."""
    return isinstance(error, (ReadError, OSError, MemoryError))
