"""Which back end makes an image a device: ``--attach``."""

from __future__ import annotations

from collections.abc import Sequence

from twisted.logger import Logger

from erofs_twisted.errors import MountError
from erofs_twisted.interfaces import IDeviceConnector

_log = Logger()


async def choose_connector(
    name: str, connectors: Sequence[IDeviceConnector], log: Logger = _log
) -> IDeviceConnector:
    """The connector called ``name``; for ``auto``, the first that works on this machine. Raises `MountError`
    with what is missing: for ``auto``, of each connector."""
    candidates = [connector for connector in connectors if name in ("auto", connector.name)]
    reasons: list[str] = []
    for connector in candidates:
        try:
            await connector.check()
        except MountError as error:
            reasons.append(f"{connector.name}: {error}")
            continue
        why = f" ({'; '.join(reasons)})" if reasons else ""
        log.info("attaching by {name}{why}", name=connector.name, why=why)
        return connector
    raise MountError(f"--attach {name}: no way to make a device here. {'. '.join(reasons)}")
