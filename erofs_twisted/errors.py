"""The roots of every error that this package raises on purpose.

Each package has a small tree of its own below these. An exception that is not one of them is a bug: it
reaches the log with its traceback.
"""


class ErofsTwistedError(Exception):
    """Something that an operator can understand and act on; ``str()`` of it is the whole message."""


class ReadError(ErofsTwistedError):
    """Bytes of an image cannot be had, after all that could be tried. The reader gets EIO."""


class RangesIgnored(ReadError):
    """The origin answers a range with the whole blob: ask it for that."""


class MountError(ErofsTwistedError):
    """An image cannot be mounted or unmounted as asked."""
