"""Serves files over NBD, as a process: ``python -m tests.nbd_serve SOCKET [NAME=]FILE…`` until SIGTERM.

Where a file has holes, so has its export.
"""

from __future__ import annotations

import os
import sys

from twisted.internet import reactor
from twisted.internet.defer import Deferred
from twisted.logger import globalLogBeginner, textFileLogObserver

from erofs_twisted.nbd.server import NBDServer
from tests.exports import FileExport


def holes(path: str) -> list[tuple[int, int]]:
    """The (offset, length) of each hole in a file, as the file system has it."""
    found = []
    with open(path, "rb", buffering=0) as file:
        end = os.fstat(file.fileno()).st_size
        at = 0
        while at < end:
            start = os.lseek(file.fileno(), at, os.SEEK_HOLE)
            if start == end:
                break
            try:
                at = os.lseek(file.fileno(), start, os.SEEK_DATA)
            except OSError:  # no more data: a hole to the end
                at = end
            found.append((start, at - start))
    return found


async def serve(server: NBDServer, path: str, files: list[str]) -> None:
    exports = []
    for each in files:
        name, _, file = each.rpartition("=")
        exports.append(FileExport(file, name, holes(file)))
    await server.listen(path, exports)


def main(path: str, *files: str) -> None:
    globalLogBeginner.beginLoggingTo([textFileLogObserver(sys.stderr)])
    server = NBDServer(reactor)
    reactor.addSystemEventTrigger("before", "shutdown", lambda: Deferred.fromCoroutine(server.stop()))
    started = Deferred.fromCoroutine(serve(server, path, list(files)))
    started.addErrback(lambda failure: (print(failure.getErrorMessage(), file=sys.stderr), reactor.stop()))
    reactor.run()


if __name__ == "__main__":
    main(*sys.argv[1:])
