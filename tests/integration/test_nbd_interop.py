"""Other people's programs as clients of our server."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import tempfile
from pathlib import Path

from twisted.trial.unittest import SynchronousTestCase

from tests.nbd_tools import Ours, output, run, tool

MIB = 1 << 20
SIZE = 80 * MIB


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class InteropTests(SynchronousTestCase):
    """An export of 80 MiB with a hole in it, and one of 4 KiB by another name."""

    def setUp(self) -> None:
        directory = tempfile.TemporaryDirectory()
        self.addCleanup(directory.cleanup)
        self.directory = Path(directory.name)
        self.image = self.directory / "image"
        with self.image.open("wb") as file:
            file.write(os.urandom(MIB))
            file.seek(3 * MIB)
            file.write(os.urandom(5 * MIB))
            file.seek(40 * MIB)
            file.write(os.urandom(40 * MIB))
        other = self.directory / "other"
        other.write_bytes(bytes(4096))
        self.server = Ours(str(self.image), f"other={other}")
        self.server.__enter__()
        self.addCleanup(self.server.__exit__, None, None, None)
        self.uri = self.server.uri()


class NbdinfoTests(InteropTests):
    def test_it_lists_the_exports(self) -> None:
        listed = json.loads(output("nbdinfo", "--list", "--json", self.uri))
        self.assertEqual(
            [("", SIZE, "the file image"), ("other", 4096, "the file other")],
            [(each["export-name"], each["export-size"], each["description"]) for each in listed["exports"]],
        )

    def test_it_sees_what_is_advertised(self) -> None:
        told = json.loads(output("nbdinfo", "--json", self.uri))
        self.assertEqual(("newstyle-fixed", True), (told["protocol"], told["structured"]))
        (export,) = told["exports"]
        sizes = [export[f"block_size_{which}"] for which in ("minimum", "preferred", "maximum")]
        self.assertEqual([1, 4096, 32 * MIB], sizes)
        self.assertEqual(["base:allocation"], export["contexts"])

    def test_it_sees_the_size(self) -> None:
        self.assertEqual(f"{SIZE}\n", output("nbdinfo", "--size", self.uri))
        self.assertEqual("4096\n", output("nbdinfo", "--size", self.server.uri("other")))

    def test_it_sees_the_holes(self) -> None:
        extents = json.loads(output("nbdinfo", "--map", "--json", self.uri))
        edges = [0, MIB, 3 * MIB, 8 * MIB, 40 * MIB, SIZE]
        self.assertEqual(edges[:-1], [each["offset"] for each in extents])
        self.assertEqual([0, 3, 0, 3, 0], [each["type"] for each in extents])

    def test_it_sees_what_can_be_done(self) -> None:
        answers = {
            ("--is", "readonly"): 0,
            ("--can", "multi-conn"): 0,
            ("--can", "cache"): 0,
            ("--can", "df"): 0,
            ("--can", "write"): 2,
            ("--can", "trim"): 2,
            ("--can", "zero"): 2,
            ("--can", "fua"): 2,
        }
        found = {question: run("nbdinfo", *question, self.uri).returncode for question in answers}
        self.assertEqual(answers, found)

    def test_it_is_told_that_an_export_does_not_exist(self) -> None:
        done = run("nbdinfo", self.server.uri("nope"))
        self.assertEqual(1, done.returncode)
        self.assertIn("No such file or directory", done.stderr)


class NbdcopyTests(InteropTests):
    def test_its_copy_is_equal(self) -> None:
        copy = self.directory / "copy"
        output("nbdcopy", self.uri, str(copy))
        self.assertEqual(sha256(self.image), sha256(copy))

    def test_its_copy_to_standard_output_is_equal(self) -> None:
        with subprocess.Popen([tool("nbdcopy"), self.uri, "-"], stdout=subprocess.PIPE) as copying:
            assert copying.stdout is not None
            digest = hashlib.file_digest(copying.stdout, "sha256").hexdigest()  # type: ignore[arg-type]
        self.assertEqual((0, sha256(self.image)), (copying.returncode, digest))

    def test_its_copy_over_four_connections_with_the_longest_requests_is_equal(self) -> None:
        copy = self.directory / "copy"
        size = f"--request-size={32 * MIB}"
        output("nbdcopy", "--connections=4", "--requests=64", size, self.uri, str(copy))
        self.assertEqual(sha256(self.image), sha256(copy))

    def test_its_copy_by_the_shortest_requests_is_equal(self) -> None:
        copy = self.directory / "copy"
        output("nbdcopy", "--request-size=4096", "--requests=64", self.uri, str(copy))
        self.assertEqual(sha256(self.image), sha256(copy))

    def test_its_synchronous_copy_is_equal(self) -> None:
        copy = self.directory / "copy"
        output("nbdcopy", "--synchronous", self.uri, str(copy))
        self.assertEqual(sha256(self.image), sha256(copy))

    def test_it_cannot_copy_to_us(self) -> None:
        done = run("nbdcopy", str(self.image), self.uri)
        self.assertEqual(1, done.returncode)
        self.assertIn("read-only", done.stderr)


class QemuTests(InteropTests):
    def test_qemu_img_sees_the_size(self) -> None:
        told = json.loads(output("qemu-img", "info", "--output=json", self.uri))
        self.assertEqual((SIZE, "raw"), (told["virtual-size"], told["format"]))

    def test_qemu_img_finds_no_difference(self) -> None:
        output("qemu-img", "compare", "-f", "raw", "-F", "raw", self.uri, str(self.image))

    def test_qemu_img_sees_the_holes(self) -> None:
        extents = json.loads(output("qemu-img", "map", "--output=json", self.uri))
        self.assertEqual([True, False, True, False, True], [each["data"] for each in extents])
        self.assertEqual([False, True, False, True, False], [each["zero"] for each in extents])

    def test_qemu_img_reads_many_at_a_time(self) -> None:
        done = output("qemu-img", "bench", "-f", "raw", "-c", "10000", "-d", "64", "-s", "4096", self.uri)
        self.assertIn("Run completed", done)

    def test_qemu_io_reads_the_longest_and_unaligned_ranges(self) -> None:
        commands = ("-c", "read 0 32M", "-c", "read 1 511")
        self.assertIn("511/511 bytes at offset 1", output("qemu-io", "-r", "-f", "raw", *commands, self.uri))

    def test_qemu_io_cannot_write(self) -> None:
        done = run("qemu-io", "-f", "raw", "-c", "write 0 4k", self.uri)
        self.assertEqual(1, done.returncode)
        self.assertIn("Permission denied", done.stderr)


class NbdClientTests(InteropTests):
    def test_it_lists_the_exports(self) -> None:
        listed = output("nbd-client", "-l", "-unix", self.server.socket)
        self.assertIn(": the file image\nother: the file other\n", listed)


class NbdkitProxyTests(InteropTests):
    """nbdkit between the client and us, with filters that make trouble."""

    def through(self, *arguments: str, client: str) -> subprocess.CompletedProcess[str]:
        nbd = ["nbd", f"uri={self.uri}"]
        filters = [each for each in arguments if each.startswith("--")]
        settings = [each for each in arguments if not each.startswith("--")]
        # With a socket of its own naming, nbdkit at times leaves the directory of it behind.
        with tempfile.TemporaryDirectory(prefix="erofs-twisted-test-") as directory:
            listening = ("--unix", f"{directory}/proxy.sock")
            return run("nbdkit", *listening, *filters, *nbd, *settings, "--run", client)

    def test_a_proxy_that_injects_errors_leaves_us_serving(self) -> None:
        client = 'nbdcopy "$uri" null:; echo status $?'
        done = self.through("--filter=error", "error=EIO", "error-pread-rate=50%", client=client)
        # The client's own status: nbdkit 1.32 may abort when a client leaves in the middle of replies.
        self.assertEqual("status 1\n", done.stdout)
        self.assertIn("Input/output error", done.stderr)
        output("qemu-img", "compare", "-f", "raw", "-F", "raw", self.uri, str(self.image))

    def test_a_slow_proxy_copies_what_is_equal(self) -> None:
        copy = self.directory / "copy"
        done = self.through("--filter=delay", "rdelay=20ms", client=f'nbdcopy "$uri" {copy}')
        self.assertEqual((0, ""), (done.returncode, done.stderr))
        self.assertEqual(sha256(self.image), sha256(copy))

    def test_a_proxy_that_insists_on_blocks_copies_what_is_equal(self) -> None:
        copy = self.directory / "copy"
        policy = ("blocksize-minimum=4096", "blocksize-error-policy=error")
        done = self.through("--filter=blocksize-policy", *policy, client=f'nbdcopy "$uri" {copy}')
        self.assertEqual((0, ""), (done.returncode, done.stderr))
        self.assertEqual(sha256(self.image), sha256(copy))


class ServerProcessTests(InteropTests):
    def test_no_client_that_behaves_leaves_an_error_in_the_log(self) -> None:
        output("nbdinfo", "--list", self.uri)
        output("nbdcopy", "--connections=4", self.uri, "null:")
        output("qemu-img", "info", self.uri)
        for trouble in ("Traceback", "#error", "#critical", "#warn"):
            self.assertNotIn(trouble, self.server.log)

    def test_serving_takes_little_memory(self) -> None:
        output("nbdcopy", "--connections=4", "--requests=64", f"--request-size={32 * MIB}", self.uri, "null:")
        status = Path(f"/proc/{self.server.pid}/status").read_text()
        (peak,) = [int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM")]
        self.assertLess(peak, 80 << 10, "KiB")
