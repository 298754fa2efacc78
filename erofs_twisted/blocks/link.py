"""What the way to an origin is like, as its transfers show it. No I/O, no clock: times are arguments.

The round trip is the shortest wait for a first byte: a queue on the way only ever makes it longer. The
bandwidth is what comes in the time in which bytes follow each other: waits for an answer tell nothing of it.
Their product is what the way holds at a time. A request for less than that costs more waiting than bytes;
more than a few times that in flight only queues up.
"""

from __future__ import annotations

from collections import deque

import attrs

KIB = 1024
MIB = 1024 * KIB
SAMPLE = 128 * KIB
"""Bytes over which a rate is taken."""
PAUSE = 0.002
"""Seconds without a byte that are a wait for an answer, and no time of transfer; at least, on a far link it
is half a round trip."""
REQUEST_COST = 0.0003
"""Seconds of the processor that a request takes: over a fast link, that is what it costs."""
WINDOW_SECONDS = 0.05
"""Over which throughput is taken: longer than bytes wait for us."""
SHORT_REQUEST = 0.02
"""Seconds within which the bytes of a request should come."""
ROUND_TRIPS, RATES = 32, 32
"""How many of the last samples count."""
UNKNOWN_WINDOW = 4 * MIB
"""Guesses in flight, in bytes, before anything is known."""


@attrs.define
class Link:
    """Times and rates of all transfers from one origin."""

    _round_trips: deque[float] = attrs.field(factory=lambda: deque(maxlen=ROUND_TRIPS), init=False)
    _rates: deque[float] = attrs.field(factory=lambda: deque(maxlen=RATES), init=False)
    _throughputs: deque[float] = attrs.field(factory=lambda: deque(maxlen=RATES), init=False)
    _window_began: float | None = attrs.field(default=None, init=False)
    _window_bytes: int = attrs.field(default=0, init=False)
    _last: float | None = attrs.field(default=None, init=False)
    _seconds: float = attrs.field(default=0.0, init=False)
    _bytes: int = attrs.field(default=0, init=False)
    _bandwidth: float | None = attrs.field(default=None, init=False)

    @property
    def round_trip(self) -> float | None:
        """Seconds from a request to the first byte of its answer."""
        return min(self._round_trips, default=None)

    @property
    def bandwidth(self) -> float | None:
        """Bytes a second, over all transfers."""
        return self._bandwidth

    @property
    def throughput(self) -> float | None:
        """The most bytes a second that have really come of late, waits included: what can be counted on."""
        return max(self._throughputs, default=None)

    @property
    def product(self) -> int | None:
        """Bytes that come within a round trip."""
        if not self._round_trips or self._bandwidth is None:
            return None
        return int(min(self._round_trips) * self._bandwidth)

    @property
    def window(self) -> int:
        """Bytes of guesses worth having in flight: enough to find out that the link gives more."""
        product = self.product
        return UNKNOWN_WINDOW if product is None else max(4 * product, MIB)

    @property
    def longest(self) -> int:
        """The most that one request should ask for: enough that its own cost does not count, on a fast link
        too, and on a slow one little enough to be done soon."""
        bandwidth = self.bandwidth or 0.0
        return max(MIB, min(4 * MIB, _power_of_two(int(bandwidth * SHORT_REQUEST))))

    def share(self, parts: int, default: int, least: int, most: int) -> int:
        """What comes in a part of a round trip, or while we make a request, if that is more: as a power of
        two. ``default`` while that is not known."""
        product = self.product
        if product is None:
            return default
        return max(least, min(most, _power_of_two(max(product // parts, self._request_bytes))))

    def seconds(self, length: int, sharers: int = 1) -> float | None:
        """How long ``length`` bytes take, where so many transfers share the link."""
        bandwidth = self.bandwidth
        return None if bandwidth is None else length * sharers / bandwidth

    def answered(self, seconds: float) -> None:
        """The first byte of an answer came so long after the request."""
        self._round_trips.append(max(seconds, 1e-6))

    def received(self, now: float, length: int) -> None:
        """So many bytes came now."""
        self._count(now, length)
        last, self._last = self._last, now
        pause = max(PAUSE, min(self._round_trips, default=0.0) / 2)
        if last is None or now - last > pause:
            return  # when these set out is not known
        self._bytes += length
        self._seconds += now - last
        if self._bytes >= SAMPLE:
            self._rates.append(self._bytes / max(self._seconds, 1e-5))
            self._bytes, self._seconds = 0, 0.0
            # Some are too high, of bytes that had waited for this process or in a burst, and some too low, of
            # answers that were all short.
            self._bandwidth = sorted(self._rates)[len(self._rates) // 2]

    def _count(self, now: float, length: int) -> None:
        if self._window_began is None:
            self._window_began = now  # when these set out is not known
            return
        self._window_bytes += length
        seconds = now - self._window_began
        if seconds >= WINDOW_SECONDS:
            self._throughputs.append(self._window_bytes / seconds)
            self._window_began, self._window_bytes = now, 0

    @property
    def _request_bytes(self) -> int:
        """What comes while we make a request."""
        return int((self._bandwidth or 0.0) * REQUEST_COST)


def _power_of_two(number: int) -> int:
    """The largest that is not larger."""
    return 1 << max(number, 1).bit_length() - 1
