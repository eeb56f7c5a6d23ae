"""The demo's upstream: a toy server with OpenAI's shapes that writes a haiku token by token.

On plain Trio and h11, sharing nothing with the gateway's own code, so that the demo shows a gateway in front of a
stranger. Any key and any model name will do. It stops writing when its client leaves.
"""

from __future__ import annotations

import json
import random
import secrets
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import TypeAlias, final

import h11
import trio

__all__ = ["MODEL", "serve_demo_upstream"]

MODEL = "haiku"
TOKEN_GAP = 0.06  # seconds
HAIKUS = (
    "Packets cross the lock,\none gate opens at a time;\nstill water arrives.",
    "A word, then a word:\nnothing waits behind the dam.\nThe stream finds its mouth.",
    "The reader has left.\nUpstream, the pen stops mid-stroke:\nno ink for no one.",
)
MOST_BYTES = 1 << 20  # of a request body
IDLE_SECONDS = 75.0

METHODS = {"/v1/chat/completions": "POST", "/v1/models": "GET", f"/v1/models/{MODEL}": "GET"}

Fields: TypeAlias = list[tuple[str, str]]


async def serve_demo_upstream(
    *, gap: float = TOKEN_GAP, task_status: trio.TaskStatus[str] = trio.TASK_STATUS_IGNORED
) -> None:
    """Serve the demo upstream on 127.0.0.1 until cancelled; starts with its base URL. A checkpoint.

    Any key and any model name are accepted. `gap` is the time between two tokens, in seconds. Cancelling it closes
    every connection.
    """

    async def serve(stream: trio.SocketStream) -> None:
        await _Connection(stream, gap).run()

    listeners = await trio.open_tcp_listeners(0, host="127.0.0.1")
    async with trio.open_nursery() as nursery:
        await nursery.start(trio.serve_listeners, serve, listeners)
        task_status.started(f"http://127.0.0.1:{listeners[0].socket.getsockname()[1]}/v1")


@final
@dataclass(frozen=True, slots=True)
class _Complaint:
    """What a request has wrong, as OpenAI would answer it."""

    status: int
    message: str
    code: str | None = None
    param: str | None = None
    headers: Fields = field(default_factory=list)

    def body(self) -> bytes:
        error = {"message": self.message, "type": "invalid_request_error", "param": self.param, "code": self.code}
        return json.dumps({"error": error}, indent=2).encode() + b"\n"


@final
class _Connection:
    """One client: requests one after the other, and a watch on the client while it is answered."""

    def __init__(self, stream: trio.SocketStream, gap: float) -> None:
        self._stream = stream
        self._gap = gap
        self._http = h11.Connection(h11.SERVER)

    async def run(self) -> None:
        try:
            async with self._stream:
                await self._serve()
        except* (trio.BrokenResourceError, trio.ClosedResourceError, h11.RemoteProtocolError):
            pass  # the client left or spoke no HTTP: nothing to tell it

    async def _serve(self) -> None:
        while True:
            with trio.move_on_after(IDLE_SECONDS) as idle:
                request = await self._event()
            if idle.cancelled_caught or not isinstance(request, h11.Request):
                return
            body = await self._body()
            complaint = body if isinstance(body, _Complaint) else await self._answer(request, body)
            if complaint is not None:
                await self._reply(complaint.status, complaint.body(), complaint.headers)
            if self._http.our_state is not h11.DONE or self._http.their_state is not h11.DONE:
                await self._linger()
                return
            self._http.start_next_cycle()

    async def _linger(self) -> None:
        """Let the answer arrive: closing with unread bytes would send a reset after it."""
        await self._stream.send_eof()
        with trio.move_on_after(1):
            while await self._stream.receive_some():
                pass

    async def _event(self) -> h11.Event | None:
        """The next event; None when h11 waits for our side."""
        while True:
            event = self._http.next_event()
            if event is not h11.NEED_DATA:
                return event if isinstance(event, h11.Event) else None
            if self._http.they_are_waiting_for_100_continue:
                await self._send(h11.InformationalResponse(status_code=100, headers=[]))
            self._http.receive_data(await self._stream.receive_some())

    async def _body(self) -> bytes | _Complaint:
        body = bytearray()
        while isinstance(event := await self._event(), h11.Data):
            body += event.data
            if len(body) > MOST_BYTES:
                return _Complaint(413, f"The body is larger than {MOST_BYTES} bytes.")
        return bytes(body)

    async def _send(self, *events: h11.Event) -> None:
        await self._stream.send_all(b"".join(self._http.send(event) or b"" for event in events))

    async def _reply_json(self, value: dict[str, object]) -> None:
        await self._reply(200, json.dumps(value).encode())

    async def _reply(self, status: int, body: bytes, headers: Fields | None = None) -> None:
        fields = [("Content-Type", "application/json"), ("Content-Length", str(len(body))), *(headers or [])]
        await self._send(_head(status, fields), h11.Data(data=body), h11.EndOfMessage())

    async def _answer(self, request: h11.Request, body: bytes) -> _Complaint | None:
        method, path = request.method.decode("ascii"), request.target.decode("ascii").partition("?")[0]
        wanted = METHODS.get(path)
        if wanted is None and path.startswith("/v1/models/"):
            name = path.removeprefix("/v1/models/")
            return _Complaint(404, f"The model '{name}' does not exist.", "model_not_found", "model")
        if wanted is None:
            return _Complaint(404, f"Unknown request URL: {method} {path}.", "unknown_url")
        if method != wanted:
            text = f"{path} is asked with {wanted}, not {method}."
            return _Complaint(405, text, "method_not_supported", headers=[("Allow", wanted)])
        if wanted == "POST":
            wish = _Wish.read(body)
            if isinstance(wish, _Complaint):
                return wish
            await self._complete(wish)
            return None
        model = {"id": MODEL, "object": "model", "created": 1_700_000_000, "owned_by": "canal-trio"}
        await self._reply_json({"object": "list", "data": [model]} if path == "/v1/models" else model)
        return None

    async def _complete(self, wish: _Wish) -> None:
        """Write the haiku. The client's leaving, in whatever phase, ends the connection and with it the writing."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._watch, nursery.cancel_scope)
            if wish.stream:
                await self._stream_haiku(wish)
            else:
                await trio.sleep(self._gap * len(wish.tokens))
                await self._reply_json(wish.completion())
            nursery.cancel_scope.cancel()

    async def _stream_haiku(self, wish: _Wish) -> None:
        head = [("Content-Type", "text/event-stream; charset=utf-8"), ("Cache-Control", "no-cache")]
        await self._send(_head(200, head))
        for index, chunk in enumerate(wish.chunks()):
            if 0 < index <= len(wish.tokens):  # each token takes its time; what comes before and after takes none
                await trio.sleep(self._gap)
            await self._send(h11.Data(data=b"data: %b\n\n" % json.dumps(chunk, separators=(",", ":")).encode()))
        await self._send(h11.Data(data=b"data: [DONE]\n\n"), h11.EndOfMessage())

    async def _watch(self, scope: trio.CancelScope) -> None:
        """Read on while answering, only to see the client leave; what it sends ahead waits for its turn in h11."""
        try:
            while data := await self._stream.receive_some(4096):
                self._http.receive_data(data)
                if len(self._http.trailing_data[0]) > MOST_BYTES:
                    return
        except trio.BrokenResourceError:
            pass
        scope.cancel()


@final
@dataclass(frozen=True, slots=True)
class _Wish:
    """A chat completion that was asked for, and its answer."""

    model: str
    stream: bool
    usage: bool
    prompt_tokens: int
    tokens: tuple[str, ...] = field(default_factory=lambda: tuple(_tokens_of(random.choice(HAIKUS))))
    id: str = field(default_factory=lambda: f"chatcmpl-{secrets.token_hex(12)}")
    created: int = field(default_factory=lambda: int(time.time()))

    @classmethod
    def read(cls, body: bytes) -> _Wish | _Complaint:
        try:
            wish = json.loads(body)
        except ValueError:
            return _Complaint(400, "We could not parse the JSON body of your request.")
        if not isinstance(wish, dict):
            return _Complaint(400, "The body of your request must be a JSON object.")
        if not isinstance(wish.get("model"), str):
            return _Complaint(400, f"You must provide a model, for instance '{MODEL}'.", param="model")
        messages = wish.get("messages")
        if not isinstance(messages, list) or not messages:
            return _Complaint(400, "You must provide 'messages', a list with at least one message.", param="messages")
        options = wish.get("stream_options")
        usage = isinstance(options, dict) and options.get("include_usage") is True
        words = sum(len(str(message.get("content", "")).split()) for message in messages if isinstance(message, dict))
        return cls(wish["model"], wish.get("stream") is True, usage, words)

    def counts(self) -> dict[str, int]:
        mine = len(self.tokens)
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": mine,
            "total_tokens": self.prompt_tokens + mine,
        }

    def completion(self) -> dict[str, object]:
        message = {"role": "assistant", "content": "".join(self.tokens)}
        choices = [{"index": 0, "message": message, "finish_reason": "stop"}]
        head = {"id": self.id, "object": "chat.completion", "created": self.created, "model": self.model}
        return {**head, "choices": choices, "usage": self.counts()}

    def chunks(self) -> Iterator[dict[str, object]]:
        """The role, each token, the finish reason, and usage when it was asked for."""
        head = {"id": self.id, "object": "chat.completion.chunk", "created": self.created, "model": self.model}
        nothing = {"usage": None} if self.usage else {}
        deltas = [{"role": "assistant", "content": ""}, *({"content": token} for token in self.tokens), {}]
        for delta in deltas:
            finish = None if delta else "stop"
            yield {**head, "choices": [{"index": 0, "delta": delta, "finish_reason": finish}], **nothing}
        if self.usage:
            yield {**head, "choices": [], "usage": self.counts()}


def _head(status: int, fields: Fields) -> h11.Response:
    return h11.Response(status_code=status, headers=fields, reason=HTTPStatus(status).phrase)


def _tokens_of(text: str) -> Iterator[str]:
    """Words with the blank in front of them, as tokenisers cut; they join to the text."""
    for number, line in enumerate(text.split("\n")):
        for place, word in enumerate(line.split(" ")):
            yield (" " if place else "\n" if number else "") + word
