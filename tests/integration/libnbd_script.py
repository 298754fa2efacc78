"""What libnbd makes of a server, as JSON: run by the system's Python with a server's URI.

Each experiment has a connection of its own, on which libnbd checks nothing before it sends (strict mode 0).
A result is what the server gave, or the name of the error.
"""

import hashlib
import json
import sys

import nbd

MIB = 1 << 20
EXPERIMENTS = {}


def experiment(function):
    EXPERIMENTS[function.__name__] = function
    return function


def attempt(function, *arguments, **named):
    try:
        result = function(*arguments, **named)
    except nbd.Error as error:
        return error.errno or "error"
    return digest(result) if isinstance(result, (bytes, bytearray)) else result


def digest(data):
    return hashlib.sha256(data).hexdigest()


def connected(**settings):
    handle = nbd.NBD()
    handle.set_strict_mode(0)
    for name, value in settings.items():
        if name == "context":
            handle.add_meta_context(value)
        else:
            getattr(handle, "set_" + name)(value)
    handle.connect_uri(URI)
    return handle


@experiment
def write_then_read():
    handle = connected()
    return [attempt(handle.pwrite, b"x" * 512, 0), attempt(handle.pread, 512, 0)]


@experiment
def a_long_write_then_read():
    handle = connected()
    return [attempt(handle.pwrite, bytes(8 * MIB), 0), attempt(handle.pread, 512, 0)]


@experiment
def read_past_the_end():
    handle = connected()
    size = handle.get_size()
    return [
        attempt(handle.pread, 512, size),
        attempt(handle.pread, 512, size - 511),
        attempt(handle.pread, 1, size - 1),
    ]


@experiment
def read_of_32_mib():
    return attempt(connected().pread, 32 * MIB, 0)


@experiment
def cache():
    handle = connected()
    return [attempt(handle.cache, 4096, 0), attempt(handle.cache, 4096, handle.get_size())]


@experiment
def simple_replies():
    handle = connected(request_structured_replies=False)
    return [
        handle.get_structured_replies_negotiated(),
        attempt(handle.pread, 1234567, 89),
        attempt(handle.pread, 512, handle.get_size()),
        attempt(handle.pread, 512, 0),
    ]


@experiment
def export_name():
    handle = connected(handshake_flags=0)
    return [handle.get_protocol(), handle.get_size(), attempt(handle.pread, 4096, 4096)]


@experiment
def export_name_without_zeroes():
    handle = connected(handshake_flags=nbd.HANDSHAKE_FLAG_NO_ZEROES)
    return [handle.get_protocol(), handle.get_size(), attempt(handle.pread, 4096, 4096)]


@experiment
def unaligned_reads():
    handle = connected()
    return [attempt(handle.pread, length, offset) for offset, length in [(1, 1), (4095, 2), (511, 65537)]]


@experiment
def block_status():
    handle = connected(context=nbd.CONTEXT_BASE_ALLOCATION)
    found = []

    def extent(context, offset, entries, error):
        found.append([context, offset, list(entries)])

    handle.block_status(handle.get_size(), 0, extent)
    handle.block_status(8 * MIB, 12345, extent, nbd.CMD_FLAG_REQ_ONE)
    return [handle.can_meta_context(nbd.CONTEXT_BASE_ALLOCATION), found[-1]]


@experiment
def block_status_without_context():
    return attempt(connected().block_status, 4096, 0, lambda *_: 0)


@experiment
def structured_read_without_fragments():
    chunks = []

    def chunk(data, offset, status, error):
        chunks.append([len(data), digest(data), offset, status])

    handle = connected()
    handle.pread_structured(65536, 4096, chunk, nbd.CMD_FLAG_DF)
    return [handle.can_df(), chunks]


@experiment
def aborted():
    handle = nbd.NBD()
    handle.set_opt_mode(True)
    handle.connect_uri(URI)
    handle.opt_abort()
    return handle.aio_is_closed()


@experiment
def many_in_flight():
    handle = connected()
    buffers = [nbd.Buffer(65536) for _ in range(300)]
    for number, buffer in enumerate(buffers):
        handle.aio_pread(buffer, number * 65536 % (8 * MIB))
    while handle.aio_in_flight():
        handle.poll(-1)
    return digest(b"".join(bytes(buffer.to_bytearray()) for buffer in buffers))


# Those on which servers may differ.


@experiment
def trim_and_zero():
    handle = connected()
    return [attempt(handle.trim, 4096, 0), attempt(handle.zero, 4096, 0), attempt(handle.pread, 512, 0)]


@experiment
def read_of_64_mib():
    handle = connected()
    return [attempt(handle.pread, 64 * MIB, 0), attempt(handle.pread, 512, 0)]


@experiment
def flush():
    return attempt(connected().flush)


@experiment
def negotiation():
    handle = nbd.NBD()
    handle.set_opt_mode(True)
    handle.set_full_info(True)
    handle.add_meta_context(nbd.CONTEXT_BASE_ALLOCATION)
    handle.connect_uri(URI)
    names, contexts = [], []
    handle.opt_list(lambda name, description: names.append([name, description]))
    handle.opt_list_meta_context(contexts.append)
    handle.opt_info()
    told = [handle.get_size(), handle.is_read_only(), handle.get_canonical_export_name()]
    told += [attempt(handle.get_export_description), handle.get_block_size(nbd.SIZE_MAXIMUM)]
    handle.set_export_name("nope")
    unknown = attempt(handle.opt_info)
    handle.set_export_name("")
    handle.opt_go()
    return {
        "names": names,
        "contexts": contexts,
        "told": told,
        "unknown": unknown,
        "agreed": [handle.can_meta_context(nbd.CONTEXT_BASE_ALLOCATION), attempt(handle.pread, 512, 0)],
    }


URI = sys.argv[1]
json.dump({name: function() for name, function in EXPERIMENTS.items()}, sys.stdout, indent=1)
