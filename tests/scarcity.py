"""Calls that find no memory, of the kernel or of Python, in a process that is to live with that.

    python -m tests.scarcity FILE PROGRAM [ARGUMENT…]

runs one of this Python's programs, such as ``twistd``, whose calls find none when `without_memory` says so by
that file.
"""

from __future__ import annotations

import errno
import functools
import importlib
import json
import os
import runpy
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import attrs

CACHE_CALLS = (
    *(
        f"erofs_twisted.blocks.blobfile.os.{name}"
        for name in ("open", "pread", "preadv", "pwrite", "pwritev")
    ),
    *(f"erofs_twisted.blocks.blobfile.os.{name}" for name in ("posix_fallocate", "memfd_create", "utime")),
    "erofs_twisted.blocks.cachefiles.os.open",
    "erofs_twisted.blocks.cachefiles.os.statvfs",
)
"""Of the cache: all that it does to its files but for bringing them on disk."""
PAGE_CALLS = (
    "erofs_twisted.nbd.pages.os.preadv",
    "erofs_twisted.nbd.pages.os.pread",
    "erofs_twisted.nbd.residency.Residency._map",
)
"""By which cached bytes are read and mapped for who asks for them."""
SERVING_CALL = "erofs_twisted.nbd.serving.Serving._put_content"
"""Answers one request."""


@contextmanager
def without_memory(
    path: Path, *calls: str, error: str = "ENOMEM", times: int | None = None
) -> Iterator[None]:
    """For those calls, as long as this lasts: by ``ENOMEM``, of the kernel, or ``MemoryError``, of Python;
    ``times`` is how many of them it hits, None all."""
    told = path.with_suffix(".new")
    told.write_text(json.dumps({"calls": calls, "error": error, "times": times}))
    told.rename(path)
    try:
        yield
    finally:
        path.unlink()


@attrs.define
class Scarcity:
    """While there is a file ``path``, as `without_memory` makes it."""

    path: str
    _hit: int = 0

    def install(self) -> None:
        for name in (*CACHE_CALLS, *PAGE_CALLS, SERVING_CALL):
            module, is_of_os, function = name.partition(".os.")
            if is_of_os:
                # Of that module alone.
                owner, attribute = importlib.import_module(module), function
                if not isinstance(owner.os, SimpleNamespace):
                    owner.os = SimpleNamespace(**vars(os))
                owner = owner.os
            else:
                owner, attribute = find_attribute(name)
            setattr(owner, attribute, self._scarce(name, getattr(owner, attribute)))

    def _scarce(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(call)
        def scarce(*arguments: Any, **keywords: Any) -> Any:
            try:
                told = json.loads(Path(self.path).read_text())
            except OSError:  # it is not there, or cannot be opened now
                return call(*arguments, **keywords)
            if name not in told["calls"] or (told["times"] is not None and self._hit >= told["times"]):
                return call(*arguments, **keywords)
            self._hit += 1
            if told["error"] == "MemoryError":
                raise MemoryError
            raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))

        return scarce


def find_attribute(name: str) -> tuple[Any, str]:
    """The module or class that a dotted name is an attribute of, and the attribute's name."""
    words = name.split(".")
    for length in range(len(words) - 1, 0, -1):
        try:
            owner: Any = importlib.import_module(".".join(words[:length]))
        except ModuleNotFoundError:
            continue
        for word in words[length:-1]:
            owner = getattr(owner, word)
        return owner, words[-1]
    raise AssertionError(f"{name}: there is no such module")


def main(path: str, program: str, *arguments: str) -> None:
    Scarcity(path).install()
    sys.argv = [program, *arguments]
    runpy.run_path(program, run_name="__main__")


if __name__ == "__main__":
    main(*sys.argv[1:])
