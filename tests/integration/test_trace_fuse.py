"""Traces of real mounts, by the fuse back end."""

from __future__ import annotations

from tests import tracing


class FuseTraceTests(tracing.TraceTests):
    attach = "fuse"
