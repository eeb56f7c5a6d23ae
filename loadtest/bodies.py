"""What the upstream says: events of a chat completion, and canned bodies that try a gateway's respect for bytes.

Pure. Invariant: `frame` over all pieces, then `LAST`, is a well-formed chunked body whose payload is the pieces.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from functools import cache
from http import HTTPStatus

__all__ = [
    "CANNED",
    "DONE",
    "LAST",
    "canned",
    "error_event",
    "event_maker",
    "frame",
    "head",
    "more_events",
    "usage_event",
    "whole_reply",
]

DONE = b"data: [DONE]\n\n"
LAST = b"0\r\n\r\n"
_ID = b'{"id":"chatcmpl-123","object":"chat.completion.chunk","created":1700000000,"model":"m",'
_LINE = 5 << 20


def frame(piece: bytes) -> bytes:
    """One chunk of a chunked body."""
    return b"%x\r\n%b\r\n" % (len(piece), piece)


@cache
def head(status: int, framing: str, content_type: str, length: int = 0) -> bytes:
    """A response head, blank line included."""
    lines = [f"HTTP/1.1 {status} {HTTPStatus(status).phrase}", f"Content-Type: {content_type}"]
    if content_type == "text/event-stream":
        lines.append("Cache-Control: no-cache")
    lines.append(
        {
            "chunked": "Transfer-Encoding: chunked",
            "length": f"Content-Length: {length}",
            "close": "Connection: close",
        }[framing]
    )
    return "\r\n".join([*lines, "", ""]).encode("latin-1")


@cache
def event_maker(size: int, stamp: str, chunked: bool) -> Callable[[int, int], bytes]:
    """A function (monotonic ns, number of the token) → the event's bytes, framed if `chunked`."""
    pad = b"x" * size
    if stamp == "field":
        text = b'data: %b"t":%%d,"choices":[{"index":0,"delta":{"content":" token%%d%b"},"finish_reason":null}]}\n\n'
    else:
        text = b'data: %b"choices":[{"index":0,"delta":{"content":" @%%d token%%d%b"},"finish_reason":null}]}\n\n'
    template = text % (_ID, pad)
    if not chunked:
        return lambda now, number: template % (now, number)

    def make(now: int, number: int) -> bytes:
        piece = template % (now, number)
        return b"%x\r\n%b\r\n" % (len(piece), piece)

    return make


@cache
def more_events(count: int, size: int, framed: bool) -> bytes:
    """The rest of a burst's send: `count` events without stamp or number, made once."""
    text = b'data: %b"choices":[{"index":0,"delta":{"content":" more %b"},"finish_reason":null}]}\n\n'
    piece = text % (_ID, b"x" * (size + 24))  # about as long as the first
    return (frame(piece) if framed else piece) * count


def usage_event(tokens: int) -> bytes:
    """The usage chunk of a stream with `include_usage`."""
    counts = {"prompt_tokens": 3, "completion_tokens": tokens, "total_tokens": 3 + tokens}
    return b'data: %b"choices":[],"usage":%b}\n\n' % (_ID, json.dumps(counts).encode())


def error_event(message: str = "the load test asked for this") -> bytes:
    """An error inside a stream."""
    return b"data: %b\n\n" % json.dumps({"error": {"message": message, "type": "server_error", "code": None}}).encode()


@cache
def whole_reply(tokens: int, size: int) -> bytes:
    """A completion in one document."""
    text = " ".join(f"token{n}{'x' * size}" for n in range(max(tokens, 0)))
    message = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": "stop"}
    counts = {"prompt_tokens": 3, "completion_tokens": tokens, "total_tokens": 3 + tokens}
    body = {"id": "chatcmpl-123", "object": "chat.completion", "created": 1700000000, "model": "m"}
    return json.dumps({**body, "choices": [message], "usage": counts}, separators=(",", ":")).encode()


def _three() -> list[bytes]:
    return [b'data: {"n":1}\n\n', 'data: {"n":2,"text":"größer"}\n\n'.encode(), b'data: {"n":3}\n\n', DONE]


def _utf8() -> list[bytes]:
    text = 'data: {"content":"Ein Häiku: 古池や蛙飛びこむ水の音 🐸 — ć̣"}\n\n'.encode()
    return [text[at : at + 1] for at in range(len(text))] + [DONE]  # every character is cut in the middle


def _noise() -> list[bytes]:
    chance = random.Random(7)
    return [chance.randbytes(chance.randint(1, 9000)) for _ in range(60)]


CANNED: dict[str, Callable[[], list[bytes]]] = {
    "three": _three,
    "crlf": lambda: [b'data: {"n":1}\r\n\r\n', b'data: {"n":2}\r\n', b"\r\n", b"data: [DONE]\r\n\r\n"],
    "cr": lambda: [b'data: {"n":1}\r\r', b'data: {"n":2}\r\r', b"data: [DONE]\r\r"],
    "comments": lambda: [b": ping\n\n", b':\ndata: {"n":1}\n\n: a\n: b\n\n', b": ping\n", DONE],
    "named": lambda: [
        b'event: response.created\nid: 7\nretry: 10\ndata: {"type":"response.created"}\n\n',
        b"event: response.output_text.delta\ndata: a\ndata: b\n\n",
        b'event: response.completed\ndata: {"type":"response.completed"}\n\n',
    ],
    "utf8": _utf8,
    "bom": lambda: [b"\xef\xbb\xbfdata: {}\n\n", DONE],
    "long_line": lambda: [b'data: {"content":"', b"x" * _LINE, b'"}\n\n', DONE],
    "no_last_blank_line": lambda: [b'data: {"n":1}\n\n', b'data: {"n":2}\n'],
    "no_last_newline": lambda: [b'data: {"n":1}\n\n', b"data: [DONE]"],
    "nothing_but_done": lambda: [DONE],
    "empty": list,
    "noise": _noise,
}


@cache
def canned(name: str) -> tuple[bytes, ...]:
    """The pieces of a canned body; `KeyError` if there is none of that name."""
    return tuple(CANNED[name]())
