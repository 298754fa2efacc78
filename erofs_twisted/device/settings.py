"""What an operator may set of a device."""

from __future__ import annotations

import attrs


@attrs.frozen(kw_only=True)
class NBDSettings:
    """How the kernel treats a device.

    With the defaults a slow reply disturbs no other request, and the readers of a daemon that died wait for
    the next one. ``timeout``: seconds that a request may take, 0 for any time. ``io_timeout_ms``: how often
    the block layer looks for requests that were in flight on a dead connection. ``dead_conn_timeout``:
    seconds that the driver keeps requests while it has no connection. ``backend_identifier``: whoever brings
    a new connection must name it; None stands for the export's description."""

    io_timeout_ms: int = 1000
    timeout: int = 0
    dead_conn_timeout: int = 300
    backend_identifier: str | None = None
    read_ahead_kb: int = 1024
    max_sectors_kb: int = 1024
