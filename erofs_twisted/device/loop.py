"""A file as a block device, read-only, past the page cache of the file. Blocks: for a thread.

Source: ``include/uapi/linux/loop.h`` of Linux; LOOP_CONFIGURE is there since 5.8.
"""

from __future__ import annotations

import errno
import fcntl
import os
import struct

import attrs

from erofs_twisted.device.machine import load_module
from erofs_twisted.errors import MountError

LOOP_CTL_GET_FREE = 0x4C82
LOOP_CONFIGURE = 0x4C0A
LO_FLAGS_READ_ONLY = 1
LO_FLAGS_AUTOCLEAR = 4
LO_FLAGS_DIRECT_IO = 16
TRIES = 32

# loop_config: the file, the block size, loop_info64, eight reserved words. Of loop_info64, all but the flags
# and the file's name stays zero.
_config = struct.Struct("=II 5Q 3I I 64s 64s 32s 2Q 8Q")


@attrs.frozen
class LoopDevice:
    """``path`` is the file's as long as ``descriptor`` is open or the device is mounted."""

    path: str
    descriptor: int


def open_loop(file: str, block_size: int) -> LoopDevice:
    """Show ``file`` as an unused loop device. Raises `MountError`."""
    if not os.path.exists("/dev/loop-control"):
        load_module("loop")
    try:
        backing = os.open(file, os.O_RDONLY | os.O_CLOEXEC)
        try:
            return _configure(backing, block_size)
        finally:
            os.close(backing)
    except OSError as error:
        raise MountError(f"{file} cannot become a loop device: {error.strerror}") from error


def _configure(backing: int, block_size: int) -> LoopDevice:
    flags = LO_FLAGS_READ_ONLY | LO_FLAGS_AUTOCLEAR | LO_FLAGS_DIRECT_IO
    name = os.fsencode(os.readlink(f"/proc/self/fd/{backing}"))[:63]
    config = _config.pack(backing, block_size, *(0,) * 8, flags, name, b"", b"", *(0,) * 10)
    control = os.open("/dev/loop-control", os.O_RDWR | os.O_CLOEXEC)
    try:
        for _ in range(TRIES):
            path = f"/dev/loop{fcntl.ioctl(control, LOOP_CTL_GET_FREE)}"
            device = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            try:
                fcntl.ioctl(device, LOOP_CONFIGURE, config)
            except OSError as error:
                os.close(device)
                if error.errno != errno.EBUSY:
                    raise
                continue  # somebody else took it just now
            return LoopDevice(path, device)
    finally:
        os.close(control)
    raise OSError(errno.EBUSY, f"{TRIES} free loop devices were taken by others first")
