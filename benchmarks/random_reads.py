"""Reads of random places and sizes by libnbd: ``/usr/bin/python3 random_reads.py URI SEED COUNT``.

4 KiB to 128 KiB each, 16 in flight, in the same order for the same seed. Prints the seconds they took, and
how many bytes they were.
"""

import random
import sys
import time

import nbd  # type: ignore[import-not-found]  # Debian's, not of this environment

IN_FLIGHT = 16
BLOCK = 4096


def main(uri: str, seed: int, count: int) -> None:
    client = nbd.NBD()
    client.connect_uri(uri)
    size = client.get_size()
    choice = random.Random(seed)
    began = time.perf_counter()
    total = 0
    for _ in range(count):
        length = choice.randint(1, 32) * BLOCK
        offset = choice.randrange((size - length) // BLOCK) * BLOCK
        while client.aio_in_flight() >= IN_FLIGHT:
            client.poll(-1)
            finish(client)
        client.aio_pread(nbd.Buffer(length), offset)
        total += length
    while client.aio_in_flight():
        client.poll(-1)
        finish(client)
    print(time.perf_counter() - began, total)


def finish(client: "nbd.NBD") -> None:
    """Take away what is done; raises nbd.Error where a read failed."""
    while client.aio_in_flight() and (cookie := client.aio_peek_command_completed()) > 0:
        client.aio_command_completed(cookie)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
