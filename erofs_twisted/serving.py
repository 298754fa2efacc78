"""An image's layer on a UNIX socket, for NBD clients in user space."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AsyncExitStack
from typing import Any

from twisted.internet.defer import Deferred
from twisted.internet.error import CannotListenError

from erofs_twisted.errors import MountError
from erofs_twisted.image import open_image
from erofs_twisted.nbd.server import NBDServer
from erofs_twisted.options import ImageConfig
from erofs_twisted.pool import SystemCallPool


async def serve_image(reactor: Any, config: ImageConfig, path: str, ready: Callable[[str], None]) -> None:
    """Serve until cancelled; ``ready`` is told, in a line for people, once clients may come.

    Raises what `open_image` raises, or `MountError` where ``path`` cannot be listened on; leaves nothing.
    """
    async with AsyncExitStack() as undo:
        pool = SystemCallPool(reactor)
        undo.push_async_callback(pool.stop)
        image = await open_image(reactor, pool, config)
        undo.push_async_callback(image.close)
        await image.check()
        server = NBDServer(reactor)
        undo.push_async_callback(server.stop)
        try:
            await server.listen(path, [image.export])
        except CannotListenError as error:
            raise MountError(f"--socket {path}: {_reason(error.socketError)}") from error
        except OSError as error:
            raise MountError(f"--socket {path}: {_reason(error)}") from error
        ready(f"serving {config.reference} ({image.resolved.digest}), {image.export.size} bytes, on {path}")
        await Deferred()


def _reason(error: Exception) -> str:
    """Python refuses a path that is too long by itself, with a message and no errno."""
    return getattr(error, "strerror", None) or str(error)
