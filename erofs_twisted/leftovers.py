"""What is left of a mount whose daemon has ended, as it is seen now."""

from __future__ import annotations

from collections.abc import Sequence

from erofs_twisted.interfaces import Connected, IDeviceConnector
from erofs_twisted.mount.mountinfo import Mount
from erofs_twisted.mount.mountpoint import Mountpoint
from erofs_twisted.state.journal import boot_id
from erofs_twisted.state.records import MountRecord
from erofs_twisted.state.takeover import Plan, Seen, make_plan


async def plan_for(record: MountRecord, connector: IDeviceConnector | None, mountpoint: Mountpoint) -> Plan:
    """The steps to a whole mount from what is left of the one on ``record``, by the ``connector`` that made
    its device. Raises `MountError`."""
    devices = [] if connector is None else await connector.connected(record.identifier)
    return make_plan(record, seen(boot_id(), devices, await mountpoint.there()))


def seen(boot: str, devices: Sequence[Connected], there: Mount | None) -> Seen:
    """``there`` is what is mounted on the mount point, on top."""
    if there is None:
        return Seen(boot=boot, devices=devices)
    return Seen(boot=boot, devices=devices, source=there.source, mount_id=there.mount_id)
