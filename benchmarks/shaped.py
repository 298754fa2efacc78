"""A registry behind a link of a given delay and rate: ``python -m benchmarks.shaped ROOT PORT``.

It answers GET and HEAD with the files below ``ROOT``, of which ``v2/NAME/manifests/REFERENCE``, ``blobs`` and
``referrers`` have the media types that OCI wants. The first byte of each answer is sent a delay after
the request was read, and all connections take their bytes from one bucket that fills at the link's rate, by
turns. A file's bytes go from the page cache to the socket by sendfile(2), so the server is not what is
measured.

``GET /-/link/DELAY/RATE`` (seconds; bytes a second, 0: without limit) sets the link and answers with the
counts since the last time, as JSON; it is neither delayed nor counted.
"""

from __future__ import annotations

import heapq
import itertools
import json
import os
import re
import select
import socket
import sys
import time
from collections import Counter, deque
from pathlib import Path
from urllib.parse import unquote

import attrs

MEDIA_TYPES = {"blobs": "application/octet-stream", "referrers": "application/vnd.oci.image.index.v1+json"}
RANGE = re.compile(r"^bytes=(\d+)-(\d*)$")
MOST_AT_ONCE = 1 << 20
SLICE = 0.001
"""Seconds of the link's time that one connection may take before it is the next one's turn."""
BURST = 0.002
"""Seconds of the link's time that an idle link saves up."""


@attrs.define
class Bucket:
    """Bytes that the link could have carried by now. While answers wait, none of its time is lost."""

    rate: float = 0.0
    _tokens: float = 0.0
    _filled: float = attrs.field(factory=time.monotonic)

    def fill(self, now: float, busy: bool) -> None:
        self._tokens += self.rate * (now - self._filled)
        self._filled = now
        if not busy:
            self._tokens = min(self._tokens, self.rate * BURST)

    def allowed(self) -> int:
        """Bytes that one answer may send now."""
        if not self.rate:
            return MOST_AT_ONCE
        least = max(1500, int(self.rate * SLICE))
        return least if self._tokens > 0 else 0

    def take(self, count: int) -> None:
        self._tokens -= count

    def wait(self) -> float:
        """Seconds until something is allowed again."""
        return max(0.0, -self._tokens / self.rate) + SLICE if self.rate else 0.0


@attrs.define(eq=False)
class Answer:
    """What remains to be sent of one: ``head``, then a file from ``offset`` to ``end``."""

    head: bytes
    file: int = -1
    offset: int = 0
    end: int = 0
    free: bool = False
    """Of the link: it is about the link itself."""


@attrs.define(eq=False)
class Connection:
    """One request at a time."""

    socket: socket.socket
    received: bytes = b""
    answer: Answer | None = None


class Server:
    """All in one thread, so that one bucket is all there is."""

    def __init__(self, root: Path, port: int) -> None:
        self._root = root
        self._listening = socket.create_server(("127.0.0.1", port), backlog=256)
        self._listening.setblocking(False)
        self._connections: dict[int, Connection] = {}
        self._due: list[tuple[float, int, Connection]] = []
        self._order = itertools.count()
        self._ready: deque[Connection] = deque()
        self._blocked: set[int] = set()
        self._bucket = Bucket()
        self._delay = 0.0
        self._counts: Counter[str] = Counter()
        self._poll = select.epoll()
        self._poll.register(self._listening, select.EPOLLIN)

    def run(self) -> None:
        while True:
            # select(2) takes microseconds, epoll's own timeout milliseconds.
            if select.select([self._poll], [], [], self._timeout())[0]:
                for number, _ in self._poll.poll(0):
                    self._event(number)
            now = time.monotonic()
            while self._due and self._due[0][0] <= now:
                self._ready.append(heapq.heappop(self._due)[2])
            self._bucket.fill(now, bool(self._ready))
            self._send()

    def _timeout(self) -> float | None:
        now = time.monotonic()
        waits = [self._bucket.wait()] if self._ready else []
        waits += [max(0.0, self._due[0][0] - now)] if self._due else []
        return min(waits, default=None)

    def _event(self, number: int) -> None:
        if number == self._listening.fileno():
            accepted, _ = self._listening.accept()
            accepted.setblocking(False)
            accepted.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self._connections[accepted.fileno()] = Connection(accepted)
            self._poll.register(accepted, select.EPOLLIN)
            return
        connection = self._connections.get(number)
        if connection is None:
            return
        if number in self._blocked:
            self._blocked.discard(number)
            self._poll.modify(number, select.EPOLLIN)
            self._ready.append(connection)
            return
        try:
            data = connection.socket.recv(65536)
        except OSError:
            data = b""
        if not data:
            self._close(connection)
            return
        connection.received += data
        self._next(connection)

    def _next(self, connection: Connection) -> None:
        """Take the next request, if all of it is there and the last one is answered."""
        head, found, rest = connection.received.partition(b"\r\n\r\n")
        if not found or connection.answer is not None:
            return
        connection.received = rest
        connection.answer = answer = self._answer(head.decode("latin-1"))
        due = time.monotonic() + (0.0 if answer.free else self._delay)
        heapq.heappush(self._due, (due, next(self._order), connection))

    def _answer(self, head: str) -> Answer:
        request, _, lines = head.partition("\r\n")
        method, target, _ = request.split(" ", 2)
        headers = {
            name.lower(): value.strip()
            for name, _, value in (line.partition(":") for line in lines.split("\r\n"))
        }
        if target.startswith("/-/link/"):
            return self._set_link(*map(float, target.split("/")[3:5]))
        path = self._root / unquote(target).partition("?")[0].lstrip("/")
        kind = path.parent.name
        self._counts["requests"] += 1
        self._counts[f"{kind} requests"] += 1
        if ".." in path.parts or not path.is_file():
            return self._send_head(404, "application/json", 2, b"{}")
        media_type = MEDIA_TYPES.get(kind) or json.loads(path.read_bytes()).get(
            "mediaType", "application/json"
        )
        file = os.open(path, os.O_RDONLY)
        size = os.fstat(file).st_size
        first, end, extra = 0, size, ""
        if asked := RANGE.match(headers.get("range", "")):
            first, end = int(asked[1]), min(int(asked[2] or size - 1) + 1, size)
            if first >= size:
                os.close(file)
                return self._send_head(416, media_type, 0, extra=f"Content-Range: bytes */{size}\r\n")
            extra = f"Content-Range: bytes {first}-{end - 1}/{size}\r\n"
        answer = self._send_head(206 if extra else 200, media_type, end - first, extra=extra)
        if method == "HEAD":
            os.close(file)
            return answer
        answer.file, answer.offset, answer.end = file, first, end
        return answer

    def _send_head(
        self, status: int, media_type: str, length: int, body: bytes = b"", extra: str = ""
    ) -> Answer:
        head = f"HTTP/1.1 {status} .\r\nContent-Type: {media_type}\r\nContent-Length: {length}\r\n"
        return Answer(f"{head}Accept-Ranges: bytes\r\n{extra}\r\n".encode() + body)

    def _set_link(self, delay: float, rate: float) -> Answer:
        self._delay, self._bucket = delay, Bucket(rate)
        usage = os.times()
        counts = json.dumps({**self._counts, "processor": usage.user + usage.system}).encode()
        self._counts.clear()
        answer = self._send_head(200, "application/json", len(counts), counts)
        answer.free = True
        return answer

    def _send(self) -> None:
        """By turns, as long as the bucket allows it."""
        while self._ready and (allowed := self._bucket.allowed()):
            connection = self._ready.popleft()
            if connection.answer is None:
                continue
            try:
                done = self._send_some(connection, connection.answer, allowed)
            except BlockingIOError:
                number = connection.socket.fileno()
                self._blocked.add(number)
                self._poll.modify(number, select.EPOLLOUT)
            except OSError:
                self._close(connection)
            else:
                if done:
                    connection.answer = None
                    self._next(connection)
                else:
                    self._ready.append(connection)

    def _send_some(self, connection: Connection, answer: Answer, allowed: int) -> bool:
        """Is that all of it?"""
        if answer.head:
            more = socket.MSG_MORE if answer.offset < answer.end else 0
            sent = connection.socket.send(answer.head, more)
            answer.head = answer.head[sent:]
        else:
            count = min(allowed, answer.end - answer.offset)
            sent = os.sendfile(connection.socket.fileno(), answer.file, answer.offset, count)
            answer.offset += sent
            self._counts["bytes"] += sent
        if not answer.free:
            self._bucket.take(sent)
        if answer.head or answer.offset < answer.end:
            return False
        self._close_file(answer)
        return True

    def _close(self, connection: Connection) -> None:
        number = connection.socket.fileno()
        self._connections.pop(number, None)
        self._blocked.discard(number)
        if connection.answer is not None:
            self._close_file(connection.answer)
            connection.answer = None
        connection.socket.close()

    def _close_file(self, answer: Answer) -> None:
        if answer.file >= 0:
            os.close(answer.file)
            answer.file = -1


if __name__ == "__main__":
    try:
        Server(Path(sys.argv[1]), int(sys.argv[2])).run()
    except KeyboardInterrupt:
        sys.exit(0)
