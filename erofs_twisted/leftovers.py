"""What is left of a mount whose daemon has ended, as it is seen now."""

from __future__ import annotations

from erofs_twisted.interfaces import IDeviceConnector
from erofs_twisted.mount.mountpoint import Mountpoint
from erofs_twisted.state.journal import boot_id
from erofs_twisted.state.records import MountRecord
from erofs_twisted.state.takeover import Plan, Seen, make_plan


async def plan_for(record: MountRecord, nbd: IDeviceConnector, mountpoint: Mountpoint) -> Plan:
    """The steps to a whole mount from what is left of the one on ``record``. Raises `MountError`."""
    devices = await nbd.connected(record.identifier) if record.backend == "nbd" else []
    there = await mountpoint.there()
    source, mount_id = ("", 0) if there is None else (there.source, there.mount_id)
    return make_plan(record, Seen(boot=boot_id(), devices=devices, source=source, mount_id=mount_id))
