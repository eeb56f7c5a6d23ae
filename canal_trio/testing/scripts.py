"""What a scripted upstream says: plain steps, and the usual answers built from them.

A script is data: bytes to send, pauses, and ways to break off. `stream`, `chat_stream`, `reply` and `openai_error`
build whole answers; `cut_at` and `cut_after` take any of them and break it off at a byte or after a token. Nothing
here touches a socket; `canal_trio.testing.upstreams` plays the scripts.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from http import HTTPStatus
from typing import Literal, TypeAlias

import trio

__all__ = [
    "DONE",
    "Close",
    "Cut",
    "Echo",
    "Forever",
    "Pause",
    "Reset",
    "Script",
    "Send",
    "Stall",
    "Step",
    "WaitFor",
    "chat_chunk",
    "chat_stream",
    "cut_after",
    "cut_at",
    "error_event",
    "openai_error",
    "reply",
    "stream",
]

DONE = b"data: [DONE]\n\n"
Framing: TypeAlias = Literal["chunked", "length", "close"]


@dataclass(frozen=True, slots=True)
class Send:
    """Bytes as they go on the wire. `payload` is what they mean to the reader of the body; `tokens` is for counting."""

    data: bytes
    payload: bytes = b""
    tokens: int = 0


@dataclass(frozen=True, slots=True)
class Pause:
    """Say nothing for this many seconds."""

    seconds: float


@dataclass(frozen=True, slots=True)
class WaitFor:
    """Say nothing until the test sets the event."""

    event: trio.Event


@dataclass(frozen=True, slots=True)
class Stall:
    """Say nothing more, keep the connection open until the peer leaves."""


@dataclass(frozen=True, slots=True)
class Cut:
    """Send FIN at once (over TLS without close_notify), whatever was promised."""


@dataclass(frozen=True, slots=True)
class Close:
    """Close in the proper way (over TLS with close_notify): the end of a close-delimited body."""


@dataclass(frozen=True, slots=True)
class Reset:
    """Send RST at once."""


@dataclass(frozen=True, slots=True)
class Echo:
    """Send back whatever arrives, until the peer leaves: the far end of a tunnel."""


@dataclass(frozen=True, slots=True)
class Forever:
    """Repeat these steps without end; at least one of them has to send or wait."""

    steps: tuple[Step, ...]


Step: TypeAlias = Send | Pause | WaitFor | Stall | Cut | Close | Reset | Echo | Forever


@dataclass(frozen=True, slots=True)
class Script:
    """The answer to one request.

    `body` says when the request's body is read: before the first step, during the steps (an early answer), or never
    (the peer's upload then meets a full socket; its leaving is noticed only by a failing send). After the last step
    the connection serves the next request.
    """

    steps: tuple[Step, ...]
    body: Literal["before", "during", "never"] = "before"

    @property
    def wire(self) -> bytes:
        """Every byte it sends, head included; `Forever` counts as nothing."""
        return b"".join(step.data for step in self.steps if isinstance(step, Send))

    @property
    def payload(self) -> bytes:
        """The body those bytes carry, without its framing."""
        return b"".join(step.payload for step in self.steps if isinstance(step, Send))

    @property
    def head_bytes(self) -> int:
        """Length of the response head on the wire (of the first one, if there are several)."""
        return self.wire.index(b"\r\n\r\n") + 4


def _head(status: int, fields: Iterable[tuple[str, str]]) -> bytes:
    lines = [f"HTTP/1.1 {status} {HTTPStatus(status).phrase}", *(f"{name}: {value}" for name, value in fields)]
    return "\r\n".join([*lines, "", ""]).encode("latin-1")


def stream(
    pieces: Sequence[bytes],
    *,
    gap: float = 0.0,
    framing: Framing = "chunked",
    status: int = 200,
    content_type: str = "text/event-stream",
    headers: Iterable[tuple[str, str]] = (),
    head_alone: bool = True,
    first: int = 0,
    last: int | None = None,
) -> Script:
    """A body sent piece by piece, `gap` seconds apart, in any of the three framings.

    `pieces[first:last]` count as one token each. Without `head_alone` the head travels with the first piece.
    The last piece and the end of a chunked body leave in one send.
    """
    fields = [("Content-Type", content_type), *headers]
    if framing == "chunked":
        fields.append(("Transfer-Encoding", "chunked"))
    else:
        length = ("Content-Length", str(sum(map(len, pieces))))
        fields.append(length if framing == "length" else ("Connection", "close"))
    sends: list[Send] = [Send(_head(status, fields))]
    last = len(pieces) if last is None else last
    for index, piece in enumerate(pieces):
        data = b"%x\r\n%b\r\n" % (len(piece), piece) if framing == "chunked" else piece
        sends.append(Send(data, piece, tokens=int(first <= index < last)))
    if framing == "chunked":
        sends[-1] = replace(sends[-1], data=sends[-1].data + b"0\r\n\r\n")
    if not head_alone and len(sends) > 1:
        sends[:2] = [replace(sends[1], data=sends[0].data + sends[1].data)]
    steps: list[Step] = []
    for send in sends:
        if gap and steps:
            steps.append(Pause(gap))
        steps.append(send)
    if framing == "close":
        steps.append(Close())
    return Script(tuple(steps))


def chat_chunk(
    delta: dict[str, object] | None,
    *,
    finish: str | None = None,
    usage: dict[str, int] | None = None,
    model: str = "scripted",
) -> bytes:
    """One `chat.completion.chunk` event; `delta` None gives `choices: []`, the form of the usage chunk."""
    choices = [] if delta is None else [{"index": 0, "delta": delta, "finish_reason": finish}]
    head = {"id": "chatcmpl-scripted", "object": "chat.completion.chunk", "created": 1, "model": model}
    body = {**head, "choices": choices, **({} if usage is None else {"usage": usage})}
    return b"data: %b\n\n" % json.dumps(body, separators=(",", ":")).encode()


def chat_stream(
    tokens: int | Sequence[str] = 5,
    *,
    gap: float = 0.0,
    usage: bool = False,
    done: bool = True,
    model: str = "scripted",
    framing: Framing = "chunked",
    headers: Iterable[tuple[str, str]] = (),
) -> Script:
    """A chat completion as OpenAI streams it: the role, the tokens, the finish reason, usage on demand, `[DONE]`."""
    words = [f"word{index} " for index in range(tokens)] if isinstance(tokens, int) else list(tokens)
    pieces = [chat_chunk({"role": "assistant", "content": ""}, model=model)]
    pieces += [chat_chunk({"content": word}, model=model) for word in words]
    pieces.append(chat_chunk({}, finish="stop", model=model))
    if usage:
        counts = {"prompt_tokens": 3, "completion_tokens": len(words), "total_tokens": 3 + len(words)}
        pieces.append(chat_chunk(None, usage=counts, model=model))
    if done:
        pieces.append(DONE)
    return stream(pieces, gap=gap, framing=framing, headers=headers, first=1, last=1 + len(words))


def reply(
    body: object,
    *,
    status: int = 200,
    headers: Iterable[tuple[str, str]] = (),
    content_type: str = "application/json",
) -> Script:
    """A whole answer with a content-length; anything but bytes is sent as JSON."""
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    fields = [("Content-Type", content_type), ("Content-Length", str(len(data))), *headers]
    return Script((Send(_head(status, fields) + data, data),))


def openai_error(
    status: int, message: str = "scripted failure", *, code: str | None = None, headers: Iterable[tuple[str, str]] = ()
) -> Script:
    """An error in OpenAI's shape, for instance `openai_error(429, headers=[("retry-after", "1")])`."""
    kind = "invalid_request_error" if status < 500 else "server_error"
    return reply(
        {"error": {"message": message, "type": kind, "param": None, "code": code}}, status=status, headers=headers
    )


def error_event(message: str = "scripted failure", *, code: str | None = "overloaded") -> Send:
    """An error inside the stream as OpenAI and vLLM send it, framed as one chunk."""
    error = {"error": {"message": message, "type": "server_error", "param": None, "code": code}}
    piece = b"data: %b\n\n" % json.dumps(error).encode()
    return Send(b"%x\r\n%b\r\n" % (len(piece), piece), piece)


def cut_at(script: Script, byte: int, *then: Step) -> Script:
    """`script` up to this many bytes on the wire (its head counts), then `then` (a `Cut()` unless given)."""
    steps: list[Step] = []
    for step in script.steps:
        if isinstance(step, Send):
            if byte < len(step.data):
                steps.append(Send(step.data[:byte]))
                break
            byte -= len(step.data)
        steps.append(step)
    return replace(script, steps=(*steps, *(then or (Cut(),))))


def cut_after(script: Script, tokens: int, *then: Step) -> Script:
    """`script` up to its `tokens`-th token (0: up to what precedes the first), then `then` (a `Cut()` unless given).

    With `Stall()`, `Reset()` or `error_event()` it makes the other ways to fail in the middle.
    """
    steps: list[Step] = []
    for step in script.steps:
        counts = isinstance(step, Send) and step.tokens > 0
        if counts and tokens == 0:
            break
        steps.append(step)
        if counts:
            tokens -= 1
            if tokens == 0:
                break
    return replace(script, steps=(*steps, *(then or (Cut(),))))
