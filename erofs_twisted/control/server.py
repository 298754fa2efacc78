"""What a daemon answers on its control socket. The calls are in docs/control.md."""

from __future__ import annotations

import json
import os
import re
import socket
import struct
from collections.abc import Mapping
from typing import Any

from twisted.internet.defer import Deferred
from twisted.logger import Logger
from twisted.python.failure import Failure
from twisted.web.http import Request
from twisted.web.resource import Resource
from twisted.web.server import NOT_DONE_YET, Site

from erofs_twisted.control.errors import CallError, Forbidden, MountedOtherwise, NoSuchMount
from erofs_twisted.errors import ErofsTwistedError
from erofs_twisted.interfaces import IMounts
from erofs_twisted.mount.mountpoint import Busy
from erofs_twisted.options import OptionError

MAX_BODY = 64 * 1024
STATUSES: tuple[tuple[type[ErofsTwistedError], int], ...] = (
    (Forbidden, 403),
    (CallError, 400),
    (OptionError, 400),
    (NoSuchMount, 404),
    (MountedOtherwise, 409),
    (Busy, 409),
    (ErofsTwistedError, 502),
)
"""What an error is in HTTP: the first that fits."""


class Control(Resource):
    """``/v1`` of a daemon's ``mounts``, for root and the user that it runs as."""

    isLeaf = True
    log = Logger()

    def __init__(self, mounts: IMounts) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._mounts = mounts

    def render(self, request: Request) -> int:
        # Who goes away before the answer has set something going, and that goes on.
        _ = request.notifyFinish().addErrback(lambda _: None)
        _ = Deferred.fromCoroutine(self._respond(request)).addErrback(self._fail, request)
        return NOT_DONE_YET

    async def _respond(self, request: Request) -> None:
        try:
            if _peer_user(request) not in (0, os.geteuid()):
                raise Forbidden("only root and the user whom the daemon runs as may do that")
            status, content = await self._call(request)
        except ErofsTwistedError as error:
            status = next(code for kind, code in STATUSES if isinstance(error, kind))
            content = {"error": str(error)}
        _send(request, status, content)

    async def _call(self, request: Request) -> tuple[int, Any]:
        """The answer's status, and what it says. Raises `ErofsTwistedError`."""
        mounts, where = self._mounts, [_text(part) for part in request.postpath]  # type: ignore[attr-defined]
        match request.method.decode("latin-1"), *where:
            case "GET", "v1", "status":
                return 200, mounts.status()
            case "POST", "v1", "upgrade":
                mounts.upgrade()
                return 202, mounts.status()
            case "GET", "v1", "log":
                return 200, mounts.log_lines(_query(request, "mountpoint"), _number(request, "after"))
            case "GET", "v1", "mounts":
                return 200, {"mounts": mounts.mounts()}
            case "GET", "v1", "mounts", path:
                return 200, mounts.one(path)
            case "PUT", "v1", "mounts", path:
                is_new, mount = await mounts.mount(path, _options(request), _reach(request))
                return 201 if is_new else 200, mount
            case "DELETE", "v1", "mounts", path:
                await mounts.unmount(path, lazy=_query(request, "lazy") == "true")
                return 200, {}
            case "POST", "v1", "mounts", path, "prefetch":
                await mounts.prefetch(path)
                return 200, mounts.one(path)
        raise CallError(f"{request.method.decode('latin-1')} {_text(request.path)} is no call")

    def _fail(self, failure: Failure, request: Request) -> None:
        self.log.failure("a bug: please report it", failure)
        _send(
            request, 500, {"error": f"unexpected {type(failure.value).__name__}: the daemon's log has more"}
        )


def site(mounts: IMounts) -> Site:
    """What listens on the socket."""
    found = Site(Control(mounts))
    found.noisy = False
    found.displayTracebacks = False
    # A call may take as long as a mount does, and the caller knows how long that may be.
    found.timeOut = None
    found.log = lambda request: None  # type: ignore[method-assign]
    return found


def _send(request: Request, status: int, content: Any) -> None:
    if request._disconnected:
        return
    request.setResponseCode(status)
    request.setHeader("Content-Type", "application/json")
    request.write(json.dumps(content).encode() + b"\n")
    request.finish()


def _peer_user(request: Request) -> int:
    """The user id at the other end, as it was when that connected."""
    transport: Any = request.transport
    credentials = transport.socket.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
    return int(struct.unpack("3i", credentials)[1])


def _text(part: bytes) -> str:
    return os.fsdecode(part)


def _query(request: Request, name: str) -> str:
    values = request.args.get(name.encode(), [b""])
    return _text(values[0])


def _reach(request: Request) -> str:
    reach = _query(request, "reach")
    if reach and not re.fullmatch(r"/proc/[0-9]+/fd/[0-9]+", reach):
        raise CallError(f"reach={reach!r:.40} is no open file of a process, as /proc/123/fd/4")
    return reach


def _number(request: Request, name: str) -> int:
    text = _query(request, name) or "0"
    if not (text.isascii() and text.isdigit() and len(text) < 20):
        raise CallError(f"{name}={text!r:.40} is not a whole number")
    return int(text)


def _options(request: Request) -> Mapping[str, str | bool]:
    """Those of a mount, by name, out of the body. Raises `CallError`."""
    assert request.content is not None
    body = request.content.read(MAX_BODY + 1)
    if len(body) > MAX_BODY:
        raise CallError(f"the body is longer than {MAX_BODY} bytes")
    try:
        found = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise CallError(f"the body is not JSON: {error}") from error
    if not isinstance(found, dict) or not all(type(value) in (str, bool) for value in found.values()):
        raise CallError("the body is not an object of options, whose values are text, true and false")
    return found
