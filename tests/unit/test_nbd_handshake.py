"""The handshake: what each option is answered, and what each kind of misbehaviour meets."""

from __future__ import annotations

import struct

from twisted.trial.unittest import SynchronousTestCase

from erofs_twisted.nbd.handshake import MAX_OPTION_LENGTH, MAX_OPTIONS, Agreed, Ended, Handshake
from erofs_twisted.nbd.wire import Info, Option, OptionReply, TransmissionFlag
from tests.exports import BytesExport
from tests.nbd_client import ask, client_flags, meta_context, option, option_answers, string, types

APP = BytesExport(bytes(8192), "app", "the application")
BASE = BytesExport(bytes(4096), "base", "what it stands on")
READ_ONLY_FLAGS = (
    TransmissionFlag.HAS_FLAGS
    | TransmissionFlag.READ_ONLY
    | TransmissionFlag.CAN_MULTI_CONN
    | TransmissionFlag.SEND_CACHE
)
ALL_INFOS = (Info.EXPORT, Info.NAME, Info.DESCRIPTION, Info.BLOCK_SIZE)


def begun(flags: int = 3, exports: tuple[BytesExport, ...] = (APP, BASE)) -> Handshake:
    handshake = Handshake(exports)
    assert handshake.receive(client_flags(flags)) == b""
    return handshake


class OptionTests(SynchronousTestCase):
    """One test for each option of the protocol."""

    def test_export_name_starts_transmission_and_an_unknown_one_ends_the_session(self) -> None:
        padded, short, unknown = begun(flags=1), begun(), begun()
        size_and_flags = struct.pack(">QH", 8192, READ_ONLY_FLAGS)
        self.assertEqual(size_and_flags + bytes(124), padded.receive(option(Option.EXPORT_NAME, b"app")))
        self.assertEqual(size_and_flags, short.receive(option(Option.EXPORT_NAME, b"app")))
        self.assertEqual(Agreed(APP, structured=False, allocation=False), short.outcome)
        self.assertEqual(b"", unknown.receive(option(Option.EXPORT_NAME, b"nope")))
        self.assertIsInstance(unknown.outcome, Ended)

    def test_abort_is_acknowledged_whatever_its_payload_and_ends_the_session(self) -> None:
        handshake = begun()
        answers = handshake.receive(option(Option.ABORT, b"?", length=1 << 31))
        self.assertEqual([OptionReply.ACK], types(answers))
        self.assertIsInstance(handshake.outcome, Ended)

    def test_list_names_every_export_and_takes_no_payload(self) -> None:
        handshake = begun()
        self.assertEqual(
            [
                (Option.LIST, OptionReply.SERVER, string("app") + b"the application"),
                (Option.LIST, OptionReply.SERVER, string("base") + b"what it stands on"),
                (Option.LIST, OptionReply.ACK, b""),
            ],
            option_answers(handshake.receive(option(Option.LIST))),
        )
        self.assertEqual([OptionReply.ERR_INVALID], types(handshake.receive(option(Option.LIST, b"?"))))

    def test_peek_export_is_unsupported(self) -> None:
        self.assertEqual([OptionReply.ERR_UNSUP], types(begun().receive(option(Option.PEEK_EXPORT, b"app"))))

    def test_starttls_is_unsupported(self) -> None:
        self.assertEqual([OptionReply.ERR_UNSUP], types(begun().receive(option(Option.STARTTLS))))

    def test_info_and_go_tell_what_is_asked_and_only_go_starts_transmission(self) -> None:
        for number in (Option.INFO, Option.GO):
            handshake = begun()
            self.assertEqual([OptionReply.ERR_UNKNOWN], types(handshake.receive(ask(number, "nope"))))
            told = option_answers(handshake.receive(ask(number, "", (*ALL_INFOS, 4711))))
            self.assertEqual(
                [
                    (number, OptionReply.INFO, struct.pack(">HQH", Info.EXPORT, 8192, READ_ONLY_FLAGS)),
                    (number, OptionReply.INFO, struct.pack(">H", Info.NAME) + b"app"),
                    (number, OptionReply.INFO, struct.pack(">H", Info.DESCRIPTION) + b"the application"),
                    (number, OptionReply.INFO, struct.pack(">HIII", Info.BLOCK_SIZE, 1, 4096, 32 << 20)),
                    (number, OptionReply.ACK, b""),
                ],
                told,
            )
            self.assertEqual(number is Option.GO, handshake.outcome is not None)

    def test_structured_reply_is_negotiated_once_and_takes_no_payload(self) -> None:
        handshake = begun()
        ordered = [b"?", b"", b""]
        answers = b"".join(handshake.receive(option(Option.STRUCTURED_REPLY, each)) for each in ordered)
        self.assertEqual([OptionReply.ERR_INVALID, OptionReply.ACK, OptionReply.ERR_INVALID], types(answers))
        handshake.receive(ask(Option.GO, "base"))
        self.assertEqual(Agreed(BASE, structured=True, allocation=False), handshake.outcome)

    def test_meta_contexts_need_structured_replies_and_offer_base_allocation(self) -> None:
        listed = struct.pack(">I", 0) + b"base:allocation"
        chosen = struct.pack(">I", 1) + b"base:allocation"
        handshake = begun()
        for number in (Option.LIST_META_CONTEXT, Option.SET_META_CONTEXT):
            self.assertEqual([OptionReply.ERR_INVALID], types(handshake.receive(meta_context(number, "app"))))
        handshake.receive(option(Option.STRUCTURED_REPLY))
        for queries, expected in [
            ((), [listed]),
            (("base:",), [listed]),
            (("base:allocation", "qemu:dirty"), [listed]),
            (("qemu:dirty",), []),
        ]:
            answers = option_answers(
                handshake.receive(meta_context(Option.LIST_META_CONTEXT, "app", queries))
            )
            self.assertEqual(expected, [payload for _, _, payload in answers[:-1]])
        for queries, expected in [((), []), (("qemu:dirty",), []), (("base:allocation",), [chosen])]:
            answers = option_answers(handshake.receive(meta_context(Option.SET_META_CONTEXT, "app", queries)))
            self.assertEqual(expected, [payload for _, _, payload in answers[:-1]])
        handshake.receive(ask(Option.GO, "app"))
        self.assertEqual(Agreed(APP, structured=True, allocation=True), handshake.outcome)

    def test_extended_headers_are_unsupported(self) -> None:
        self.assertEqual([OptionReply.ERR_UNSUP], types(begun().receive(option(Option.EXTENDED_HEADERS))))


class NegotiationTests(SynchronousTestCase):
    """One test for each rule that is about the session rather than one option."""

    def test_the_greeting_offers_fixed_newstyle_and_no_zeroes(self) -> None:
        self.assertEqual(b"NBDMAGICIHAVEOPT\0\x03", Handshake([APP]).greeting)

    def test_an_unknown_client_flag_ends_the_session(self) -> None:
        handshake = Handshake([APP])
        handshake.receive(client_flags(4))
        self.assertIsInstance(handshake.outcome, Ended)

    def test_a_client_without_fixed_newstyle_may_only_name_an_export(self) -> None:
        named, listing = begun(flags=0), begun(flags=0)
        self.assertEqual(134, len(named.receive(option(Option.EXPORT_NAME, b""))))
        self.assertEqual(b"", listing.receive(option(Option.LIST)))
        self.assertIsInstance(listing.outcome, Ended)

    def test_an_unknown_option_is_unsupported_and_its_payload_is_skipped(self) -> None:
        handshake = begun()
        payload = bytes(3 * MAX_OPTION_LENGTH)
        answers = handshake.receive(option(77, payload) + option(Option.LIST))
        self.assertEqual(OptionReply.ERR_UNSUP, types(answers)[0])
        self.assertEqual(OptionReply.ACK, types(answers)[-1])

    def test_an_option_longer_than_the_limit_is_too_big_and_its_payload_is_skipped_as_it_comes(self) -> None:
        handshake = begun()
        handshake.receive(option(Option.GO, length=1 << 20))
        for _ in range(16):
            self.assertEqual(b"", handshake.receive(bytes((1 << 16) - 1)))
            self.assertLessEqual(len(handshake.rest), 1 << 16)
        self.assertEqual([OptionReply.ERR_TOO_BIG], types(handshake.receive(bytes(16))))
        self.assertEqual(OptionReply.ACK, types(handshake.receive(option(Option.LIST)))[-1])

    def test_a_client_that_never_decides_is_sent_away(self) -> None:
        handshake = begun()
        for _ in range(MAX_OPTIONS - 1):
            handshake.receive(option(77))
        self.assertIsNone(handshake.outcome)
        handshake.receive(option(77))
        self.assertIsInstance(handshake.outcome, Ended)

    def test_errors_carry_a_text_for_people(self) -> None:
        for wrong in (option(77), ask(Option.INFO, "nope"), option(Option.LIST, b"?")):
            ((_, _, message),) = option_answers(begun().receive(wrong))
            self.assertRegex(message.decode(), r"^[a-z0-9].{10,}$")

    def test_a_server_that_shuts_down_refuses_all_but_abort(self) -> None:
        handshake = begun()
        handshake.shutting_down = True
        for refused in (option(Option.LIST), ask(Option.GO, "app"), option(77, bytes(100))):
            self.assertEqual([OptionReply.ERR_SHUTDOWN], types(handshake.receive(refused)))
        self.assertEqual([OptionReply.ACK], types(handshake.receive(option(Option.ABORT))))
        named = begun()
        named.shutting_down = True
        self.assertEqual(b"", named.receive(option(Option.EXPORT_NAME, b"app")))
        self.assertIsInstance(named.outcome, Ended)

    def test_a_wrong_option_magic_ends_the_session(self) -> None:
        handshake = begun()
        self.assertEqual(b"", handshake.receive(option(Option.LIST, magic=0x1234)))
        self.assertIsInstance(handshake.outcome, Ended)

    def test_lengths_that_do_not_fit_the_option_are_invalid(self) -> None:
        handshake = begun()
        handshake.receive(option(Option.STRUCTURED_REPLY))
        huge = struct.pack(">I", 0xFFFFFFFF)
        wrong = {
            "a name longer than the option": option(Option.GO, struct.pack(">I", 7) + b"app\0\0"),
            "a name of 4 GiB": option(Option.INFO, huge + b"\0\0"),
            "no count of infos": option(Option.GO, string("app")),
            "fewer infos than counted": option(Option.GO, string("app") + b"\0\2\0\0"),
            "more than the infos": option(Option.GO, string("app") + b"\0\0?"),
            "an empty option": option(Option.GO),
            "a query longer than the option": option(
                Option.SET_META_CONTEXT, string("app") + b"\0\0\0\1" + huge
            ),
            "fewer queries than counted": option(Option.SET_META_CONTEXT, string("app") + huge),
            "more than the queries": option(Option.LIST_META_CONTEXT, string("app") + bytes(5)),
            "a name with a NUL": ask(Option.GO, "a\0b"),
            "a name that is not UTF-8": ask(Option.GO, b"\xff\xfe"),
        }
        for what, sent in wrong.items():
            self.assertEqual([OptionReply.ERR_INVALID], types(handshake.receive(sent)), what)

    def test_a_name_longer_than_the_protocol_allows_is_too_big(self) -> None:
        self.assertEqual([OptionReply.ERR_TOO_BIG], types(begun().receive(ask(Option.GO, "x" * 4097))))
        named = begun()
        named.receive(option(Option.EXPORT_NAME, length=4097))
        self.assertIsInstance(named.outcome, Ended)

    def test_a_meta_context_is_good_only_for_the_export_it_was_set_for(self) -> None:
        handshake = begun()
        handshake.receive(option(Option.STRUCTURED_REPLY) + meta_context(Option.SET_META_CONTEXT, "app"))
        handshake.receive(ask(Option.GO, "base"))
        self.assertEqual(Agreed(BASE, structured=True, allocation=False), handshake.outcome)

    def test_setting_meta_contexts_forgets_the_former_ones_even_where_it_fails(self) -> None:
        handshake = begun()
        handshake.receive(option(Option.STRUCTURED_REPLY) + meta_context(Option.SET_META_CONTEXT, "app"))
        failed = handshake.receive(meta_context(Option.SET_META_CONTEXT, "nope"))
        self.assertEqual([OptionReply.ERR_UNKNOWN], types(failed))
        handshake.receive(ask(Option.GO, "app"))
        self.assertEqual(Agreed(APP, structured=True, allocation=False), handshake.outcome)

    def test_an_export_with_the_empty_name_is_found_before_the_first_one(self) -> None:
        nameless = BytesExport(bytes(4096), "")
        handshake = begun(exports=(APP, nameless))
        handshake.receive(ask(Option.GO, ""))
        assert isinstance(handshake.outcome, Agreed)
        self.assertIs(nameless, handshake.outcome.export)

    def test_a_server_without_exports_knows_no_default_one(self) -> None:
        handshake = begun(exports=())
        self.assertEqual([OptionReply.ERR_UNKNOWN], types(handshake.receive(ask(Option.GO, ""))))
        self.assertEqual([OptionReply.ACK], types(handshake.receive(option(Option.LIST))))

    def test_what_follows_go_is_left_for_the_transmission_phase(self) -> None:
        handshake = begun()
        handshake.receive(ask(Option.GO, "app") + b"requests")
        self.assertEqual(b"requests", handshake.rest)


class TransmissionFlagTests(SynchronousTestCase):
    """What exports are said to be."""

    def flags(self, *, structured: bool) -> TransmissionFlag:
        handshake = begun()
        if structured:
            handshake.receive(option(Option.STRUCTURED_REPLY))
        answers = option_answers(handshake.receive(ask(Option.INFO, "app")))
        return TransmissionFlag(struct.unpack(">HQH", answers[0][2])[2])

    def test_has_flags_is_always_set(self) -> None:
        self.assertIn(TransmissionFlag.HAS_FLAGS, self.flags(structured=False))

    def test_exports_are_read_only(self) -> None:
        self.assertIn(TransmissionFlag.READ_ONLY, self.flags(structured=False))

    def test_several_connections_are_welcome_since_exports_never_change(self) -> None:
        self.assertIn(TransmissionFlag.CAN_MULTI_CONN, self.flags(structured=False))

    def test_prefetching_is_offered(self) -> None:
        self.assertIn(TransmissionFlag.SEND_CACHE, self.flags(structured=False))

    def test_unfragmented_reads_are_offered_only_with_structured_replies(self) -> None:
        self.assertNotIn(TransmissionFlag.SEND_DF, self.flags(structured=False))
        self.assertIn(TransmissionFlag.SEND_DF, self.flags(structured=True))

    def test_nothing_that_writes_is_offered(self) -> None:
        allowed = READ_ONLY_FLAGS | TransmissionFlag.SEND_DF
        self.assertEqual(allowed, self.flags(structured=True))
