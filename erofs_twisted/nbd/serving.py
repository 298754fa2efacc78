"""The transmission phase of one client: requests are taken, carried out on an export, and answered."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from twisted.internet.defer import CancelledError, Deferred
from twisted.internet.interfaces import IPushProducer
from twisted.logger import Logger
from twisted.python.failure import Failure
from zope.interface import implementer

from erofs_twisted.interfaces import FileSpan, IExport, Segment
from erofs_twisted.nbd.errors import FramingLost, WireError, is_expected, wire_error, wire_message
from erofs_twisted.nbd.pages import DiskReaders, Files
from erofs_twisted.nbd.transmission import (
    Answered,
    BlockStatus,
    Disconnect,
    Prefetch,
    Read,
    Transmission,
    encode_request,
)
from erofs_twisted.nbd.transport import ISpanTransport, Sendable
from erofs_twisted.nbd.wire import MAXIMUM_PAYLOAD

MAX_REQUESTS = 256
"""Requests that wait for the export at any one time; the Linux kernel sends 128, libnbd's tools 64."""

MAX_BYTES = 64 << 20
"""Bytes that those requests ask for, beyond which no further one is taken."""

MAX_BACKLOG = 32 << 10
"""Bytes of requests that are received ahead; then the client's socket is left alone.

It is read from for that long though no request is taken, since only reading tells when a client is gone."""

BATCH = 128 << 10
"""Bytes of small replies that are gathered before they are sent."""

SMALL = 16 << 10
"""Spans up to this many bytes are read and sent in batches; longer ones leave their file by sendfile."""


@implementer(IPushProducer)
class Serving:
    """Serves ``export`` to the client at the other end of ``transport``.

    Give what the client sends to `receive`, and tell it by `lost` when the transport is. It registers itself
    as the transport's producer: it takes no request while the client does not take the replies. ``readers``
    read in what is to be sent and is not in memory.
    """

    _log = Logger()

    def __init__(
        self,
        export: IExport,
        transport: Any,
        readers: DiskReaders,
        *,
        structured: bool,
        allocation: bool,
    ) -> None:
        self._export = export
        self._files = Files(readers)
        self._transport = transport
        self._machine = Transmission(export.size, structured=structured, allocation=allocation)
        self._content_header = self._machine.replies.content
        self._pending: dict[Deferred[Any], tuple[Read | Prefetch, int]] = {}
        self._pending_bytes = 0
        self._replies: list[Sendable] = []
        self._replies_bytes = 0
        self._serving = False
        self._paused = False
        self._reading = True
        self._draining = False
        self._held: Deferred[None] | None = None
        self._over = False
        self._blocked = False
        self._write: Callable[[Sequence[Any]], None]
        if ISpanTransport.providedBy(transport):
            self._write, self._inline = transport.write_segments, SMALL
            transport.bring = self._files.bring_again
        else:
            self._write, self._inline = transport.writeSequence, MAXIMUM_PAYLOAD
        transport.registerProducer(self, True)

    def receive(self, data: bytes) -> None:
        """Take bytes from the client."""
        if not self._over:
            self._machine.feed(data)
            self._serve()

    def lost(self) -> None:
        """The client is gone: withdraw from everything that was started for it. Idempotent."""
        self._over = self._blocked = True
        self._cancel()
        self._files.close()

    def shut_down(self) -> None:
        """Refuse new requests, and close when those under way are answered."""
        self._machine.shut_down()
        self._draining = True
        self._serve()

    def withdraw(self) -> None:
        """After `shut_down`: don't wait for the export any longer, refuse what is under way too."""
        self._cancel()

    def hold(self) -> Deferred[None]:
        """Take no more requests; a Deferred that fires when those under way are answered, and the client has
        taken the replies. `hand_over` may follow."""
        held: Deferred[None] = Deferred(lambda _: None)
        self._held = held
        if self._reading:
            self._reading = False
            self._transport.pauseProducing()
        self._limit()
        self._serve()
        return held

    def hand_over(self) -> bytes | None:
        """After `hold`: the requests that are still to be answered, as the client sent them, for somebody
        else to do that. Nothing more happens here then. None where it cannot be done: in the middle of a
        request or of a reply, or where the client leaves."""
        rest = self._machine.rest
        if self._over or self._paused or self._draining or rest is None:
            return None
        requests = b"".join(encode_request(request) for request, _ in self._pending.values())
        self._transport.unregisterProducer()
        self.lost()
        return requests + rest

    def pauseProducing(self) -> None:
        self._paused = self._blocked = True

    def resumeProducing(self) -> None:
        self._paused = False
        self._limit()
        self._serve()

    def stopProducing(self) -> None:
        self.lost()

    def _serve(self) -> None:
        """Do what can be done now. Whoever calls in meanwhile leaves the work to the call that is running."""
        if self._serving or self._over:
            return
        self._serving = True
        try:
            self._take_requests()
        except FramingLost as lost:
            self._log.error(
                "a client of export {export} is cut off: {reason}", export=self._export.name, reason=str(lost)
            )
            self.lost()
            self._transport.abortConnection()
        finally:
            self._serving = False
        if not self._over:
            self._flush()
        if self._over:
            return
        if self._draining and not self._pending:
            self._finish()
        elif self._held is None:
            self._regulate_reading()
        elif not self._pending and not self._paused and not self._held.called:
            self._held.callback(None)

    def _take_requests(self) -> None:
        next_request = self._machine.next_request
        while not self._blocked:
            request = next_request()
            if request is None:
                break
            if type(request) is Read:
                self._read(request)
            elif type(request) is Answered:
                self._put(request.reply)
            elif type(request) is Prefetch:
                self._prefetch(request)
            elif type(request) is BlockStatus:
                self._block_status(request)
            elif type(request) is Disconnect:
                self._draining = True

    def _read(self, request: Read) -> None:
        _, offset, length = request
        try:
            content = self._export.read(offset, length)
            if isinstance(content, Deferred):
                self._await(content, request, self._put_content, length)
            else:
                self._put_content(request, content)
        except Exception as error:  # noqa: BLE001 - whatever goes wrong, the client is owed an answer
            self._refuse(request, Failure(error))

    def _put_content(self, request: Read, segments: list[Segment]) -> None:
        """Answer a read with ``segments``, now if all of them are in memory, else when they are."""
        cookie, offset, length = request
        answer: list[Sendable] = [self._content_header(cookie, offset, length)]
        given = 0
        for segment in segments:
            if isinstance(segment, FileSpan):
                size = segment.length
                given += size
                pages = self._files[segment.fd]
                if size <= self._inline:
                    data = pages.peek(segment.offset, size)
                    if data is None:
                        self._read_in(request, segments)
                        return
                    answer.append(data)
                    continue
                if not pages.has(segment.offset, size):
                    self._read_in(request, segments)
                    return
            else:
                given += len(segment)
            answer.append(segment)
        self._put_answer(answer, given, length)

    def _read_in(self, request: Read, segments: list[Segment]) -> None:
        loaded = Deferred.fromCoroutine(self._files.load(segments, self._inline))
        self._await(loaded, request, self._put_loaded, request.length)

    def _put_loaded(self, request: Read, segments: list[Sendable]) -> None:
        """Answer a read with ``segments`` whose spans have just been read in."""
        cookie, offset, length = request
        given = sum(each.length if isinstance(each, FileSpan) else len(each) for each in segments)
        self._put_answer([self._content_header(cookie, offset, length), *segments], given, length)

    def _put_answer(self, answer: list[Sendable], given: int, length: int) -> None:
        if given != length:
            raise ValueError(f"the export gave {given} bytes for a read of {length}")
        self._replies += answer
        self._replies_bytes += length
        if self._replies_bytes >= BATCH:
            self._flush()

    def _prefetch(self, request: Prefetch) -> None:
        try:
            self._await(self._export.prefetch(request.offset, request.length), request, self._prefetched, 0)
        except Exception as error:  # noqa: BLE001 - as for a read
            self._refuse(request, Failure(error))

    def _prefetched(self, request: Prefetch, _: object) -> None:
        self._put(self._machine.replies.done(request.cookie))

    def _block_status(self, request: BlockStatus) -> None:
        cookie, offset, length, only_one = request
        try:
            extents = self._export.extents(offset, length)
            self._put(self._machine.structured_replies.extents(cookie, extents, only_one=only_one))
        except Exception as error:  # noqa: BLE001 - as for a read
            self._refuse(request, Failure(error))

    def _await(
        self,
        deferred: Deferred[Any],
        request: Read | Prefetch,
        answer: Callable[[Any, Any], None],
        size: int,
    ) -> None:
        self._pending[deferred] = request, size
        self._pending_bytes += size
        self._limit()
        _ = deferred.addBoth(self._settled, deferred, request, answer)

    def _settled(
        self, result: Any, deferred: Deferred[Any], request: Any, answer: Callable[[Any, Any], None]
    ) -> None:
        self._pending_bytes -= self._pending.pop(deferred)[1]
        self._limit()
        if self._over:
            return
        if isinstance(result, Failure):
            self._refuse(request, result)
        else:
            try:
                answer(request, result)
            except Exception as error:  # noqa: BLE001 - as for a read
                self._refuse(request, Failure(error))
        self._serve()

    def _refuse(self, request: Read | Prefetch | BlockStatus, failure: Failure) -> None:
        """Tell the client that ``request`` failed, and the log why."""
        error = failure.value
        assert error is not None
        if self._draining and isinstance(error, CancelledError):
            reply = self._machine.replies.error(
                request.cookie, WireError.ESHUTDOWN, "the server is shutting down"
            )
            self._put(reply)
            return
        said = "{command} of {length} bytes at {offset} of export {export} failed: {reason}"
        about: dict[str, Any] = {
            "command": type(request).__name__,
            "export": self._export.name,
            "offset": request.offset,
            "length": request.length,
            "reason": str(error) or wire_message(error),
        }
        if is_expected(error):
            self._log.error(said, **about)
        else:
            self._log.failure(said, failure, **about)
        self._put(self._machine.replies.error(request.cookie, wire_error(error), wire_message(error)))

    def _put(self, reply: bytes) -> None:
        self._replies.append(reply)
        self._replies_bytes += len(reply)
        if self._replies_bytes >= BATCH:
            self._flush()

    def _flush(self) -> None:
        replies = self._replies
        if replies:
            self._replies = []
            self._replies_bytes = 0
            self._write(replies)

    def _limit(self) -> None:
        self._blocked = (
            self._paused
            or self._over
            or self._held is not None
            or len(self._pending) >= MAX_REQUESTS
            or self._pending_bytes >= MAX_BYTES
        )

    def _regulate_reading(self) -> None:
        enough = self._machine.ended or self._machine.backlog >= MAX_BACKLOG
        if enough and self._reading:
            self._reading = False
            self._transport.pauseProducing()
        elif not enough and not self._reading:
            self._reading = True
            self._transport.resumeProducing()

    def _cancel(self) -> None:
        for deferred in list(self._pending):
            deferred.cancel()

    def _finish(self) -> None:
        self._over = self._blocked = True
        self._transport.unregisterProducer()
        self._transport.loseConnection()
