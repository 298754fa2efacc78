"""An HTTP server on loopback in threads of this process: so it also answers while a test blocks."""

from __future__ import annotations

import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import ClassVar, Self

import attrs


@attrs.define(eq=False)
class ThreadServer:
    """Runs within a ``with`` block. A server of a kind says in `answer` what it does."""

    protocol: ClassVar[str] = "HTTP/1.1"
    _server: ThreadingHTTPServer = attrs.field(init=False)
    _thread: threading.Thread = attrs.field(init=False)

    @property
    def authority(self) -> str:
        return f"127.0.0.1:{self._server.server_address[1]}"

    @property
    def url(self) -> str:
        return f"http://{self.authority}"

    def answer(self, request: BaseHTTPRequestHandler) -> None:
        """Answer one request, of whatever method; in a thread of its own."""
        raise NotImplementedError

    def __enter__(self) -> Self:
        owner = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = owner.protocol

            def handle_any(self) -> None:
                owner.answer(self)

            do_GET = do_POST = do_PUT = handle_any

            def log_message(self, format: str, *args: object) -> None:
                """Say nothing."""

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()
