"""Through a forward proxy: HTTP CONNECT (RFC 9110 9.3.6) and SOCKS5 (RFC 1928, 1929).

What comes out is the same TCP stream, with the upstream at its far end, so that everything above works as without a
proxy. A plain `http` upstream behind an HTTP proxy needs no tunnel: its requests are sent in absolute-form
(`forward.ForwardedConnection`).

Invariants: exactly the proxy's own bytes are consumed; bytes that come before they can be meant for us are a fault. A
stream that failed, or was cancelled, is closed. Credentials never enter a text.
"""

from __future__ import annotations

import base64
import ipaddress
from dataclasses import dataclass, field
from urllib.parse import unquote_to_bytes, urlsplit

import trio

from canal_trio.errors import CanalError, Failure, Kind, Phase, Retry, Side
from canal_trio.messages import Headers, RequestHead
from canal_trio.relay.streams import TcpStream
from canal_trio.wire.heads import ResponseHeadReader, write_request_head
from canal_trio.wire.targets import BaseUrl

__all__ = ["Proxy", "open_tunnel", "parse_proxy"]

_HEAD_BYTES, _HEAD_FIELDS = 16_384, 100  # of a proxy's answer to CONNECT
_REPLIES = {
    1: "general failure",
    2: "not allowed by its rules",
    3: "network unreachable",
    4: "host unreachable",
    5: "connection refused",
    6: "time to live expired",
    7: "command not supported",
    8: "address type not supported",
}  # RFC 1928 6


@dataclass(frozen=True, slots=True)
class Proxy:
    """Where a proxy listens and who we are to it."""

    scheme: str  # "http" or "socks5"
    host: str
    port: int
    user: bytes | None = field(default=None, repr=False)
    password: bytes = field(default=b"", repr=False)

    @property
    def name(self) -> str:
        """What a person may read: no credentials."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{self.scheme}://{host}:{self.port}"

    @property
    def authorization(self) -> bytes | None:
        """The value of Proxy-Authorization (RFC 7617); None without credentials."""
        if self.user is None:
            return None
        return b"Basic " + base64.b64encode(self.user + b":" + self.password)

    def forwards(self, base: BaseUrl) -> bool:
        """Does it take absolute-form requests for `base`, so that no tunnel is needed?"""
        return self.scheme == "http" and base.scheme == "http"


def parse_proxy(text: str) -> Proxy:
    """`http://…` or `socks5://…`, perhaps with a percent-encoded user and password. Raises CanalError: it was checked
    when the configuration was read."""
    parts = urlsplit(text)
    if parts.scheme not in ("http", "socks5") or not parts.hostname or not parts.port:
        raise CanalError("a proxy is http://HOST:PORT or socks5://HOST:PORT")
    user = unquote_to_bytes(parts.username) if parts.username is not None else None
    return Proxy(parts.scheme, parts.hostname, parts.port, user, unquote_to_bytes(parts.password or ""))


async def open_tunnel(stream: TcpStream, proxy: Proxy, base: BaseUrl) -> TcpStream | Failure:
    """Have `proxy`, at the other end of `stream`, connect us to `base`. Failed or cancelled, the stream is closed.

    A checkpoint, without a deadline of its own.
    """
    opener = _connect if proxy.scheme == "http" else _socks
    try:
        failure = await opener(stream, proxy, base)
    except (trio.BrokenResourceError, trio.ClosedResourceError) as exc:
        failure = _failure(Kind.REFUSED, proxy, str(exc))
    except BaseException:
        stream.close()
        raise
    if failure is None:
        return stream
    stream.close()
    return failure


def _failure(kind: Kind, proxy: Proxy, reason: str) -> Failure:
    """Nothing of the request was sent, whatever the proxy has against us."""
    return Failure(Side.UPSTREAM, Phase.DIAL, kind, f"The proxy {proxy.name}: {reason}.", Retry.UNSENT)


# -- HTTP CONNECT ------------------------------------------------------------------------------------------------------


async def _connect(stream: TcpStream, proxy: Proxy, base: BaseUrl) -> Failure | None:
    host = f"[{base.host}]" if ":" in base.host else base.host
    target = f"{host}:{base.port}".encode("ascii")
    fields = [(b"Host", target)]
    if proxy.authorization is not None:
        fields.append((b"Proxy-Authorization", proxy.authorization))
    await stream.send_all(write_request_head(RequestHead(b"CONNECT", target, Headers(fields))))
    reader = ResponseHeadReader(head_bytes=_HEAD_BYTES, head_fields=_HEAD_FIELDS)
    verdict = None
    while verdict is None or (not isinstance(verdict, Failure) and verdict.informational):
        rest = reader.rest() if verdict is not None else b""
        data = rest or await stream.receive_some()
        if not data:
            return _failure(Kind.REFUSED, proxy, "it closed the connection instead of an answer to CONNECT")
        verdict = reader.feed(data)
    if isinstance(verdict, Failure):
        return _failure(Kind.MALFORMED, proxy, "its answer to CONNECT is not valid HTTP")
    if not 200 <= verdict.status < 300:
        reason = verdict.reason.decode("ascii", "replace")
        return _failure(Kind.REFUSED, proxy, f"it answered {verdict.status} {reason}".rstrip())
    if reader.rest():
        return _failure(Kind.MALFORMED, proxy, "it sent bytes before the upstream was asked anything")
    return None


# -- SOCKS5 ------------------------------------------------------------------------------------------------------------


async def _socks(stream: TcpStream, proxy: Proxy, base: BaseUrl) -> Failure | None:
    refusal = await _socks_greet(stream, proxy)
    if refusal is not None:
        return refusal
    address = _socks_address(base.host)
    if address is None:
        return _failure(Kind.DNS, proxy, "the upstream's host name is longer than SOCKS5 can say")
    await stream.send_all(b"\x05\x01\x00" + address + base.port.to_bytes(2, "big"))
    version, code, _, kind = await _exactly(stream, 4)
    if version != 5:
        return _failure(Kind.MALFORMED, proxy, "it does not speak SOCKS5")
    if code != 0:
        return _failure(Kind.REFUSED, proxy, f"it could not connect: {_REPLIES.get(code, f'code {code}')}")
    if kind == 3:
        length = (await _exactly(stream, 1))[0]
    elif kind in (1, 4):
        length = 4 if kind == 1 else 16
    else:
        return _failure(Kind.MALFORMED, proxy, "its SOCKS5 answer has an unknown address type")
    await _exactly(stream, length + 2)  # where it connected from: of no use
    return None


async def _socks_greet(stream: TcpStream, proxy: Proxy) -> Failure | None:
    """Agree on how we authenticate, and do."""
    wanted = 0 if proxy.user is None else 2
    await stream.send_all(bytes((5, 1, wanted)))
    version, method = await _exactly(stream, 2)
    if version != 5:
        return _failure(Kind.MALFORMED, proxy, "it does not speak SOCKS5")
    if method != wanted:
        needs = "it wants other credentials" if proxy.user is not None else "it wants a user and a password"
        return _failure(Kind.REFUSED, proxy, needs)
    if proxy.user is None:
        return None
    if len(proxy.user) > 255 or len(proxy.password) > 255:
        return _failure(Kind.REFUSED, proxy, "the user or the password is longer than SOCKS5 can say")
    user, password = proxy.user, proxy.password
    await stream.send_all(b"\x01" + bytes((len(user),)) + user + bytes((len(password),)) + password)
    _, status = await _exactly(stream, 2)
    if status != 0:
        return _failure(Kind.REFUSED, proxy, "it does not accept the user and password")
    return None


def _socks_address(host: str) -> bytes | None:
    """A name goes as it is: the proxy resolves it, we may not even be able to."""
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        name = host.encode("ascii")
        return b"\x03" + bytes((len(name),)) + name if len(name) <= 255 else None
    return (b"\x01" if address.version == 4 else b"\x04") + address.packed


async def _exactly(stream: TcpStream, size: int) -> bytes:
    """This many bytes and not one more. Raises `trio.BrokenResourceError` if the stream ends before."""
    data = b""
    while len(data) < size:
        piece = await stream.receive_some(size - len(data))
        if not piece:
            raise trio.BrokenResourceError("it closed the connection during the SOCKS5 handshake")
        data += piece
    return data
