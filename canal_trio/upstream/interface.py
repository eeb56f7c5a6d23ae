"""The seam between the gateway and whatever speaks to an upstream.

A lease holds a `Connection`; one `run()` is one attempt of one exchange on it. The request body comes from a
`BodySource` and the answer goes into an `Answer`: heads one by one, then the body through a relay flow, whose ending
tells a finished body from a cut one. Peer trouble is returned as a `Failure`, never raised.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Protocol, TypeAlias

from canal_trio.errors import Failure
from canal_trio.messages import End, RequestHead, ResponseHead
from canal_trio.relay.flow import Ending, FlowSender

__all__ = ["Answer", "AnswerBody", "BodySource", "Connection", "Inform", "Outlet", "StraightConnection"]

Inform: TypeAlias = Callable[[ResponseHead], Awaitable[None]]
"""Passes an informational head on."""


class BodySource(Protocol):
    """Where an attempt takes the request body from. A relay `FlowReceiver` fits."""

    @property
    def ending(self) -> Ending | None:
        """None until the last piece was taken; `Ended(messages.End)` or `Aborted(Failure)` then."""

    def take_nowait(self) -> list[bytes]:
        """The pieces that are ready now, perhaps none. Not a checkpoint."""

    async def take(self) -> list[bytes]:
        """The pieces that are ready, at least one; `[]` when there are no more (see `ending`). A checkpoint."""


class Answer(Protocol):
    """Where an attempt puts what the upstream said."""

    @property
    def body(self) -> FlowSender:
        """The response body. `end(messages.End)` when complete, `abort(Failure)` when cut."""

    async def head(self, head: ResponseHead) -> None:
        """Pass on an informational head or the final one. A checkpoint; waits until the driver takes it."""


class Connection(Protocol):
    """One connection to one upstream, used by one exchange at a time."""

    @property
    def reusable(self) -> bool:
        """After `run()`: the response ended cleanly and both sides keep the connection open."""

    @property
    def sent(self) -> bool:
        """The request has left whole."""

    def usable(self) -> bool:
        """Before a reuse: nothing has arrived and the peer has not hung up. Costs one system call at most."""

    def watch_idle(self, died: Callable[[], None] | None) -> None:
        """Have `died` called, in the step that sees it, when the peer hangs up on the idle connection; None ends it.

        A hang-up that was seen before has it called at once.
        """

    def ends(self) -> bool:
        """Its answer ends without our help: it has failed or ended, or the peer's hang-up is there to be read.

        For the middle of an attempt. Not a checkpoint; costs one system call at most.
        """

    @property
    def straight(self) -> StraightConnection | None:
        """The same connection for a driver that needs no second task, where that is possible."""

    async def run(self, head: RequestHead, body: BodySource | None, answer: Answer) -> Failure | None:
        """One attempt: send `head` and `body` (None: there is none), pass the answer on.

        `head` is complete and carries its own framing fields (`wire.headers.for_upstream`). Returns None once the whole
        response was put, otherwise the failure; a failure after the final head has been noted in the body's flow as
        well. Cancelled or failed, the connection can only be aborted.
        """

    def abort(self) -> None:
        """Close the connection to the upstream in this very step. Idempotent, never raises."""


class Outlet(Protocol):
    """Where a response body goes when it is handed over: what frames it for the client and sends it.

    Both methods begin a step and answer with the rest of it, in which the client's kernel gets the bytes; it answers
    False when the kernel did not take all of them, or the client is gone. Between the two nothing else may be begun.
    """

    @property
    def chunked(self) -> bool:
        """Does the client get chunks? Then one of the upstream's that is just as we would write it can pass whole."""

    def piece(self, payload: bytes, now: float) -> Callable[[], bool]:
        """Pass on `payload` (not empty), which was read at `now` (Trio's clock)."""

    def whole(self, framed: bytes, start: int, stop: int, now: float) -> Callable[[], bool]:
        """Pass on `framed` as it is; its payload is `framed[start:stop]`."""


class AnswerBody(Protocol):
    """The body of an answer whose head is here, for a driver which goes along with it itself.

    `early`, then `pass_on` while there is no `end` and no failure, or once `pass_rest`.
    """

    @property
    def end(self) -> End | None:
        """The end of the body, once it has come."""

    @property
    def failure(self) -> Failure | None:
        """What went wrong, if anything has."""

    def early(self) -> bytes:
        """The payload that came with the head, perhaps none. Not a checkpoint; once."""

    async def pass_on(self, outlet: Outlet, most: int) -> bytes:
        """Hand the body over to `outlet` in the poller's step, in reads of up to `most` bytes. A checkpoint.

        Returns when the outlet has answered False (it keeps a rest) or the body is over: with the payload that came
        with the end or before the failure, which the outlet has not seen.
        """

    async def pass_rest(self, sender: FlowSender) -> Failure | None:
        """Put the rest of the body into a flow, as `run()` does. A checkpoint."""


class StraightConnection(AnswerBody, Protocol):
    """An attempt in steps, for a driver which has the whole request: `ask`, then the body, then `conclude`.

    `pass_rest` concludes by itself, and doing it again changes nothing. All deadlines run as in `run()`. Cancelled in
    any of them, the connection can only be aborted.
    """

    async def ask(
        self, block: bytes, body: BodySource | None, inform: Inform, *, method: bytes, chunked: bool
    ) -> Failure | ResponseHead | None:
        """Send a request whose `body` is ready to its end, and wait for the final head. No upgrade. A checkpoint.

        `block` is the head as bytes; `method` is its method, and `chunked` says whether its body is to be. None: the
        upstream does not take all of it at once, so two sides have to be waited for; go on with `run()`, with the same
        `body`.
        """

    def conclude(self) -> Failure | None:
        """The attempt is over; its failure, if it had one. `reusable` holds from now on. Not a checkpoint."""
