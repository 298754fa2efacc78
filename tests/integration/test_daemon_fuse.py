"""The whole daemon, by the fuse back end: on any kernel that mounts EROFS from a file or a loop device."""

from __future__ import annotations

from tests import mounting


class FuseMountTests(mounting.MountTests):
    attach = "fuse"
