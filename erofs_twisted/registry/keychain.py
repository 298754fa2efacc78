"""Where a registry's client gets credentials from, when it is asked for some."""

from __future__ import annotations

import attrs
from twisted.internet.defer import Deferred, succeed
from zope.interface import Attribute, Interface, implementer

from erofs_twisted.registry.credentials import Identity


class IKeychain(Interface):
    """The credentials for one repository of one registry."""

    source = Attribute(
        "Where those come from that `credentials` gave last, for people; '' if there were none."
    )

    def credentials() -> Deferred[Identity | None]:
        """A Deferred of those that hold now; None where there are none. May be cancelled.

        To be called whenever some are needed: what is still valid costs nothing to get again. Fails with
        `AccessDenied` where what the user has named cannot be used.
        """

    def refused(credentials: Identity) -> None:
        """These are not accepted: those of the next `credentials` should be newer, if there are any."""


@implementer(IKeychain)
@attrs.frozen
class Given:
    """What the user has said, which stays as it is; None for one who is nobody."""

    _credentials: Identity | None = None

    @property
    def source(self) -> str:
        """As `IKeychain.source`."""
        return "" if self._credentials is None else "those that were given (--username, --oci)"

    def credentials(self) -> Deferred[Identity | None]:
        """As `IKeychain.credentials`."""
        return succeed(self._credentials)

    def refused(self, credentials: Identity) -> None:
        """As `IKeychain.refused`: there are no others."""
