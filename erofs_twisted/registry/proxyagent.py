"""Requests for http URLs by way of a proxy, which gets the whole URL (RFC 9112, section 3.2.2)."""

from __future__ import annotations

import attrs
from twisted.internet.defer import Deferred
from twisted.web.http_headers import Headers
from twisted.web.iweb import IAgent, IBodyProducer, IResponse
from zope.interface import implementer

from erofs_twisted.registry.body import abandon
from erofs_twisted.registry.failures import NETWORK_FAILURES, is_cancellation
from erofs_twisted.registry.proxies import Proxies, Proxy
from erofs_twisted.registry.proxyfailures import connection_failure, credentials_wanted


@implementer(IAgent)
@attrs.frozen
class PlainProxyAgent:
    """Requests for http URLs that have one of ``proxies`` go to ``proxied``, an agent that speaks to it, all
    others to ``direct``.

    The proxy's failures are `TransferFailed`. Its 407 is one, too, and is never an answer.
    """

    _direct: IAgent
    _proxied: IAgent
    _proxies: Proxies

    def request(
        self,
        method: bytes,
        uri: bytes,
        headers: Headers | None = None,
        bodyProducer: IBodyProducer | None = None,
    ) -> Deferred[IResponse]:
        proxy = self._proxies.proxy_for(uri.decode("ascii")) if uri.startswith(b"http:") else None
        if proxy is None:
            return self._direct.request(method, uri, headers, bodyProducer)
        return Deferred.fromCoroutine(self._request(proxy, method, uri, headers, bodyProducer))

    async def _request(
        self,
        proxy: Proxy,
        method: bytes,
        uri: bytes,
        headers: Headers | None,
        body: IBodyProducer | None,
    ) -> IResponse:
        own = Headers() if headers is None else headers.copy()
        if proxy.credentials is not None:
            own.setRawHeaders("Proxy-Authorization", [proxy.credentials.authorization()])
        try:
            response = await self._proxied.request(method, uri, own, body)
        except NETWORK_FAILURES as error:
            if is_cancellation(error):
                raise
            raise connection_failure(proxy, error) from error
        if response.code == 407:
            abandon(response)
            raise credentials_wanted(proxy, response.headers.getRawHeaders("Proxy-Authenticate", []))
        return response
