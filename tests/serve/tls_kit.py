"""Certificates in files, a gateway that serves TLS in this process, and clients that insist on a proper end."""

from __future__ import annotations

import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import trio
import trustme
from serve_fakes import Running, serving, settings

from canal_trio.gateway import Gateway
from canal_trio.hooks import ExchangeRecord
from canal_trio.settings import ServerTLS, Upstream
from canal_trio.testing.scripts import Script
from canal_trio.testing.upstreams import ScriptedUpstream

CHAT = b'{"model": "m", "stream": true, "messages": []}'


class Authority:
    """Issues certificates into a folder, each a pair of files named after it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._ca = trustme.CA()
        self.ca_file = str(folder / "ca.pem")
        self._ca.cert_pem.write_to_path(self.ca_file)
        self.client = ssl.create_default_context(cafile=self.ca_file)
        self.client.options &= ~ssl.OP_IGNORE_UNEXPECTED_EOF  # Python sets it with OpenSSL 3

    def issue(self, name: str, *hosts: str) -> ServerTLS:
        """A certificate for `hosts`, in `NAME.pem` and `NAME.key`."""
        leaf = self._ca.issue_cert(*(hosts or ("localhost", "127.0.0.1")))
        certificate, key = self.folder / f"{name}.pem", self.folder / f"{name}.key"
        certificate.write_bytes(b"".join(blob.bytes() for blob in leaf.cert_chain_pems))
        key.write_bytes(leaf.private_key_pem.bytes())
        return ServerTLS(str(certificate), str(key))


class Records(list[ExchangeRecord]):
    """A recorder."""

    finished = list.append


class Front(Running):
    """A gateway behind TLS."""

    authority: Authority
    records: Records

    async def secure(
        self, *, name: str = "localhost", context: ssl.SSLContext | None = None, small: bool = False
    ) -> trio.SSLStream[trio.SocketStream]:
        """A client that has shaken hands and takes a bare FIN for a cut."""
        raw = await self.connect()
        if small:
            raw.setsockopt(trio.socket.SOL_SOCKET, trio.socket.SO_RCVBUF, 32_768)
        stream = trio.SSLStream(raw, context or self.authority.client, server_hostname=name, https_compatible=False)
        await stream.do_handshake()
        return stream

    async def metric(self, name: str) -> float:
        """A sample of the metrics page; 0 if it is not there."""
        for line in (await self.page("/metrics"))[1].decode().splitlines():
            if line.startswith(f"{name} "):
                return float(line.rpartition(" ")[2])
        return 0.0

    async def shaken(self, result: str) -> float:
        """How many handshakes ended so."""
        return await self.metric(f'canal_tls_handshakes_total{{result="{result}"}}')


@asynccontextmanager
async def fronting(
    authority: Authority, script: Script, *, tls: ServerTLS | None = None, loader: Any = None, **changes: Any
) -> AsyncIterator[tuple[ScriptedUpstream, Front]]:
    """A gateway behind TLS, before a scripted upstream."""
    records = Records()
    async with ScriptedUpstream(script) as upstream:
        chosen = settings(tls=tls or authority.issue("default"), upstreams=(Upstream("up", upstream.url),), **changes)
        async with serving(
            chosen,
            make_gateway=lambda chosen, recorders: Gateway(chosen, recorders=[*recorders, records]),
            config_loader=(lambda: loader(chosen)) if loader is not None else None,
        ) as server:
            server.__class__ = Front
            assert isinstance(server, Front)
            server.authority, server.records = authority, records
            yield upstream, server


def ask(version: str = "1.1", *fields: str, body: bytes = CHAT) -> bytes:
    """A chat completion request."""
    head = [f"POST /v1/chat/completions HTTP/{version}", "Host: localhost", f"Content-Length: {len(body)}", *fields]
    return "\r\n".join([*head, "", ""]).encode() + body


async def until(stream: trio.abc.ReceiveStream, mark: bytes) -> bytes:
    """Bytes until `mark` has come."""
    data, looked_at = bytearray(), 0
    while data.find(mark, looked_at) < 0:
        looked_at = max(0, len(data) - len(mark))
        piece = await stream.receive_some()
        assert piece, f"ended before {mark!r}: {bytes(data[-1000:])!r}"
        data += piece
    return bytes(data)


async def rest(stream: trio.abc.ReceiveStream) -> bytes:
    """Everything up to a proper end; raises `trio.BrokenResourceError` on a cut."""
    data = b""
    while piece := await stream.receive_some():
        data += piece
    return data
