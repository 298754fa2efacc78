"""The whole daemon, on nbd devices."""

from __future__ import annotations

from tests import mounting


class NBDMountTests(mounting.MountTests):
    attach = "nbd"
