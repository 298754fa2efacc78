"""CRC-32C (Castagnoli), as EROFS uses it: for a few kilobytes, once a mount."""

from __future__ import annotations

from functools import cache

REFLECTED_POLYNOMIAL = 0x82F63B78


def crc32c(data: bytes, crc: int = 0xFFFFFFFF) -> int:
    """The CRC register after ``data``, not inverted at the end (as the kernel's ``crc32c()`` returns it)."""
    table = _table()
    for byte in data:
        crc = table[(crc ^ byte) & 0xFF] ^ (crc >> 8)
    return crc


@cache
def _table() -> tuple[int, ...]:
    table = []
    for remainder in range(256):
        for _ in range(8):
            remainder = (remainder >> 1) ^ (REFLECTED_POLYNOMIAL if remainder & 1 else 0)
        table.append(remainder)
    return tuple(table)
