"""What a client connection remembers of one exchange for the next: heads that are likely to come again, both ways.

Clients that stay send the same head again and again, which then is not read, written and asked about anew. A stream
goes on for long, and thousands of them each have a connection: there nothing is remembered.
"""

from __future__ import annotations

from typing import final

from canal_trio.gateway.answers import ClientHeads
from canal_trio.gateway.requests import UpstreamRequests
from canal_trio.settings import Bounds
from canal_trio.wire.heads import RequestHeadReader

__all__ = ["Remembered"]


@final
class Remembered:
    """One connection's: the client's last head, the last requests for upstreams, the last head for the client."""

    __slots__ = ("answers", "heads", "requests")

    def __init__(self, bounds: Bounds, *, peer: str, scheme: str) -> None:
        self.heads = RequestHeadReader(
            head_bytes=bounds.head_bytes, head_fields=bounds.head_fields, target_bytes=bounds.target_bytes
        )
        self.requests = UpstreamRequests(peer=peer, scheme=scheme)
        self.answers = ClientHeads()

    def forget(self) -> None:
        """Remember nothing. Not a checkpoint."""
        self.heads.forget()
        self.requests.forget()
        self.answers.forget()
