"""TLS on the gateway's listeners: certificates from files, chosen by name, swapped on reload; and the handshake.

Invariants: certificates are swapped as one or not at all, and a connection keeps those it began with. A handshake that
fails or stalls costs its own connection and nothing else: it ends at its deadline, is counted, and told in the log once
in a while at most. Nothing of a request is looked at before the handshake is over; who speaks plain HTTP is told so.
"""

from __future__ import annotations

import contextlib
import logging
import math
import re
import socket
import ssl
from collections.abc import Callable
from typing import final

import trio

from canal_trio.errors import CanalError, ConfigError
from canal_trio.messages import Headers, ResponseHead
from canal_trio.relay.streams import TcpStream
from canal_trio.relay.tls import TlsStream
from canal_trio.serve.authority import AUTH, authority_in
from canal_trio.serve.handshakes import Handshakes
from canal_trio.serve.listen import TELL_EVERY
from canal_trio.settings import ServerTLS
from canal_trio.wire.error_bodies import error_body
from canal_trio.wire.headers import request_id
from canal_trio.wire.heads import write_response_head

__all__ = ["Certificates", "PairFault", "Terminator", "load_authority", "load_pair"]

ALPN = ("http/1.1",)
# Forward secrecy and authenticated encryption only, which is all that TLS 1.3 has anyway; this is for 1.2.
CIPHERS = "ECDHE+AESGCM:ECDHE+CHACHA20"
FILE_BYTES = 1024 * 1024
LINGER_BYTES = 64 * 1024  # of a plain request, read and dropped so that the answer arrives

_log = logging.getLogger("canal_trio.serve")

_CERTIFICATE = re.compile(rb"-----BEGIN (?:TRUSTED |X509 )?CERTIFICATE-----")
_KEY = re.compile(rb"-----BEGIN (?:[A-Z]+ )?PRIVATE KEY-----")
_ENCRYPTED = re.compile(rb"-----BEGIN ENCRYPTED PRIVATE KEY-----|^Proc-Type: 4,ENCRYPTED", re.MULTILINE)


class PairFault(CanalError):
    """A file cannot be used. `part` is its setting ("certificate", "key", "client_ca"), the text what is wrong."""

    def __init__(self, part: str, text: str) -> None:
        super().__init__(text)
        self.part = part


def load_pair(certificate: str, key: str) -> ssl.SSLContext:
    """A server's context for the certificate chain and the private key in these PEM files.

    Blocks for the reading of two small files. Raises `PairFault`.
    """
    if not _CERTIFICATE.search(_read("certificate", certificate)):
        raise PairFault("certificate", f"expected a file with PEM certificates; '{certificate}' has none")
    secret = _read("key", key)
    if _ENCRYPTED.search(secret):
        hint = "expected a key without a passphrase, as 'openssl pkey -in OLD -out NEW' writes it"
        raise PairFault("key", f"the key in '{key}' is encrypted; {hint}")
    if not _KEY.search(secret):
        raise PairFault("key", f"expected a file with a PEM private key; '{key}' has none")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.options |= ssl.OP_NO_RENEGOTIATION
    context.set_ciphers(CIPHERS)
    context.set_alpn_protocols(list(ALPN))
    try:
        # The passphrase is never asked for on a terminal, whatever kind of encryption was not seen above.
        context.load_cert_chain(certificate, key, password=lambda: b"")
    except ssl.SSLError as exc:
        raise _fault(exc, certificate, key) from None
    except (OSError, ValueError) as exc:  # it went away just now
        raise PairFault("certificate", f"cannot read '{certificate}' or '{key}': {exc}") from None
    return context


def load_authority(path: str) -> str:
    """The certificates of those whose clients are believed, from a PEM file. Blocks for reading it; `PairFault`."""
    try:
        return authority_in(_read("client_ca", path))
    except ValueError as exc:
        raise PairFault("client_ca", f"expected a file with an authority's certificates; of '{path}': {exc}") from None


def _read(part: str, path: str) -> bytes:
    try:
        with open(path, "rb") as file:
            data = file.read(FILE_BYTES + 1)
    except (OSError, ValueError) as exc:  # ValueError: a NUL in the name
        raise PairFault(part, f"cannot read '{path}': {getattr(exc, 'strerror', None) or exc}") from None
    if len(data) > FILE_BYTES:
        raise PairFault(part, f"'{path}' is larger than {FILE_BYTES} bytes: expected a PEM file")
    return data


def _fault(exc: ssl.SSLError, certificate: str, key: str) -> PairFault:
    reason = (exc.reason or str(exc)).replace("_", " ").lower()
    if exc.reason in ("KEY_VALUES_MISMATCH", "KEY_TYPE_MISMATCH"):
        text = f"expected the key of the first certificate in '{certificate}'; '{key}' holds another one"
        return PairFault("key", text)
    if exc.reason in ("EE_KEY_TOO_SMALL", "CA_KEY_TOO_SMALL", "CA_MD_TOO_WEAK"):
        return PairFault("certificate", f"'{certificate}' is too weak to be used: {reason}")
    return PairFault("certificate", f"'{certificate}' and '{key}' cannot be used: {reason}")


@final
class Certificates:
    """The contexts of one `[server.tls]`: the default one, and further ones by the name that a client asks for.

    Blocks while it reads the files. Raises `ConfigError` for one that cannot be used.
    """

    def __init__(self, tls: ServerTLS) -> None:
        self._by_name: dict[str, ssl.SSLContext] = {}
        self._auth = AUTH[tls.client_auth]
        try:
            self._authority = None if tls.client_ca is None else load_authority(tls.client_ca)
        except PairFault as exc:
            raise ConfigError(f"server.tls.client_ca: {exc}") from None
        self.default = self._loaded("server.tls", tls.certificate, tls.key)
        for number, further in enumerate(tls.sni):
            context = self._loaded(f"server.tls.sni[{number}]", further.certificate, further.key)
            self._by_name |= dict.fromkeys(further.names, context)
        if self._by_name:
            self.default.sni_callback = self._choose

    def _choose(self, connection: ssl.SSLObject, name: str | None, _context: ssl.SSLContext) -> None:
        """OpenSSL's question in the middle of a handshake; an unknown name gets the default certificate."""
        context = self.named(name)
        if context is not self.default:
            connection.context = context

    def named(self, name: str | None) -> ssl.SSLContext:
        """The context for `name`: its own, that of its wildcard (one label), or the default one."""
        wanted = (name or "").lower().removesuffix(".")
        wildcard = f"*.{wanted.partition('.')[2]}"
        return self._by_name.get(wanted) or self._by_name.get(wildcard) or self.default

    def _loaded(self, place: str, certificate: str, key: str) -> ssl.SSLContext:
        """One context. Of clients all of them ask the same: a session begun under one name opens no other door."""
        try:
            context = load_pair(certificate, key)
        except PairFault as exc:
            raise ConfigError(f"{place}.{exc.part}: {exc}") from None
        if self._authority is not None:
            context.load_verify_locations(cadata=self._authority)
            context.verify_mode = self._auth
        return context


@final
class Terminator:
    """Shakes hands with clients, with the `certificates` of now. `count(result)` is called once per connection.

    Results: ok, failed (no agreement), timeout, left (the client closed or reset it), plain (no TLS but HTTP).
    """

    def __init__(self, certificates: Certificates, count: Callable[[str], None], most: int = 512) -> None:
        self.certificates = certificates
        self.handshakes = Handshakes(most)
        self._count = count
        self._scopes: set[trio.CancelScope] = set()
        self._most = math.inf
        self._tell_at = -TELL_EVERY
        self._untold = 0

    def hurry(self, limit: float) -> None:
        """From now on no handshake takes longer than `limit` seconds, those that have begun included."""
        self._most = limit
        for scope in self._scopes:
            scope.deadline = min(scope.deadline, trio.current_time() + limit)

    async def secure(self, stream: TcpStream, peer: str, *, limit: float, linger: float) -> TlsStream | None:
        """`stream` inside of TLS, within `limit` seconds; None if there is no TLS to be had, and `stream` is closed.

        `linger` is the time that an answer in plain HTTP may take. A checkpoint. Cancelled, the stream is closed.
        """
        result, secured = "timeout", None
        scope = trio.CancelScope(deadline=trio.current_time() + min(limit, self._most))
        self._scopes.add(scope)
        try:
            with scope:
                result, secured = await self._shake(stream, peer, scope)
            self._count(result)
            if result == "plain":
                with trio.move_on_after(linger), contextlib.suppress(trio.BrokenResourceError):
                    await _answer_plainly(stream)
        finally:
            self._scopes.discard(scope)
            if secured is None:
                stream.close()
        return secured

    async def _shake(self, stream: TcpStream, peer: str, scope: trio.CancelScope) -> tuple[str, TlsStream | None]:
        try:
            first = await _first_byte(stream)
        except OSError:
            return "left", None
        if not first:
            return "left", None
        if first.isalpha():  # no record of TLS begins with a letter, every method does
            return "plain", None
        await self.handshakes.begin(scope)
        try:
            secured = TlsStream(stream, self.certificates.default, server_side=True)
            await secured.do_handshake()
        except trio.ClosedResourceError:
            return "left", None
        except trio.BrokenResourceError as exc:
            cause = exc.__cause__
            if not isinstance(cause, ssl.SSLError) or isinstance(cause, ssl.SSLEOFError):
                return "left", None
            self._failed(peer, (cause.reason or str(cause)).replace("_", " ").lower())
            return "failed", None
        finally:
            self.handshakes.end(scope)
        return "ok", secured

    def _failed(self, peer: str, reason: str) -> None:
        """Every scanner of the internet causes this: a line now and then says enough."""
        self._untold += 1
        now = trio.current_time()
        if now >= self._tell_at:
            _log.info("no TLS with %s: %s (%d times since the last such line)", peer, reason, self._untold)
            self._tell_at = now + TELL_EVERY
            self._untold = 0


async def _first_byte(stream: TcpStream) -> bytes:
    """The first byte of `stream`, which stays there; empty at its end. Raises OSError."""
    while True:
        try:
            return stream.socket.recv(1, socket.MSG_PEEK)
        except BlockingIOError:
            # Once per connection, before anything else is done with it: Trio's own epoll serves.
            await trio.lowlevel.wait_readable(stream.socket)


async def _answer_plainly(stream: TcpStream) -> None:
    """400, in plain HTTP, then close so that it arrives. Raises `trio.BrokenResourceError`."""
    message = "This port speaks TLS: the URL has to begin with https://."
    body = error_body(message, "invalid_request_error", "tls_required")
    fields = [
        (b"content-type", b"application/json"),
        (b"content-length", b"%d" % len(body)),
        (b"x-request-id", request_id(Headers())),
        (b"connection", b"close"),
    ]
    await stream.send_all(write_response_head(ResponseHead(400, Headers(fields), b"Bad Request")) + body)
    await stream.send_eof()
    dropped = 0
    while dropped < LINGER_BYTES and (data := await stream.receive_some()):
        dropped += len(data)
