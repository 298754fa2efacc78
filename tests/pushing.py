"""Pushes a file to a registry, and says by how much the process grew meanwhile.

    python -m tests.pushing HOST/REPOSITORY FILE DIGEST

A JSON object comes on standard output, with sizes in bytes.
"""

from __future__ import annotations

import json
import os
import resource
import sys
from typing import Any

from twisted.internet.defer import Deferred
from twisted.internet.task import react

from erofs_twisted.pool import SystemCallPool
from erofs_twisted.registry.content import FileContent
from erofs_twisted.registry.digest import Digest
from erofs_twisted.registry.reference import parse_reference
from erofs_twisted.registry.store import open_store


def peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


async def push(reactor: Any, name: str, path: str, digest: str, size: int) -> None:
    pool = SystemCallPool(reactor)
    store: Any = open_store(reactor, parse_reference(name), pool=pool)
    repository = await store.repository()
    await repository.push_blob(b"this loads what pushing takes")
    before = peak()
    await repository.push_blob(FileContent(path, Digest.parse(digest), size, pool))
    print(json.dumps({"size": size, "growth": peak() - before}))
    repository.close()
    await store.close()
    await pool.stop()


def main(reactor: Any, *arguments: str) -> Deferred[None]:
    name, path, digest = arguments
    return Deferred.fromCoroutine(push(reactor, name, path, digest, os.path.getsize(path)))


if __name__ == "__main__":
    react(main, sys.argv[1:])
