"""A connection that should be quiet: is it, has it died, and tell me when it does. The same for every protocol.

Inside of TLS, bytes may wait that the kernel knows nothing of, and what the kernel has may mean nothing (a session
ticket).
Invariant: what arrived unasked is seen before the connection is used again, or it would be the next client's answer.
"""

from __future__ import annotations

import select
from collections.abc import Callable

import trio

from canal_trio.relay.streams import HandoverStream

__all__ = ["has_hung_up", "is_quiet", "watch_hangup"]


def is_quiet(raw: HandoverStream) -> bool:
    """Nothing has arrived and the peer has not hung up. Not a checkpoint; one system call, inside of TLS a few.

    Where it is not quiet, only closing is sensible: a byte of what came is lost.
    """
    if raw.hangup:
        return False
    probe = getattr(raw, "socket", None)
    if probe is None or getattr(raw, "transport_stream", None) is not None:
        try:
            if raw.try_receive(1) is not None:
                return False
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            return False
    if probe is None:
        return True
    poll = select.poll()
    poll.register(probe, select.POLLIN | select.POLLRDHUP)
    return not poll.poll(0)


def has_hung_up(raw: HandoverStream) -> bool:
    """The peer has hung up (FIN or reset), whether or not the poller has heard of it yet; or we have closed.

    Not a checkpoint, takes no byte; one system call.
    """
    if raw.hangup:
        return True
    probe = getattr(raw, "socket", None)
    if probe is None:
        return False
    if probe.fileno() < 0:
        return True
    poll = select.poll()
    poll.register(probe, select.POLLRDHUP)  # POLLHUP and POLLERR are always told
    return bool(poll.poll(0))


def watch_hangup(raw: HandoverStream, died: Callable[[], None] | None) -> None:
    """Have `died` called in the step that sees the peer hang up; None ends the watch. At once, if it was seen before:
    perhaps with the last bytes of the response."""
    raw.watch(died)
    if died is not None and raw.hangup:
        raw.watch(None)
        died()
