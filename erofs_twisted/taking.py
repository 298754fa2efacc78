"""The device that a mount is of: one that is there already, one that waits for a server, or a new one."""

from __future__ import annotations

from collections.abc import Hashable
from contextlib import AsyncExitStack
from typing import Any

import attrs
from twisted.internet.defer import CancelledError, Deferred
from twisted.logger import Logger
from twisted.python.failure import Failure

from erofs_twisted.devices import Devices, Served
from erofs_twisted.errors import ErofsTwistedError, MountError
from erofs_twisted.image import FoundImage, OpenImage, find_image
from erofs_twisted.interfaces import IDeviceConnector
from erofs_twisted.nbd.server import NBDServer
from erofs_twisted.options import ImageConfig, MountConfig
from erofs_twisted.registry.digest import Digest
from erofs_twisted.registry.reference import ImageReference
from erofs_twisted.state.journal import MountState
from erofs_twisted.state.records import record_name
from erofs_twisted.state.takeover import Plan

NOTHING: dict[str, Any] = {"backend": "", "identifier": "", "device": "", "size": 0, "mount_id": 0}
"""What is on record of a device and a mount where there are none."""


@attrs.frozen
class DeviceTaking:
    """Of the image that ``config`` says, by way of ``connector``; on record in ``state`` before it is there,
    because it is found by that. What ``plan`` adopts is served again."""

    reactor: Any
    config: MountConfig
    devices: Devices
    plan: Plan
    connector: IDeviceConnector
    state: MountState

    log = Logger()

    async def take(self, user: object, pinned: str) -> Served:
        """For ``user``, who gives it back; of the manifest ``pinned``, if that is given. Raises
        `ErofsTwistedError`."""
        plan, state = self.plan, self.state
        image = _pinned(self.config.image, state.record.digest if plan.adopts else pinned)
        found = await find_image(self.reactor, self.devices.pool, image)
        try:
            if plan.adopts and found.layer.digest != state.record.layer:
                raise self._is_another()

            async def make() -> Served:
                return await self._make(found)

            served = await self.devices.take(self._kind(found), plan.device, make, user)
        finally:
            await found.close()
        write = state.note if plan.adopts else state.update
        try:
            write(
                **_on_record(found, served.image, served.backend, served.identifier),
                device=served.device.path,
                mount_id=plan.mount_id,
            )
        except MountError:
            await self.devices.give_back(served, user)
            state.note(**NOTHING)
            raise
        return served

    async def _make(self, found: FoundImage) -> Served:
        """A failure leaves the one that waits for a server as it was, and nothing of a new one."""
        undo = AsyncExitStack()
        try:
            image = await found.open()
            undo.push_async_callback(image.close)
            server = NBDServer(self.reactor)
            undo.push_async_callback(server.stop)
            if self.plan.adopts:
                return await self._adopt(undo, image, server)
            return await self._attach(undo, found, image, server)
        except BaseException:
            await undo.aclose()
            if not self.plan.adopts:
                self.state.note(**NOTHING)
            raise

    async def _adopt(self, undo: AsyncExitStack, image: OpenImage, server: NBDServer) -> Served:
        record = self.state.record
        if image.export.size != record.size:
            raise self._is_another()
        device = await self.connector.adopt(self.plan.device, image.export, server, record.identifier)
        undo.push_async_callback(device.detach)
        # Readers have waited long enough.
        _ = Deferred.fromCoroutine(image.check()).addErrback(self._not_checked)
        return Served(image, server, device, self.connector.name, record.identifier)

    async def _attach(
        self, undo: AsyncExitStack, found: FoundImage, image: OpenImage, server: NBDServer
    ) -> Served:
        config, connector, state = self.config, self.connector, self.state
        identifier = config.nbd.backend_identifier or (
            f"{image.export.description} {record_name(config.mountpoint)}"
        )
        state.update(**_on_record(found, image, connector.name, identifier))
        device = await connector.attach(image.export, server, identifier)
        undo.push_async_callback(device.detach)
        state.update(device=device.path)
        await image.check()
        return Served(image, server, device, connector.name, identifier)

    def _is_another(self) -> MountError:
        return MountError(f"{self.state.record.image} is not what {self.plan.device} was made for any more")

    def _not_checked(self, failure: Failure) -> None:
        failure.trap(ErofsTwistedError, CancelledError)
        self.log.warn("the rest of the image is not fetched: {reason}", reason=failure.getErrorMessage())

    def _kind(self, found: FoundImage) -> Hashable:
        """Mounts of the same kind may share a device."""
        image = self.config.image
        if self.connector.name != "nbd":
            return object()  # what is behind it lies in the mount's own directory
        fetching = (str(image.cache_dir), image.trace, image.fill, image.fill_rate)
        return (found.layer.digest, self.config.nbd, *fetching)


def _on_record(found: FoundImage, image: OpenImage, backend: str, identifier: str) -> dict[str, Any]:
    """What a device is found by, and what is on it."""
    return {
        "backend": backend,
        "identifier": identifier,
        "size": image.export.size,
        "digest": found.resolved.digest,
        "layer": found.layer.digest,
    }


def _pinned(config: ImageConfig, digest: str) -> ImageConfig:
    """The image with that manifest, whatever its tag stands for by now."""
    if not digest or not isinstance(config.reference, ImageReference):
        return config
    return attrs.evolve(config, reference=attrs.evolve(config.reference, digest=Digest.parse(digest)))
