"""`canal-trio demo`: the first thing a new user sees.

Starts the demo upstream and the real gateway in front of it, and prints the `curl` line to try it with; Ctrl-C drains.
With `once` it sends that very request itself, shows the stream as it comes, and judges it: the exit code is an
honest test of the whole way.
"""

from __future__ import annotations

import codecs
import contextlib
import json
import shlex
import shutil
import socket
import subprocess
import sys
import urllib.request
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TextIO, final

import h11
import trio

from canal_trio.demo_upstream import MODEL, serve_demo_upstream
from canal_trio.serve.limits import raise_descriptor_limit
from canal_trio.serve.run import Served, serve
from canal_trio.settings import Settings, Upstream

__all__ = ["run_demo"]

PORT = 8080
ONCE_SECONDS = 60.0  # what the whole request of `once` may take

BODY = {"model": MODEL, "messages": [{"role": "user", "content": "Stream a haiku."}], "stream": True}
HEADERS = (("Content-Type", "application/json"), ("Authorization", "Bearer any-key-will-do"))


async def run_demo(once: bool = False, *, port: int = PORT, out: TextIO | None = None) -> int:
    """Run the demo until SIGINT or SIGTERM, or with `once` for one request; the exit code (0: all is well).

    Listens on 127.0.0.1, on `port` if that is free and else on another one. What is meant for people to copy goes to
    `out` (standard output); the gateway logs to standard error. Main thread only. Raises BrokenPipeError when nobody
    reads `out` any more.
    """
    unread = False
    code = 1
    try:
        code = await _run(once, port, out or sys.stdout)
    except* BrokenPipeError:
        unread = True
    if unread:
        raise BrokenPipeError("nobody reads the demo's output")  # by itself, not in the group of a nursery
    return code


async def _run(once: bool, port: int, out: TextIO) -> int:
    show = partial(print, file=out, flush=True)
    code = 0
    async with trio.open_nursery() as nursery:
        upstream: str = await nursery.start(serve_demo_upstream)
        address = ("127.0.0.1", port if _is_free(port) else 0)

        async def gateway(task_status: trio.TaskStatus[Served]) -> None:
            nonlocal code
            settings = Settings(listen=(address,), admin=None, upstreams=(Upstream("demo", upstream),))
            code = await serve(settings, descriptors=raise_descriptor_limit(), task_status=task_status)
            if not once:
                nursery.cancel_scope.cancel()

        served: Served = await nursery.start(gateway)
        base = f"http://127.0.0.1:{served.listen[0][1]}/v1"
        if address[1] == 0:
            show(f"Port {port} is taken, so the demo uses another one.")
        if once:
            code = await _once(base, out)
            nursery.cancel_scope.cancel()
        else:
            show(_welcome(base))
    return code


def _is_free(port: int) -> bool:
    with socket.socket() as probe, contextlib.suppress(OSError):
        # As the gateway will: without it, connections of a demo that just ended would count as a taken port.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        probe.bind(("127.0.0.1", port))
        return True
    return False


def _curl(base: str) -> list[str]:
    """The request of OpenAI's streaming guide, as an argument vector."""
    fields = [part for name, value in HEADERS for part in ("-H", f"{name}: {value}")]
    proxied = "http" in urllib.request.getproxies() and not urllib.request.proxy_bypass("127.0.0.1")
    # A proxy named by the environment would be asked for our loopback, and refuse.
    bypass = ["--noproxy", "127.0.0.1"] if proxied else []
    return ["curl", "-N", *bypass, f"{base}/chat/completions", *fields, "-d", json.dumps(BODY)]


def _welcome(base: str) -> str:
    return f"""
A gateway with a demo upstream behind it is running. Paste this into another terminal:

{shlex.join(_curl(base))}

Or point any OpenAI SDK at it: base_url={base} and any key. Leave in the middle: the upstream stops at once.
Ctrl-C drains and ends it.
"""


async def _once(base: str, out: TextIO) -> int:
    """Send the request with curl, or ourselves where there is none; 0 if the stream was what it has to be."""
    argv, judge = _curl(base), _Judge(out)
    trouble: str | None = f"nothing ended within {ONCE_SECONDS:g} s"
    with trio.move_on_after(ONCE_SECONDS):
        if shutil.which("curl"):
            print(f"\n$ {shlex.join(argv)}\n", file=out, flush=True)
            trouble = await _run_curl(argv, judge.feed)
        else:
            print("\nThere is no curl on this machine. The same request, sent by this program:\n", file=out)
            trouble = await _ask(base, out, judge.feed)
    trouble = trouble or judge.complaint()
    if trouble:
        print(f"\nThe demo failed: {trouble}.", file=sys.stderr, flush=True)
        return 1
    print(judge.summary(), file=out, flush=True)
    return 0


async def _run_curl(argv: Sequence[str], feed: Callable[[bytes], None]) -> str | None:
    """Run it and feed its output as it comes. What went wrong, or None."""
    async with trio.open_nursery() as nursery:
        # Its standard error would draw a progress meter, because its output is a pipe; only its complaint matters.
        run = partial(trio.run_process, argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, check=False)
        process: trio.Process = await nursery.start(run)
        assert process.stdout is not None
        assert process.stderr is not None
        told = bytearray()
        nursery.start_soon(_collect, process.stderr, told.extend)
        await _collect(process.stdout, feed)
        code = await process.wait()
    if code == 0:
        return None
    last = told.decode(errors="replace").strip().splitlines()[-1:]
    return ": ".join([f"curl ended with exit code {code}", *last])


async def _collect(stream: trio.abc.ReceiveStream, feed: Callable[[bytes], None]) -> None:
    while data := await stream.receive_some():
        feed(bytes(data))


async def _ask(base: str, out: TextIO, feed: Callable[[bytes], None]) -> str | None:
    """Send the request without curl: print it, feed the body of the answer. What went wrong, or None."""
    authority, _, path = base.removeprefix("http://").partition("/")
    host, _, port = authority.partition(":")
    content = json.dumps(BODY).encode()
    fields = [("Host", authority), *HEADERS, ("Content-Length", str(len(content)))]
    http = h11.Connection(h11.CLIENT)
    head = http.send(h11.Request(method="POST", target=f"/{path}/chat/completions", headers=fields))
    data = (head or b"") + (http.send(h11.Data(data=content)) or b"")
    http.send(h11.EndOfMessage())
    print(data.decode().replace("\r\n", "\n"), end="\n\n", file=out, flush=True)
    try:
        async with await trio.open_tcp_stream(host, int(port)) as stream:
            await stream.send_all(data)
            while not isinstance(event := http.next_event(), h11.EndOfMessage):
                if event is h11.NEED_DATA:
                    http.receive_data(await stream.receive_some())
                elif isinstance(event, h11.Response) and event.status_code != 200:
                    return f"the gateway answered {event.status_code}"
                elif isinstance(event, h11.Data):
                    feed(bytes(event.data))
    except (OSError, trio.BrokenResourceError, h11.RemoteProtocolError) as error:
        return f"the stream broke: {error}"
    return None


@final
@dataclass(slots=True)
class _Judge:
    """Shows a stream as it comes and says afterwards whether it was one."""

    out: TextIO
    body: bytearray = field(default_factory=bytearray)
    arrivals: list[float] = field(default_factory=list)
    started: float = field(default_factory=trio.current_time)
    decoder: codecs.IncrementalDecoder = field(
        default_factory=partial(codecs.getincrementaldecoder("utf-8"), "replace")
    )

    def feed(self, data: bytes) -> None:
        self.body += data
        self.arrivals.append(trio.current_time())
        self.out.write(self.decoder.decode(data))
        self.out.flush()

    def complaint(self) -> str | None:
        """What is wrong with it, or None."""
        if not self.body.endswith(b"data: [DONE]\n\n"):
            return "the stream did not end with [DONE]"
        if self.body.count(b'"finish_reason":"stop"') != 1:
            return "the answer was not finished"
        if len(self.arrivals) < 3:
            return "the answer came in one lump, it was not streamed"
        return None

    def summary(self) -> str:
        """The text that was streamed, and how."""
        events = [line.removeprefix("data: ") for line in self.body.decode().split("\n\n")[:-2]]
        text = "".join(json.loads(event)["choices"][0]["delta"].get("content", "") for event in events)
        first, last = self.arrivals[0] - self.started, self.arrivals[-1] - self.started
        return f"{text}\n\n({len(events)} events over {last - first:.2f} s, the first after {first * 1000:.0f} ms)"
