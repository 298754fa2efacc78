"""Somebody sets the clock of the machine while mounts are read. Only User-Mode Linux's own clock is set."""

from __future__ import annotations

import json
import time
from concurrent.futures import ThreadPoolExecutor
from urllib.parse import quote

from twisted.trial.unittest import SkipTest

from tests.controlled import Controlled
from tests.daemon import DaemonTestCase, mounts
from tests.faults import Fault
from tests.processes import IN_USER_MODE_LINUX
from tests.reading import REST, Reader
from tests.scenery import BIG, scenery, sha256

HOUR = 3600.0
TOKEN_LIFE = 2.0
READERS = 2
LONGEST = 20.0
"""Seconds, by which a read has its bytes when its registry is there again."""


class ClockTests(DaemonTestCase):
    is_warm = True

    def setUp(self) -> None:
        if not IN_USER_MODE_LINUX:
            raise SkipTest("the clock of a real machine is left alone: run it with --guest")
        super().setUp()
        self.controlled = Controlled(
            self.directory / "s",
            ("--attach", "nbd", "--fill", "off", "--io-timeout", "60"),
            is_quick=True,
            is_warm=True,
        )
        self.addCleanup(self.controlled.kill)
        self._right = time.time() - time.monotonic()
        self.addCleanup(self.set_clock, 0.0)

    def set_clock(self, wrong_by: float) -> None:
        time.clock_settime(time.CLOCK_REALTIME, self._right + time.monotonic() + wrong_by)

    def call(self, method: str, name: str, more: str = "", **options: object) -> None:
        where = quote(str(self.controlled.directory / name), safe="")
        body = json.dumps(options).encode() if options else None
        status, answer = self.controlled.call(method, f"/v1/mounts/{where}{more}", body)
        self.assertEqual(201 if method == "PUT" else 200, status, answer)

    def jump(self, name: str, wrong_by: float) -> None:
        """Set the clock while a read waits for its registry, which then comes back; then look around."""
        cold = self.controlled.mountpoint(name)
        cache_dir = str(self.directory / f"cache-{name}")
        self.call("PUT", name, image=self.registry.image(name), **{"cache-dir": cache_dir})
        self.registry.set(name, Fault(kind="blobs", status=503).fields(), token_life=TOKEN_LIFE)
        with ThreadPoolExecutor(1) as pool:
            read = pool.submit(sha256, cold / BIG)
            time.sleep(1)
            self.set_clock(wrong_by)
            time.sleep(TOKEN_LIFE)
            self.assertFalse(read.done(), "it waits")
            tokens = self.registry.counts(name).tokens
            self.registry.set(name, token_life=TOKEN_LIFE)
            self.assertEqual(sha256(scenery().tree / BIG), read.result(LONGEST))
        self.assertGreater(self.registry.counts(name).tokens, tokens)
        status = self.controlled.call("GET", "/v1/status")[1]
        self.assertEqual(2, status["mounts"])
        self.assertTrue(0 < status["seconds"] < 600, status)
        self.call("POST", "one", "/prefetch")
        self.call("DELETE", name)

    def test_reads_timers_tokens_and_calls_go_on_when_the_clock_jumps(self) -> None:
        for name in ("one", "forward", "back"):
            self.registry.set(name, token_life=TOKEN_LIFE)
        self.controlled.start()
        one = self.controlled.mount(self.registry.image("one"), "one")
        readers = [Reader(one / BIG, scenery().tree / BIG, seed, REST) for seed in range(READERS)]
        for reader in readers:
            self.addCleanup(reader.kill)
        self.jump("forward", HOUR)
        self.jump("back", -HOUR)
        self.assertEqual(0, self.controlled.erofs_nbd("wait", one).returncode)
        (listed,) = json.loads(self.controlled.erofs_nbd("ls", "--json").stdout)
        self.assertEqual("ready", listed["status"])
        longest = max(reader.end()["pauses"][0] for reader in readers)
        print(f"\nlongest read {longest:.2f} s")
        self.assertLess(longest, LONGEST)
        self.assertEqual(0, self.controlled.stop(), self.controlled.log)
        self.assertNotIn("Traceback", self.controlled.log)
        self.assertEqual([], [mount for mount in mounts() if str(self.directory) in mount.path])
        self.assert_nothing_left()
