"""Ours and nbdkit's file plugin serve one file to the same clients: what those say must agree."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from pathlib import Path
from typing import Any

from twisted.trial.unittest import SynchronousTestCase

from tests.nbd_tools import Nbdkit, Ours, libnbd, output

MIB = 1 << 20
SCRIPT = Path(__file__).with_name("libnbd_script.py")
OURS_ALONE = {"read_of_64_mib", "negotiation"}
"""Experiments in which nbdkit does otherwise, and may: it takes 64 MiB, and any export's name."""


class OracleTests(SynchronousTestCase):
    def setUp(self) -> None:
        directory = tempfile.TemporaryDirectory()
        self.addCleanup(directory.cleanup)
        self.image = Path(directory.name, "image")
        with self.image.open("wb") as file:
            for megabytes, at in ((1, 0), (5, 3), (30, 40), (1, 95)):
                file.seek(at * MIB)
                file.write(os.urandom(megabytes * MIB))
        self.ours, self.nbdkit = Ours(str(self.image)), Nbdkit(str(self.image))
        for server in (self.ours, self.nbdkit):
            server.__enter__()
            self.addCleanup(server.__exit__, None, None, None)

    def results(self) -> tuple[dict[str, Any], dict[str, Any]]:
        ours, theirs = (json.loads(libnbd(SCRIPT, server.uri())) for server in (self.ours, self.nbdkit))
        return ours, theirs

    def digest(self, offset: int, length: int) -> str:
        with self.image.open("rb") as file:
            file.seek(offset)
            return hashlib.sha256(file.read(length)).hexdigest()

    def test_libnbd_finds_no_difference(self) -> None:
        ours, theirs = self.results()
        for results in (ours, theirs):
            for name in OURS_ALONE:
                del results[name]
        self.assertEqual(theirs, ours)

    def test_what_libnbd_gets_from_us_is_right(self) -> None:
        ours, _ = self.results()
        start = self.digest(0, 512)
        self.assertEqual(["EPERM", start], ours["write_then_read"])
        self.assertEqual(["EPERM", start], ours["a_long_write_then_read"])
        self.assertEqual(["EPERM", "EPERM", start], ours["trim_and_zero"])
        self.assertEqual(["EINVAL", "EINVAL", self.digest(96 * MIB - 1, 1)], ours["read_past_the_end"])
        self.assertEqual(self.digest(0, 32 * MIB), ours["read_of_32_mib"])
        self.assertEqual(["EOVERFLOW", start], ours["read_of_64_mib"])
        self.assertEqual([False, self.digest(89, 1234567), "EINVAL", start], ours["simple_replies"])
        self.assertEqual(["newstyle", 96 * MIB, self.digest(4096, 4096)], ours["export_name"])
        self.assertEqual(
            {
                "names": [["", "the file image"]],
                "contexts": ["base:allocation"],
                "told": [96 * MIB, True, "", "the file image", 32 * MIB],
                "unknown": "ENOENT",
                "agreed": [True, start],
            },
            ours["negotiation"],
        )

    def test_nbdinfo_finds_no_difference_but_in_what_only_one_of_them_has(self) -> None:
        ours, theirs = (
            json.loads(output("nbdinfo", "--json", server.uri()))["exports"][0]
            for server in (self.ours, self.nbdkit)
        )
        differ = {name for name in ours.keys() | theirs.keys() if ours.get(name) != theirs.get(name)}
        sizes = {"block_size_minimum", "block_size_preferred", "block_size_maximum"}
        self.assertEqual({"uri", "description", "can_flush", *sizes}, differ)

    def test_nbdinfo_sees_the_same_extents(self) -> None:
        ours, theirs = (output("nbdinfo", "--map", server.uri()) for server in (self.ours, self.nbdkit))
        self.assertEqual(theirs, ours)
