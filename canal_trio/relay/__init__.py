"""The relay core: bounded flows and hand-over on the spot between any two Trio streams. Knows no HTTP.

`relay(a, b)` joins two streams until both directions have ended and reports. `open_flow` makes the two ends of a
bounded flow; `pump` fills one from a stream and `deliver` empties one into a stream. `TcpStream` and `TlsStream` are
streams that can hand over on the spot; any other `trio.abc` stream works by the plain path. See docs/relay.md.
"""

from __future__ import annotations

from canal_trio.relay.duplex import (
    Direction,
    DirectionReport,
    OnEof,
    RelayLimits,
    RelayReport,
    RelayTap,
    relay,
)
from canal_trio.relay.flow import (
    Aborted,
    Ended,
    Ending,
    FlowReceiver,
    FlowSender,
    FlowStatistics,
    Meter,
    Sink,
    open_flow,
)
from canal_trio.relay.handover import Armed, HandoverStream, can_hand_over, handover_end, settled
from canal_trio.relay.idle import Reaper, ReaperStatistics, Watch
from canal_trio.relay.pump import Progress, RelayFailure, Trouble, deliver, pump
from canal_trio.relay.streams import TcpStream
from canal_trio.relay.tls import TlsStream
from canal_trio.relay.waiting import wait_in_poller

__all__ = [
    "Aborted",
    "Armed",
    "Direction",
    "DirectionReport",
    "Ended",
    "Ending",
    "FlowReceiver",
    "FlowSender",
    "FlowStatistics",
    "HandoverStream",
    "Meter",
    "OnEof",
    "Progress",
    "Reaper",
    "ReaperStatistics",
    "RelayFailure",
    "RelayLimits",
    "RelayReport",
    "RelayTap",
    "Sink",
    "TcpStream",
    "TlsStream",
    "Trouble",
    "Watch",
    "can_hand_over",
    "deliver",
    "handover_end",
    "open_flow",
    "pump",
    "relay",
    "settled",
    "wait_in_poller",
]
