"""Traces of real mounts, on nbd devices."""

from __future__ import annotations

from tests import tracing


class NBDTraceTests(tracing.TraceTests):
    attach = "nbd"
    is_warm = True
