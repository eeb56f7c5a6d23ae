"""An idle connection's socket: is it quiet, and tell me when it dies. The same for every protocol."""

from __future__ import annotations

import select
from collections.abc import Callable

from canal_trio.relay.streams import HandoverStream

__all__ = ["is_quiet", "watch_hangup"]


def is_quiet(raw: HandoverStream) -> bool:
    """Nothing has arrived and the peer has not hung up. One system call at most."""
    if raw.hangup:
        return False
    probe = getattr(raw, "socket", None)
    if probe is None:
        return True
    poll = select.poll()
    poll.register(probe, select.POLLIN | select.POLLRDHUP)
    return not poll.poll(0)


def watch_hangup(raw: HandoverStream, died: Callable[[], None] | None) -> None:
    """Have `died` called in the step that sees the peer hang up; None ends the watch. At once, if it was seen before:
    perhaps with the last bytes of the response."""
    raw.watch(died)
    if died is not None and raw.hangup:
        raw.watch(None)
        died()
