"""What a load has seen so far: counts and latencies of one measured window."""

from __future__ import annotations

from collections import Counter
from typing import Any

from loadtest.histogram import Latency

__all__ = ["Tally"]


class Tally:
    """Counts of one window. `left` maps identities to the monotonic ns at which their client left."""

    def __init__(self) -> None:
        self.started = 0
        self.finished = 0
        self.events = 0
        self.bytes = 0
        self.sent_bytes = 0
        self.held = 0  # open loop: arrivals that found `most_in_flight` exchanges
        self.statuses: Counter[int] = Counter()
        self.errors: Counter[str] = Counter()
        self.left: dict[str, int] = {}
        self.event = Latency()  # from the upstream's send to our receive
        self.gap = Latency()  # between two events of a stream
        self.first = Latency()  # from the intended start to the first byte of the body
        self.whole = Latency()  # from the intended start to the end

    def summary(self, seconds: float) -> dict[str, Any]:
        """As JSON."""
        return {
            "seconds": round(seconds, 3),
            "started": self.started,
            "finished": self.finished,
            "events": self.events,
            "bytes": self.bytes,
            "requests_per_s": self.finished / seconds,
            "events_per_s": self.events / seconds,
            "mib_per_s": self.bytes / seconds / (1 << 20),
            "upload_mib_per_s": self.sent_bytes / seconds / (1 << 20),
            "held": self.held,
            "left": len(self.left),
            "statuses": {str(status): count for status, count in sorted(self.statuses.items())},
            "errors": dict(self.errors.most_common()),
            "event_ms": self.event.summary(),
            "gap_ms": self.gap.summary(),
            "first_ms": self.first.summary(),
            "whole_ms": self.whole.summary(),
        }
