"""The transmission phase: one test for each kind of request, and for each kind of error."""

from __future__ import annotations

import errno

from twisted.logger import capturedLogs
from twisted.trial.unittest import SynchronousTestCase

from erofs_twisted.errors import ReadError
from erofs_twisted.nbd.errors import WireError, wire_error, wire_message
from erofs_twisted.nbd.wire import Command, CommandFlag, text
from tests.exports import BytesExport, SlowExport
from tests.nbd_client import Client, Reply, read, request

SIZE = 64 << 20
SMALL = bytes(range(256)) * 32


class _Vast(BytesExport):
    """As large as `SIZE`, without the bytes."""

    def __init__(self) -> None:
        super().__init__(b"")
        self.size = SIZE

    def read(self, offset: int, length: int) -> list[bytes]:  # type: ignore[override]
        return [bytes(length)]


class RequestTests(SynchronousTestCase):
    """One test for each row of the table of requests and answers."""

    def setUp(self) -> None:
        self.export = BytesExport(SMALL)
        self.simple = Client.kernel(self.export)
        self.structured = Client.structured(self.export)

    def errors(self, *requests: bytes, client: Client | None = None) -> list[int]:
        return [reply.error for reply in (client or self.structured).exchange(*requests)]

    def test_a_read_is_answered_in_the_form_that_was_negotiated(self) -> None:
        wanted = read(10, 300, cookie=(1 << 64) - 1)
        content = SMALL[10:310]
        self.assertEqual([Reply((1 << 64) - 1, content=content)], self.simple.exchange(wanted))
        self.assertEqual(
            [Reply((1 << 64) - 1, content=content, offset=10, structured=True)],
            self.structured.exchange(wanted),
        )

    def test_a_read_past_the_end_is_invalid(self) -> None:
        beyond = [read(len(SMALL) - 1, 2), read(len(SMALL), 1), read((1 << 64) - 1, (1 << 32) - 1)]
        self.assertEqual([WireError.EINVAL] * 3, self.errors(*beyond))
        self.assertEqual([0], self.errors(read(len(SMALL) - 1, 1)))

    def test_a_read_of_nothing_succeeds(self) -> None:
        self.assertEqual([Reply(1)], self.simple.exchange(read(0, 0)))
        self.assertEqual([Reply(1, structured=True)], self.structured.exchange(read(0, 0)))

    def test_a_read_longer_than_advertised_is_invalid_or_an_overflow(self) -> None:
        simple, structured = Client.kernel(_Vast()), Client.structured(_Vast())
        self.assertEqual([WireError.EINVAL], self.errors(read(0, (32 << 20) + 1), client=simple))
        self.assertEqual([WireError.EOVERFLOW], self.errors(read(0, (32 << 20) + 1), client=structured))
        self.assertEqual([0], self.errors(read(0, 32 << 20), client=structured))

    def test_a_read_with_df_has_one_chunk_of_content(self) -> None:
        replies = Client.structured(_Vast()).exchange(read(0, 1 << 20, flags=CommandFlag.DF))
        self.assertEqual([1 << 20], [len(reply.content) for reply in replies])

    def test_a_read_that_fails_is_eio_and_the_log_says_why(self) -> None:
        reason = "registry.example answered 503 four times"
        for make, message in ((Client.kernel, ""), (Client.structured, reason)):
            export = SlowExport(SMALL)
            client = make(export)
            client.send(read(4096, 512))
            self.assertEqual(b"", client.received())
            with capturedLogs() as events:
                export.reads[0].fail(ReadError(reason))
            logged = [
                (e["export"], e["offset"], e["length"], e["reason"], "log_failure" in e) for e in events
            ]
            self.assertEqual([("slow", 4096, 512, reason, False)], logged)
            (reply,) = client.replies(read(4096, 512))
            self.assertEqual((WireError.EIO, b"", message), (reply.error, reply.content, reply.message))
            self.assertEqual([0], self.errors(request(Command.CACHE), client=client))

    def test_a_read_for_which_there_is_no_memory_fails_and_the_others_go_on(self) -> None:
        for make, message in ((Client.kernel, ""), (Client.structured, "out of memory")):
            export = SlowExport(SMALL)
            client = make(export)
            client.send(read(4096, 512, cookie=1), read(0, 512, cookie=2))
            with capturedLogs() as events:
                export.reads[0].fail(MemoryError())
            self.assertEqual([("out of memory", False)], [(e["reason"], "log_failure" in e) for e in events])
            (reply,) = client.replies(read(4096, 512, cookie=1))
            self.assertEqual((1, WireError.ENOMEM, message), (reply.cookie, reply.error, reply.message))
            export.reads[1].finish()
            (reply,) = client.replies(read(0, 512, cookie=2))
            self.assertEqual((2, 0, SMALL[:512]), (reply.cookie, reply.error, reply.content))

    def test_a_write_is_not_permitted_and_its_payload_is_skipped_as_it_comes(self) -> None:
        self.simple.send(request(Command.WRITE, 0, 8192))
        for _ in range(8):
            self.assertEqual([], self.simple.exchange(bytes(1000)))
        self.assertEqual(
            [Reply(1, WireError.EPERM), Reply(2, content=SMALL[:4])],
            [
                *self.simple.exchange(bytes(192)),
                *self.simple.exchange(read(0, 4, cookie=2)),
            ],
        )

    def test_trim_and_write_zeroes_are_not_permitted_and_writes_past_the_end_have_no_space(self) -> None:
        within = [request(command, 0, 512) for command in (Command.TRIM, Command.WRITE_ZEROES)]
        beyond = [request(command, 8192, 512) for command in (Command.TRIM, Command.WRITE_ZEROES)]
        self.assertEqual([WireError.EPERM] * 2, self.errors(*within))
        self.assertEqual([WireError.EINVAL, WireError.ENOSPC], self.errors(*beyond))
        self.simple.send(request(Command.WRITE, 8192, 512), bytes(512))
        self.assertEqual([Reply(1, WireError.ENOSPC)], self.simple.replies())

    def test_flush_succeeds_and_has_no_range(self) -> None:
        sent = [request(Command.FLUSH), request(Command.FLUSH, 1, 0), request(Command.FLUSH, 0, 1)]
        self.assertEqual([0, WireError.EINVAL, WireError.EINVAL], self.errors(*sent))

    def test_cache_prefetches(self) -> None:
        sent = [request(Command.CACHE, 512, 1024), request(Command.CACHE, 8192, 1)]
        self.assertEqual([0, WireError.EINVAL], self.errors(*sent))
        self.assertEqual([0, WireError.EINVAL], self.errors(*sent, client=self.simple))
        self.assertEqual([(512, 1024)] * 2, self.export.prefetched)
        self.assertEqual([WireError.EINVAL], self.errors(request(Command.CACHE, 0, 512, flags=1 << 9)))

    def test_block_status_tells_holes_where_the_context_was_negotiated(self) -> None:
        whole = request(Command.BLOCK_STATUS, 1024, 4096)
        one = request(Command.BLOCK_STATUS, 1024, 4096, flags=CommandFlag.REQ_ONE)
        replies = self.structured.exchange(whole, one)
        self.assertEqual(
            [((1024, 0), (2048, 3), (1024, 0)), ((1024, 0),)], [each.extents for each in replies]
        )
        self.assertEqual([WireError.EINVAL], self.errors(whole, client=self.simple))
        self.assertEqual([WireError.EINVAL] * 2, self.errors(request(7, 8192, 1), request(7, 0, 0)))

    def test_disc_finishes_what_is_outstanding_and_closes(self) -> None:
        export = SlowExport(SMALL)
        client = Client.kernel(export)
        client.send(read(0, 16), request(Command.DISC), read(0, 16))
        self.assertFalse(client.is_closed)
        export.reads[0].finish()
        self.assertEqual([Reply(1, content=SMALL[:16])], client.replies(read(0, 16)))
        self.assertTrue(client.is_closed)
        self.assertEqual(1, len(export.reads))

    def test_resize_and_unknown_commands_are_invalid(self) -> None:
        sent = [request(Command.RESIZE, 0, 4096), request(9), request(0xFFFF, 1, 1)]
        self.assertEqual([WireError.EINVAL] * 3, self.errors(*sent))

    def test_a_flag_that_is_unknown_or_not_for_that_command_is_invalid(self) -> None:
        sent = [
            read(0, 1, flags=CommandFlag.FUA),
            read(0, 1, flags=CommandFlag.REQ_ONE),
            read(0, 1, flags=1 << 15),
            request(Command.TRIM, 0, 1, flags=CommandFlag.FUA),
            request(Command.FLUSH, flags=CommandFlag.FUA),
        ]
        self.assertEqual([WireError.EINVAL] * 5, self.errors(*sent))
        df = read(0, 1, flags=CommandFlag.DF)
        self.assertEqual([WireError.EINVAL], self.errors(df, client=self.simple))
        self.structured.send(request(Command.WRITE, 0, 3, flags=1 << 9), b"abc", read(0, 1))
        self.assertEqual([WireError.EINVAL, 0], [reply.error for reply in self.structured.replies()])

    def test_a_wrong_magic_cuts_the_client_off_at_once(self) -> None:
        export = SlowExport(SMALL)
        client = Client.kernel(export)
        client.send(read(0, 16), request(0, magic=0x25609514), read(0, 16))
        self.assertTrue(client.is_cut_off)
        self.assertEqual((b"", 1, 1), (client.received(), len(export.reads), export.cancelled))

    def test_a_server_that_shuts_down_refuses_new_requests_answers_the_others_and_closes(self) -> None:
        export = SlowExport(SMALL)
        client = Client.kernel(export)
        client.send(read(0, 16))
        client.protocol.shut_down()
        late = [read(0, 16, cookie=2), request(Command.FLUSH, cookie=3)]
        self.assertEqual([WireError.ESHUTDOWN] * 2, self.errors(*late, client=client))
        self.assertFalse(client.is_closed)
        export.reads[0].finish()
        self.assertEqual([Reply(1, content=SMALL[:16])], client.replies(read(0, 16)))
        self.assertTrue(client.is_closed)

    def test_replies_may_overtake_each_other(self) -> None:
        export = SlowExport(SMALL)
        client = Client.kernel(export)
        sent = [read(each * 16, 16, cookie=each) for each in range(3)]
        client.send(*sent)
        for each in (2, 0, 1):
            export.reads[each].finish()
        self.assertEqual([2, 0, 1], [reply.cookie for reply in client.replies(*sent)])


class ErrorTests(SynchronousTestCase):
    """What clients and the log are told when something fails on this side."""

    def test_only_errors_that_the_wire_has_go_over_it(self) -> None:
        for number, expected in [
            (errno.EIO, WireError.EIO),
            (errno.ENOMEM, WireError.ENOMEM),
            (errno.ESHUTDOWN, WireError.ESHUTDOWN),
            (errno.ETIMEDOUT, WireError.EIO),
            (errno.EINVAL, WireError.EIO),
            (errno.EPERM, WireError.EIO),
        ]:
            self.assertEqual(expected, wire_error(OSError(number, "no")))
        self.assertEqual(WireError.EIO, wire_error(ReadError("no")))
        self.assertEqual(WireError.EIO, wire_error(OSError("no number")))

    def test_a_client_is_told_of_a_bug_only_that_there_is_one(self) -> None:
        self.assertEqual("internal error (KeyError)", wire_message(KeyError("secret")))

    def test_an_unexpected_exception_is_eio_and_logged_with_its_traceback(self) -> None:
        export = SlowExport(SMALL)
        client = Client.structured(export)
        client.send(read(0, 16))
        export.reads[0].fail(ZeroDivisionError())
        self.assertEqual([WireError.EIO], [reply.error for reply in client.replies()])
        self.assertEqual(1, len(self.flushLoggedErrors(ZeroDivisionError)))

    def test_an_export_that_raises_at_once_is_answered_like_one_that_fails_later(self) -> None:
        client = Client.structured(_Broken(SMALL))
        sent = [read(0, 16), request(Command.CACHE, 0, 16), request(Command.BLOCK_STATUS, 0, 16)]
        replies = client.exchange(*sent)
        self.assertEqual([(WireError.EIO, "out of order")] * 3, [(r.error, r.message) for r in replies])

    def test_an_export_that_gives_too_little_or_too_much_is_eio_instead_of_lost_framing(self) -> None:
        for wrong in (15, 17):
            client = Client.kernel(_Miscounting(SMALL, wrong))
            self.assertEqual([Reply(1, WireError.EIO)], client.exchange(read(0, 16)))
            self.assertEqual(1, len(self.flushLoggedErrors(ValueError)))

    def test_a_message_longer_than_the_protocol_allows_is_cut_between_characters(self) -> None:
        self.assertEqual(b"a" + "é".encode() * 2047, text("a" + "é" * 3000))
        self.assertEqual(b"a b", text("a\0b"))


class _Broken(BytesExport):
    def read(self, offset: int, length: int) -> list[bytes]:  # type: ignore[override]
        raise ReadError("out of order")

    def prefetch(self, offset: int, length: int) -> None:  # type: ignore[override]
        raise ReadError("out of order")

    def extents(self, offset: int, length: int) -> list[tuple[int, bool]]:
        raise ReadError("out of order")


class _Miscounting(BytesExport):
    def __init__(self, content: bytes, length: int) -> None:
        super().__init__(content)
        self._length = length

    def read(self, offset: int, length: int) -> list[bytes]:  # type: ignore[override]
        return [bytes(self._length)]
