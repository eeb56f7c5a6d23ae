"""The requests that upstreams get: a client's head, as one upstream shall see it.

Clients that stay send the same head again and again. The last one to each of a few upstreams is remembered, with its
bytes, for one client connection: of a request that is the same (the reader gives the very object then) and goes there
again, only the request's id is new.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, final

from canal_trio.errors import Failure, Kind, Phase, Side
from canal_trio.gateway.exchange import Exchange
from canal_trio.messages import RequestHead
from canal_trio.policy.routing import Identity
from canal_trio.settings import Upstream
from canal_trio.wire.headers import ForUpstream, for_upstream
from canal_trio.wire.heads import write_request_head
from canal_trio.wire.splice import grown
from canal_trio.wire.targets import origin_form, parse_base_url, upstream_target

if TYPE_CHECKING:
    from canal_trio.gateway.core import Generation

__all__ = ["UpstreamRequest", "UpstreamRequests", "credential_of"]

_ID = b"x-request-id"
_REMEMBERED = 8  # upstreams whose last request is kept, per connection: balance sends them in turns
_LINE = b"\r\nX-Request-Id: %b\r\n"


@final
class UpstreamRequest:
    """A head for an upstream, as bytes and, for who asks for it, as a head. `chunked`: its body is."""

    __slots__ = ("_model", "_request_id", "block", "chunked")

    def __init__(self, model: RequestHead, request_id: bytes, block: bytes, *, chunked: bool) -> None:
        self._model = model  # the same but for the request's id, perhaps
        self._request_id = request_id
        self.block = block
        self.chunked = chunked

    @property
    def method(self) -> bytes:
        """The request's method."""
        return self._model.method

    @property
    def head(self) -> RequestHead:
        """The head that `block` says. Made anew each time."""
        model = self._model
        fields = model.headers.replaced(_ID, self._request_id)
        return RequestHead(model.method, model.target, fields, model.version)

    def again(self, request_id: bytes) -> UpstreamRequest:
        """The same with another id."""
        if request_id == self._request_id:
            return self
        block = self.block.replace(_LINE % self._request_id, _LINE % request_id, 1)
        return UpstreamRequest(self._model, request_id, block, chunked=self.chunked)


@dataclass(frozen=True, slots=True)
class _Last:
    """A request that was made before, and what it was made of."""

    head: RequestHead
    upstream: Upstream
    generation: Generation
    longer: int
    made: UpstreamRequest


@final
class UpstreamRequests:
    """Those of one client connection. `trusted`: the peer is a trusted proxy; `scheme`: how it speaks to us."""

    __slots__ = ("_last", "_peer", "_scheme", "identity")

    def __init__(self, *, peer: str, scheme: str) -> None:
        self._peer = peer
        self._scheme = scheme
        self._last: dict[str, _Last] = {}  # by the upstream's name
        self.identity = Identity()

    def forget(self) -> None:
        """Remember nothing: a stream goes on for long, and thousands of them each have a connection."""
        self._last = {}
        self.identity.forget()

    def make(
        self, exchange: Exchange, upstream: Upstream, generation: Generation, *, trusted: bool
    ) -> UpstreamRequest | Failure:
        """The request of `exchange` as `upstream` shall see it. `trusted`: our peer is a trusted proxy."""
        head, last, request_id = exchange.head, self._last.get(upstream.name), exchange.id.encode("ascii")
        assert head is not None
        longer = grown(exchange.body.edits) if exchange.body is not None and exchange.body.edits else 0
        if (
            last is not None
            and last.head is head
            and last.upstream is upstream
            and last.generation is generation
            and last.longer == longer
        ):
            return last.made.again(request_id)
        made = self._make(head, exchange, upstream, generation, trusted, longer)
        if isinstance(made, RequestHead):
            chunked = b"transfer-encoding" in made.headers
            request = UpstreamRequest(made, request_id, write_request_head(made), chunked=chunked)
            if len(self._last) >= _REMEMBERED:
                self._last = {}
            self._last[upstream.name] = _Last(head, upstream, generation, longer, request)
            return request
        return made

    def _make(
        self,
        head: RequestHead,
        exchange: Exchange,
        upstream: Upstream,
        generation: Generation,
        trusted: bool,
        longer: int,
    ) -> RequestHead | Failure:
        base = parse_base_url(upstream.base_url)
        origin = origin_form(head)
        if isinstance(origin, Failure):
            return origin
        if isinstance(base, str):
            return Failure(Side.GATEWAY, Phase.ROUTE, Kind.INTERNAL, base)
        target = upstream_target(base.path, origin[0])
        if isinstance(target, Failure):
            return target
        length = exchange.facts.length if exchange.facts is not None else None
        options = ForUpstream(
            target=target,
            authority=base.authority,
            client=self._peer,
            client_trusted=trusted,
            scheme=self._scheme,
            request_id=exchange.id.encode("ascii"),
            pseudonym=generation.settings.pseudonym,
            credential=credential_of(upstream),
            strip_credentials=generation.router.keyed,
            body=length + longer if isinstance(length, int) else (None if exchange.body is not None else 0),
            upgrade=exchange.upgrade,
        )
        return for_upstream(head, options)


def credential_of(upstream: Upstream) -> tuple[bytes, bytes] | None:
    """The field with the upstream's own key; None if it has none."""
    if upstream.api_key is None:
        return None
    key = upstream.api_key.encode("latin-1")
    if upstream.key_header == "authorization":
        return b"Authorization", b"Bearer " + key
    return upstream.key_header.encode("ascii"), key
