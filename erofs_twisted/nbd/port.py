"""A listening UNIX socket whose connections send spans of files."""

from __future__ import annotations

from erofs_twisted.nbd.transport import SpanTransport
from erofs_twisted.ownerport import OwnerPort


class SpanPort(OwnerPort):
    """As an `OwnerPort`, with a `SpanTransport` for each client."""

    transport = SpanTransport  # type: ignore[assignment]
