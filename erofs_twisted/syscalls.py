"""System calls that Python lacks, and a way to await calls that block.

A mount(2) reads the device that our own reactor serves, so none of these may run on the reactor's thread:
`in_thread` takes them to a pool.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

from twisted.internet.defer import CancelledError, Deferred
from twisted.internet.threads import deferToThreadPool
from twisted.python.failure import Failure
from twisted.python.threadpool import ThreadPool

MNT_DETACH = 2
MNT_EXPIRE = 4
UMOUNT_NOFOLLOW = 8

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mount.argtypes = (ctypes.c_char_p, ctypes.c_char_p, ctypes.c_char_p, ctypes.c_ulong, ctypes.c_char_p)
_libc.umount2.argtypes = (ctypes.c_char_p, ctypes.c_int)


def mount(source: str, target: str, fstype: str, flags: int, data: str) -> None:
    """mount(2). Raises OSError, with the target as its file name."""
    failed = _libc.mount(os.fsencode(source), os.fsencode(target), fstype.encode(), flags, os.fsencode(data))
    if failed:
        raise _last_error(target)


def umount(target: str, flags: int = 0) -> None:
    """umount2(2). Raises OSError, with the target as its file name."""
    if _libc.umount2(os.fsencode(target), flags):
        raise _last_error(target)


async def in_thread(
    reactor: Any,
    pool: ThreadPool,
    call: Callable[Arguments, Result],
    *args: Arguments.args,
    **kwargs: Arguments.kwargs,
) -> Result:
    """What ``call`` returns, from a thread of ``pool``. To cancel this leaves the call running, unheeded."""
    return await deferToThreadPool(reactor, pool, call, *args, **kwargs)


async def in_thread_to_its_end(
    reactor: Any,
    pool: ThreadPool,
    call: Callable[Arguments, Result],
    *args: Arguments.args,
    **kwargs: Arguments.kwargs,
) -> tuple[Result, bool]:
    """Like `in_thread`, for a call that must be undone when its result is no longer wanted. Returns the
    result, and whether it was cancelled in the meantime; what ``call`` raises is raised either way."""
    outcome: list[Result | Failure] = []
    ended: Deferred[None] = Deferred()

    def settle(result: Result | Failure) -> None:
        outcome.append(result)
        ended.callback(None)

    work = deferToThreadPool(reactor, pool, call, *args, **kwargs).addBoth(settle)
    cancelled = False
    while not work.called:
        try:
            await ended
        except CancelledError:
            cancelled = True
            ended = Deferred()
    (result,) = outcome
    if isinstance(result, Failure):
        result.raiseException()
    return result, cancelled


def _last_error(target: str) -> OSError:
    number = ctypes.get_errno()
    return OSError(number, os.strerror(number), target)
