"""What to do about what a daemon that was killed has left: steps, from what is seen. Nothing is done here."""

from __future__ import annotations

import enum
from collections.abc import Sequence

import attrs

from erofs_twisted.errors import MountError
from erofs_twisted.interfaces import Connected
from erofs_twisted.state.records import MountRecord


class Step(enum.Enum):
    """One of a plan; the value says it for people, with the record's fields."""

    UNMOUNT = "unmount {mountpoint}, lazily: its device {device} is gone"
    DISCONNECT = "disconnect {device}: it is not mounted on {mountpoint}"
    FORGET = "forget what is on record of {mountpoint}"
    ADOPT = "serve {device} again"
    KEEP = "leave {mountpoint} mounted"
    MOUNT = "mount {device} on {mountpoint}"
    LINGER = "leave {mountpoint} unmounted, and give {device} back when nobody uses it"
    START = "begin anew: attach a device, and mount it on {mountpoint}"

    def told(self, record: MountRecord, device: str) -> str:
        """The step in words; ``device`` is the one it is about."""
        return self.value.format(mountpoint=record.mountpoint, device=device or record.device or "(none)")


@attrs.frozen(kw_only=True)
class Seen:
    """``devices`` are those that are connected, ``source`` and ``mount_id`` what is mounted on the mount
    point, on top: '' and 0 where nothing is."""

    boot: str
    devices: Sequence[Connected] = ()
    source: str = ""
    mount_id: int = 0


@attrs.frozen
class Plan:
    """``device`` is the one that the steps are about, '' where there is none; ``mount_id`` that of the mount
    that is kept."""

    steps: tuple[Step, ...]
    device: str = ""
    mount_id: int = 0

    @property
    def adopts(self) -> bool:
        return Step.ADOPT in self.steps


AFRESH = Plan((Step.START,))


def make_plan(record: MountRecord | None, seen: Seen, is_wanted: bool = True) -> Plan:
    """The steps to a whole mount from what is left of the one on ``record``, whose daemon has ended. Where it
    was unmounted, and is not ``is_wanted`` again, they are those to the end of what is left.

    What cannot be told to be ours is left alone. Raises `MountError` where two devices may be it.
    """
    if record is None:
        return AFRESH
    start = Step.START if is_wanted else Step.FORGET
    if record.boot != seen.boot:
        return Plan((Step.FORGET, Step.START) if is_wanted else (Step.FORGET,))
    is_mounted = bool(seen.source) and (seen.source, seen.mount_id) == (record.device, record.mount_id)
    device = _device_of(record, seen.devices)
    if device is None:
        # Where its device has no name of its own kind, as a file, none but ours can be mounted from that.
        is_dead = is_mounted or (record.backend != "nbd" and _is_mounted_since(record, seen, record.device))
        return Plan((Step.UNMOUNT, start) if is_dead else (start,), record.device if is_dead else "")
    if is_mounted or _is_mounted_since(record, seen, device.path):
        return Plan((Step.ADOPT, Step.KEEP), device.path, seen.mount_id)
    if device.is_held:
        # In another mount namespace, or after a lazy unmount: its users go on, and here it is mounted again.
        if not is_wanted:
            return Plan((Step.ADOPT, Step.LINGER), device.path)
        return Plan((Step.ADOPT, Step.MOUNT), device.path) if not seen.source else Plan((Step.START,))
    if seen.source or not is_wanted:
        return Plan((Step.DISCONNECT, start), device.path)
    return Plan((Step.ADOPT, Step.MOUNT), device.path)


def _device_of(record: MountRecord, devices: Sequence[Connected]) -> Connected | None:
    """The record names it as soon as it is known; before that its identifier does, which was on record before
    there was a device."""
    ours = [each for each in devices if record.identifier and each.identifier == record.identifier]
    if record.device:
        ours = [each for each in ours if each.path == record.device]
    if len(ours) > 1:
        paths = ", ".join(each.path for each in ours)
        raise MountError(
            f"{record.mountpoint}: {paths} all say that they are {record.identifier!r}; disconnect those "
            "that nobody uses (nbd-client -d), and give each mount a --nbd-backend-identifier of its own"
        )
    return ours[0] if ours and (not record.size or ours[0].size == record.size) else None


def _is_mounted_since(record: MountRecord, seen: Seen, device: str) -> bool:
    """Killed between mount(2) and the record of it?"""
    return bool(device) and not record.mount_id and seen.source == device
