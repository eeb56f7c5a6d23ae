"""HTTP/1.1 to an `http` upstream behind an HTTP proxy that forwards: requests in absolute-form (RFC 9112 3.2.2).

The connection is the proxy's, so it says where each request goes and who we are. A 407 is meant for us, not for the
client, who knows nothing of a proxy: it becomes a failure. Everything else the proxy says in the upstream's place
(a 502 of its own) cannot be told from the upstream's word and is relayed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import final

from canal_trio.errors import Failure, Kind, Phase, Retry, Side
from canal_trio.messages import Headers, RequestHead, ResponseHead
from canal_trio.relay.flow import FlowSender
from canal_trio.upstream.http1 import Http1Connection
from canal_trio.upstream.interface import Answer, BodySource
from canal_trio.upstream.tunnel import Proxy
from canal_trio.wire.targets import BaseUrl

__all__ = ["ForwardedConnection"]


@final
class ForwardedConnection:
    """`inner`, whose stream leads to `proxy`, as a connection to `base`."""

    def __init__(self, inner: Http1Connection, proxy: Proxy, base: BaseUrl) -> None:
        self._inner = inner
        self._proxy = proxy
        self._origin = b"http://" + base.authority

    def __repr__(self) -> str:
        return f"<ForwardedConnection by {self._proxy.name}: {self._inner!r}>"

    @property
    def reusable(self) -> bool:
        """See `canal_trio.upstream.interface.Connection`; so for all that follows."""
        return self._inner.reusable

    @property
    def sent(self) -> bool:
        """As the connection to the proxy."""
        return self._inner.sent

    def usable(self) -> bool:
        """Is the proxy's connection quiet?"""
        return self._inner.usable()

    def watch_idle(self, died: Callable[[], None] | None) -> None:
        """Watch the proxy's connection."""
        self._inner.watch_idle(died)

    def ends(self) -> bool:
        """As the connection to the proxy."""
        return self._inner.ends()

    def abort(self) -> None:
        """Close the proxy's connection in this very step; it closes the upstream's."""
        self._inner.abort()

    straight: None = None  # what it does needs a task of its own

    async def run(self, head: RequestHead, body: BodySource | None, answer: Answer) -> Failure | None:
        """One attempt, through the proxy."""
        guard = _Guard(answer, self)
        failure = await self._inner.run(self._absolute(head), body, guard)
        return guard.refusal or failure

    def _absolute(self, head: RequestHead) -> RequestHead:
        target = self._origin if head.target == b"*" else self._origin + head.target  # RFC 9112 3.2.4
        authorization = self._proxy.authorization
        if authorization is None:
            return replace(head, target=target)
        return replace(head, target=target, headers=Headers([*head.headers, (b"Proxy-Authorization", authorization)]))

    def refused(self, head: ResponseHead) -> Failure:
        """The proxy's 407: the request went no further."""
        self.abort()
        detail = f"The proxy {self._proxy.name}: it answered 407 {head.reason.decode('ascii', 'replace')}".rstrip()
        return Failure(Side.UPSTREAM, Phase.DIAL, Kind.REFUSED, detail + ".", Retry.UNSENT)


@final
class _Guard:
    """The answer, without the proxy's 407."""

    def __init__(self, answer: Answer, owner: ForwardedConnection) -> None:
        self._answer = answer
        self._owner = owner
        self.refusal: Failure | None = None

    @property
    def body(self) -> FlowSender:
        return self._answer.body

    async def head(self, head: ResponseHead) -> None:
        if head.status == 407:
            self.refusal = self._owner.refused(head)
        else:
            await self._answer.head(head)
