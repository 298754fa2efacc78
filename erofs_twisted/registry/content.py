"""What is pushed as a blob: bytes, or a file, which goes out piece by piece and is never in memory whole."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable
from typing import Any

import attrs
from twisted.internet.defer import Deferred, succeed
from twisted.internet.interfaces import IConsumer
from twisted.internet.threads import deferToThreadPool
from twisted.python.failure import Failure
from twisted.python.threadpool import ThreadPool
from twisted.web.iweb import IBodyProducer
from zope.interface import implementer

from erofs_twisted.registry.digest import Digest
from erofs_twisted.registry.errors import DigestMismatch, RegistryError
from erofs_twisted.registry.transport import Extend, Sender

PIECE = 256 * 1024
"""Bytes of a body that are read at a time; two pieces are in memory."""
STORE_RATE = 16 * 1024 * 1024
"""Bytes a second: how fast a registry that has all of a blob puts it into place, at the least. Some copy it
from one place to another before they answer."""


@attrs.frozen
class FileContent:
    """A blob that is a file of ``size`` bytes; ``digest`` was taken of it before.

    ``file`` is a path, or a descriptor that stays open until the push is over; where that stands in its file
    is neither used nor changed. It is read by the threads of ``pool``.
    """

    file: str | int
    digest: Digest
    size: int
    pool: ThreadPool = attrs.field(repr=False)

    @property
    def name(self) -> str:
        """For errors."""
        return self.file if isinstance(self.file, str) else f"file descriptor {self.file}"


Content = bytes | FileContent


def digest_of(content: Content) -> Digest:
    """The digest: taken now of bytes, and long ago of a file."""
    return Digest.of(content) if isinstance(content, bytes) else content.digest


def sender(content: Content, reactor: Any, patience: float) -> Sender:
    """Sends ``content`` as a body, as often as need be; each piece that is taken gives ``patience`` seconds.

    The last one gives more, as a registry may need longer to put away what is large.
    """
    size = len(content) if isinstance(content, bytes) else content.size

    def send(extend: Extend) -> _Producer:
        source = _Bytes(content) if isinstance(content, bytes) else _File(reactor, content)
        return _Producer(source, size, extend, patience)

    return send


@attrs.frozen
class _Bytes:
    _content: bytes

    def read(self, offset: int, length: int) -> Deferred[bytes]:
        return succeed(self._content[offset : offset + length])

    def close(self) -> None:
        """Nothing is open."""


@attrs.define(eq=False)
class _File:
    """Reads one piece at a time. What is wrong with the file is a `RegistryError`."""

    _reactor: Any
    _content: FileContent
    _fd: int | None = attrs.field(init=False, default=None)

    def read(self, offset: int, length: int) -> Deferred[bytes]:
        return deferToThreadPool(self._reactor, self._content.pool, self._read, offset, length)

    def close(self) -> None:
        """Not while something is being read."""
        fd, self._fd = self._fd, None
        if fd is not None and isinstance(self._content.file, str):
            os.close(fd)

    def _read(self, offset: int, length: int) -> bytes:
        content = self._content
        try:
            if self._fd is None:
                self._open()
            assert self._fd is not None
            data = os.pread(self._fd, length, offset)
            while 0 < len(data) < length:
                more = os.pread(self._fd, length - len(data), offset + len(data))
                if not more:
                    break
                data += more
        except OSError as error:
            raise RegistryError(f"{content.name} cannot be read: {error.strerror}") from error
        if len(data) < length:
            raise _changed(content, offset + len(data))
        return data

    def _open(self) -> None:
        file = self._content.file
        # O_NONBLOCK: to open a FIFO would wait for somebody who writes to it.
        self._fd = (
            os.open(file, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK) if isinstance(file, str) else file
        )
        status = os.fstat(self._fd)
        if not stat.S_ISREG(status.st_mode):
            raise RegistryError(f"{self._content.name} is not a regular file, so it cannot be pushed")
        if status.st_size != self._content.size:
            raise _changed(self._content, status.st_size)


def _changed(content: FileContent, size: int) -> DigestMismatch:
    return DigestMismatch(
        f"{content.name} has {size} bytes, but had {content.size} when its digest was taken; "
        "push it when nothing writes to it any more"
    )


@implementer(IBodyProducer)
class _Producer:
    """Writes as fast as the connection takes it, and reads the next piece meanwhile."""

    def __init__(self, source: _Bytes | _File, size: int, extend: Extend, patience: float) -> None:
        self.length = size
        self._source = source
        self._extend = extend
        self._patience = patience
        self._offset = 0
        self._piece: bytes | None = None
        self._is_reading = False
        self._is_paused = False
        self._consumer: IConsumer | None = None
        self._finished: Deferred[None] | None = None

    def startProducing(self, consumer: IConsumer) -> Deferred[None]:
        self._consumer = consumer
        finished: Deferred[None] = Deferred(lambda _: self.stopProducing())
        self._finished = finished
        self._read()
        return finished

    def pauseProducing(self) -> None:
        self._is_paused = True

    def resumeProducing(self) -> None:
        self._is_paused = False
        self._extend(self._patience)
        self._write()

    def stopProducing(self) -> None:
        self._consumer = self._piece = self._finished = None
        if not self._is_reading:
            self._source.close()

    def _read(self) -> None:
        self._is_reading = True
        length = min(PIECE, self.length - self._offset)
        _ = self._source.read(self._offset, length).addCallbacks(self._have, self._fail)

    def _have(self, piece: bytes) -> None:
        self._is_reading = False
        if self._finished is None:
            self._source.close()
            return
        self._piece = piece
        self._write()

    def _write(self) -> None:
        if self._is_paused or self._piece is None or self._consumer is None:
            return
        piece, self._piece = self._piece, None
        self._offset += len(piece)
        is_last = self._offset == self.length
        self._extend(self._patience + (self.length / STORE_RATE if is_last else 0.0))
        self._consumer.write(piece)
        if self._finished is None:
            return  # whoever took the piece wants no more
        if is_last:
            self._end(lambda finished: finished.callback(None))
        else:
            self._read()

    def _fail(self, failure: Failure) -> None:
        self._is_reading = False
        self._end(lambda finished: finished.errback(failure))

    def _end(self, tell: Callable[[Deferred[None]], None]) -> None:
        finished = self._finished
        self.stopProducing()
        if finished is not None:
            tell(finished)
