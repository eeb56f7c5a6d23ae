"""An OpenAI-compatible upstream that keeps its time and counts what it sent: one process, one epoll loop.

Any request is answered by a stream of events (or one document) as its behaviour says (`behaviour.py`). Paths of its
own: `/v1/models`, and `/_loadtest/report` (JSON), `/_loadtest/reset`, `/_loadtest/left?user=ID` (a client says that it
left now).

Invariants: an event's stamp is taken right before its send; the next token is due one interval after the last one was
*due*, so a blocked socket delays tokens and never drops them; what a socket does not take is kept (one send's worth)
and nothing further is made until it went out. A peer's FIN or RST is seen in the loop's next round, in every state, and
ends the answer at once. Bounds: `MOST_CONNECTIONS`, 64 KiB of request head, the last 20,000 answers that were left.
"""

from __future__ import annotations

import heapq
import json
import select
import signal
import socket
import sys
import time
from collections import deque
from types import FrameType
from typing import Any

from loadtest.answer import Answer
from loadtest.behaviour import Behaviour
from loadtest.connection import Connection
from loadtest.histogram import Latency

__all__ = ["Upstream", "serve"]

MOST_CONNECTIONS = 60_000
MOST_LEFT = 20_000
COUNTED = ("requests", "finished", "left", "cut", "tokens", "tokens_wasted", "bytes", "body_bytes", "bad_requests")
_now = time.monotonic_ns


class Upstream:
    """The server. `run` blocks until `stop` is called (from a signal handler or another thread's `wake`)."""

    def __init__(
        self,
        default: Behaviour | None = None,
        host: str = "127.0.0.1",
        port: int = 0,
        *,
        send_buffer: int = 0,
        receive_buffer: int = 0,
    ) -> None:
        self.default = default or Behaviour()
        self.connections: dict[int, Connection] = {}
        self.heap: list[tuple[int, int, Answer]] = []
        self.seq = 0
        self.late = Latency()
        self.left: deque[dict[str, Any]] = deque(maxlen=MOST_LEFT)
        self.waiting_left: dict[str, int] = {}
        self.totals: dict[str, int] = {}
        self.reset()
        self._stopping = False
        self._send_buffer = send_buffer
        self._listener = socket.create_server((host, port), backlog=4096)
        if receive_buffer:
            self._listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        self._listener.setblocking(False)
        self.host, self.port = self._listener.getsockname()[:2]
        self.poll = select.epoll()
        self.poll.register(self._listener.fileno(), select.EPOLLIN)

    def reset(self) -> None:
        """Start the counts anew; what is in flight goes on."""
        names = (
            "requests",
            "finished",
            "left",
            "cut",
            "tokens",
            "tokens_wasted",
            "bytes",
            "body_bytes",
            "bad_requests",
        )
        self.totals = dict.fromkeys(names, 0)
        self.left.clear()
        self.waiting_left.clear()
        self.late.clear()

    def stop(self) -> None:
        """Leave `run` after its current round."""
        self._stopping = True

    def run(self) -> None:
        """Serve until `stop`; closes everything."""
        listener = self._listener.fileno()
        heap = self.heap
        try:
            while not self._stopping:
                timeout = 0.2
                if heap:
                    timeout = min(max((heap[0][0] - _now()) / 1e9, 0), timeout)
                for fd, events in self.poll.poll(timeout):
                    if fd == listener:
                        self._accept()
                    elif connection := self.connections.get(fd):
                        connection.on_events(events)
                self._due()
        finally:
            for connection in list(self.connections.values()):
                connection.close()
            self._listener.close()
            self.poll.close()

    def _due(self) -> None:
        heap, now = self.heap, _now()
        for _ in range(4096):  # so that a flood of overdue tokens cannot keep the sockets waiting
            if not heap or heap[0][0] > now:
                return
            due, _seq, answer = heapq.heappop(heap)
            if answer.due == due:
                answer.due = 0
                self.late.counts[(now - due) // 1000] += 1
                answer.advance(now)

    def schedule(self, answer: Answer, due: int) -> None:
        """Call `answer.advance` at `due` (monotonic ns), unless it is scheduled anew before."""
        answer.due = due
        self.seq += 1
        heapq.heappush(self.heap, (due, self.seq, answer))

    def _accept(self) -> None:
        for _ in range(512):
            try:
                sock, _address = self._listener.accept()
            except BlockingIOError:
                return
            except OSError as exc:
                print(f"upstream: cannot accept: {exc}", file=sys.stderr)
                time.sleep(0.01)
                return
            if len(self.connections) >= MOST_CONNECTIONS:
                sock.close()
                continue
            sock.setblocking(False)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            if self._send_buffer:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, self._send_buffer)
            fd = sock.fileno()
            self.connections[fd] = Connection(self, sock)
            self.poll.register(fd, select.EPOLLIN | select.EPOLLRDHUP)

    def note_left(self, answer: Answer, how: str) -> None:
        """A peer was seen to leave before its answer was complete."""
        seen = _now()
        self.totals["left"] += 1
        entry = {
            "user": answer.ident,
            "how": how,
            "seen": seen,
            "phase": answer.phase,
            "tokens": answer.sent,
            "bytes": answer.written,
            "sent_at": list(answer.sent_at),
        }
        said = self.waiting_left.pop(answer.ident, None)
        if said is not None:
            entry["said"] = said
            self.totals["tokens_wasted"] += sum(at > said for at in answer.sent_at)
        self.left.append(entry)

    def report(self) -> dict[str, Any]:
        """Everything counted so far."""
        live = []
        for connection in self.connections.values():
            answer = connection.answer
            if answer is not None:
                live.append(
                    {
                        "user": answer.ident,
                        "tokens": answer.sent,
                        "bytes": answer.written,
                        "taken": answer.written - connection.unacknowledged(),
                        "phase": answer.phase,
                    }
                )
        return {
            "totals": self.totals,
            "connections": len(self.connections),
            "late_ms": self.late.summary(),
            "left": list(self.left),
            "live": live,
        }

    def control(self, target: str) -> tuple[int, dict[str, Any]]:
        """Answer one of our own paths: a status and a JSON document."""
        path, _, query = target.partition("?")
        if path.endswith("/models"):
            return 200, {
                "object": "list",
                "data": [{"id": "m", "object": "model", "created": 1, "owned_by": "loadtest"}],
            }
        action = path.removeprefix("/_loadtest/")
        if action == "report":
            return 200, self.report()
        if action == "reset":
            self.reset()
            return 200, {"reset": True}
        if action == "left" and query.startswith("user="):
            if len(self.waiting_left) < MOST_LEFT:
                self.waiting_left[query[5:]] = _now()
            return 200, {"noted": query[5:]}
        return 404, {"error": {"message": f"no such path: {path}", "type": "invalid_request_error"}}


def serve(upstream: Upstream, *, quiet: bool = False) -> None:
    """Run in the foreground until SIGTERM or SIGINT, then print what was counted as one line of JSON."""

    def on_signal(_number: int, _frame: FrameType | None) -> None:
        upstream.stop()

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, on_signal)
    print(f"listening on http://{upstream.host}:{upstream.port}", file=sys.stderr, flush=True)
    upstream.run()
    if not quiet:
        report = upstream.report()
        print(json.dumps({"totals": report["totals"], "late_ms": report["late_ms"], "left": len(upstream.left)}))
