"""What mount(2) is told beside source, target and type."""

from __future__ import annotations

import attrs

MS_RDONLY = 1
MS_NOSUID = 2
MS_NODEV = 4
MS_NOEXEC = 8
MS_NOATIME = 1 << 10
MS_NODIRATIME = 1 << 11
MS_RELATIME = 1 << 21
MS_STRICTATIME = 1 << 24

ALWAYS = MS_RDONLY | MS_NOSUID | MS_NODEV
"""An image comes from elsewhere: its device nodes and set-user-ID bits mean nothing here."""

FLAGS = {
    "defaults": 0,
    "ro": MS_RDONLY,
    "nosuid": MS_NOSUID,
    "nodev": MS_NODEV,
    "noexec": MS_NOEXEC,
    "noatime": MS_NOATIME,
    "nodiratime": MS_NODIRATIME,
    "relatime": MS_RELATIME,
    "strictatime": MS_STRICTATIME,
}
REFUSED = {
    "rw": "an image is read-only",
    "suid": "an image is always mounted nosuid",
    "dev": "an image is always mounted nodev",
    "remount": "this makes a new mount",
    "bind": "this makes a new mount",
    "rbind": "this makes a new mount",
    "move": "this makes a new mount",
    "loop": "the image has a device already",
}
PAGE = 4096


def _with_always(flags: int) -> int:
    return flags | ALWAYS


@attrs.frozen
class MountOptions:
    """``flags``: the MS_* bits, read-only, nosuid and nodev always among them. ``data``: options of the file
    system's own, comma-separated."""

    flags: int = attrs.field(default=ALWAYS, converter=_with_always)
    data: str = ""

    @classmethod
    def parse(cls, text: str) -> MountOptions:
        """From a list such as mount(8) takes after -o. What is no flag of mount(2) goes to the file system as
        it is. Raises ValueError."""
        flags = 0
        data: list[str] = []
        for word in text.split(","):
            name = word.strip()
            if not name:
                raise ValueError(f"{text!r} has an empty option in it")
            if name in REFUSED:
                raise ValueError(f"{name!r} cannot be had: {REFUSED[name]}")
            if "\0" in name:
                raise ValueError(f"{name!r} has a null character in it")
            if name in FLAGS:
                flags |= FLAGS[name]
            else:
                data.append(name)
        joined = ",".join(data)
        if len(joined.encode("utf-8", "surrogateescape")) >= PAGE:
            raise ValueError(f"mount(2) takes less than {PAGE} bytes of options")
        return cls(flags, joined)
