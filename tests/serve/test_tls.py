"""TLS on the listeners: real sockets, real handshakes, real certificates; the gateway is the real one."""

from __future__ import annotations

import dataclasses
import signal
import ssl
from pathlib import Path

import pytest
import trio
from serve_fakes import eventually, read_all
from tls_kit import Authority, ask, fronting, rest, until

from canal_trio.errors import ConfigError
from canal_trio.hooks import Outcome
from canal_trio.serve import serve
from canal_trio.serve.tls import Certificates
from canal_trio.settings import Bounds, Deadlines, NamedCertificate, ServerTLS, Settings
from canal_trio.testing.scripts import Cut, Echo, Script, Send, Stall, WaitFor, chat_stream, cut_after, reply, stream


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    """Whom the clients trust."""
    return Authority(tmp_path)


# -- exchanges ---------------------------------------------------------------------------------------------------------


async def test_a_stream_inside_tls_goes_straight_through(authority: Authority) -> None:
    """Byte for byte, handed over, kept alive, and the upstream hears that it was https."""
    script = chat_stream(10, gap=0.01)
    async with fronting(authority, script) as (upstream, server):
        client = await server.secure()
        for _ in range(2):
            await client.send_all(ask())
            answer = await until(client, b"0\r\n\r\n")
            assert answer.startswith(b"HTTP/1.1 200 ")
            assert b"data: [DONE]" in answer
        await eventually(lambda: len(server.records) == 2)
        for record in server.records:
            assert record.outcome is Outcome.COMPLETED
            assert record.handed_over > 0
        assert upstream.requests[0].header("x-forwarded-proto") == "https"
        assert f"\nlistening on https://127.0.0.1:{server.address[1]}\n" in await server.logged("listening on")
        assert await server.shaken("ok") == 1


async def test_a_whole_answer_ends_with_close_notify(authority: Authority) -> None:
    """`connection: close` and HTTP/1.0: the end is said inside of TLS."""
    async with fronting(authority, chat_stream(3)) as (_, server):
        for request in (ask("1.1", "Connection: close"), ask("1.0")):
            client = await server.secure()
            await client.send_all(request)
            assert b"data: [DONE]" in await rest(client)


@pytest.mark.parametrize("version", ["1.0", "1.1"])
async def test_a_cut_is_no_clean_end_inside_tls(authority: Authority, version: str) -> None:
    """What the upstream cut must not end with close_notify: to HTTP/1.0 it would look whole."""
    async with fronting(authority, cut_after(chat_stream(5, gap=0.01), 2, Cut())) as (_, server):
        client = await server.secure()
        await client.send_all(ask(version))
        with pytest.raises(trio.BrokenResourceError):
            await rest(client)
        await eventually(lambda: server.records)
        assert server.records[0].outcome is Outcome.UPSTREAM_FAILED


@pytest.mark.parametrize("polite", [True, False], ids=["close_notify", "bare"])
async def test_a_client_that_leaves_closes_the_upstream(authority: Authority, polite: bool) -> None:
    """With or without close_notify, in the middle of a stream."""
    async with fronting(authority, cut_after(chat_stream(5), 2, Stall())) as (upstream, server):
        client = await server.secure()
        await client.send_all(ask())
        await until(client, b"word1")
        if polite:
            await client.aclose()
        else:
            client.transport_stream.socket.close()
        await upstream.until(lambda: upstream.connections[0].left is not None)
        await eventually(lambda: server.records)
        assert server.records[0].outcome is Outcome.CLIENT_GONE
        assert server.records[0].cancel_latency is not None


async def test_a_slow_client_gets_every_byte(authority: Authority) -> None:
    """It reads nothing while the kernel's buffers fill, then goes on: the upstream waited, nothing is lost."""
    pieces = [b"data: %06d %s\n\n" % (number, b"x" * 4000) for number in range(2000)]
    script = stream(pieces)
    async with fronting(authority, script) as (upstream, server):
        client = await server.secure(small=True)
        await client.send_all(ask())
        await until(client, b"data: 000000")
        await trio.testing.wait_all_tasks_blocked(0.1)
        assert not upstream.requests[0].answered, "the upstream was not stopped"
        answer = await until(client, b"0\r\n\r\n")
        assert b"data: 001999" in answer
        await eventually(lambda: server.records)
        record = server.records[0]
        assert (record.outcome, record.response_bytes) == (Outcome.COMPLETED, sum(map(len, pieces)))
        assert record.queued > 0


async def test_an_upload_inside_tls(authority: Authority) -> None:
    """Megabytes up, byte for byte."""
    async with fronting(authority, reply({"ok": True})) as (upstream, server):
        client = await server.secure()
        body = bytes(range(256)) * 8000
        async with trio.open_nursery() as nursery:
            nursery.start_soon(client.send_all, ask(body=body))
            assert (await until(client, b"}")).startswith(b"HTTP/1.1 200")
        assert upstream.requests[0].body == body


async def test_a_tunnel_inside_tls(authority: Authority) -> None:
    """After 101 bytes go both ways; close_notify from the client ends its direction, and with it the tunnel."""
    switch = b"HTTP/1.1 101 Switching Protocols\r\nConnection: upgrade\r\nUpgrade: websocket\r\n\r\n"
    async with fronting(authority, Script((Send(switch), Echo()))) as (upstream, server):
        client = await server.secure()
        await client.send_all(
            b"GET /v1/realtime HTTP/1.1\r\nHost: a\r\nConnection: upgrade\r\nUpgrade: websocket\r\n\r\n"
        )
        await until(client, b"\r\n\r\n")
        for word in (b"one", b"x" * 100_000 + b"two"):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(client.send_all, word)
                assert await until(client, word[-3:]) == word
        await client.aclose()
        await upstream.until(lambda: upstream.connections[0].left is not None)
        await eventually(lambda: server.records)
        assert server.records[0].status == 101


# -- handshakes --------------------------------------------------------------------------------------------------------


async def test_a_stalled_handshake_costs_its_own_connection(authority: Authority) -> None:
    """Silent, or stuck in the middle: closed at the deadline and counted, while others are served."""
    async with fronting(authority, chat_stream(2), deadlines=Deadlines(tls_handshake=0.3)) as (_, server):
        silent, stuck = await server.connect(), await server.connect()
        await stuck.send_all(b"\x16\x03\x01\x02\x00\x01")
        client = await server.secure()
        await client.send_all(ask())
        assert b"[DONE]" in await until(client, b"0\r\n\r\n")
        assert await read_all(silent) == b""
        assert await read_all(stuck) == b""
        assert await server.shaken("timeout") == 2
        assert await server.shaken("ok") == 1
        assert "Traceback" not in server.log()


async def test_plain_http_is_told_to_use_https(authority: Authority) -> None:
    """A 400 in plain HTTP, in OpenAI's shape, whole, then the end; counted, no exchange."""
    async with fronting(authority, chat_stream(2)) as (upstream, server):
        plain = await server.connect()
        await plain.send_all(ask())
        answer = await rest(plain)
        head, _, body = answer.partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 400 Bad Request\r\n")
        assert b"\r\nx-request-id: req_" in head
        assert b"\r\nconnection: close" in head
        assert b'"code":"tls_required"' in body
        assert len(body) == int(head.partition(b"content-length: ")[2].split()[0])
        assert await server.shaken("plain") == 1
        assert upstream.connections == []


async def test_clients_without_tls_made_a_line_each(authority: Authority) -> None:
    """Garbage, those with whom nothing is agreed on, those who leave: each is counted, one line in the log in all."""
    async with fronting(authority, chat_stream(2)) as (_, server):
        for _ in range(5):
            garbage = await server.connect()
            await garbage.send_all(b"\x16\x03\x01\x00\x05hello")
            await read_all(garbage)
            await garbage.aclose()
        stranger = ssl.create_default_context(cafile=authority.ca_file)
        stranger.maximum_version = ssl.TLSVersion.TLSv1_2
        stranger.set_ciphers("AES128-SHA")
        with pytest.raises(trio.BrokenResourceError):
            await server.secure(context=stranger)
        for _ in range(3):
            await (await server.connect()).aclose()
        half = await server.connect()
        await half.send_all(b"\x16\x03\x01\x02\x00\x01")
        await half.aclose()
        with trio.fail_after(10):
            while (await server.shaken("failed"), await server.shaken("left")) != (6, 4):  # noqa: ASYNC110  # a page
                await trio.sleep(0.01)
        log = await server.logged("no TLS with")
        assert log.count("no TLS with 127.0.0.1: ") == 1
        assert "Traceback" not in log


async def test_old_versions_and_weak_ciphers_are_refused(authority: Authority) -> None:
    """TLS 1.2 with forward secrecy at least; ALPN is http/1.1."""
    async with fronting(authority, chat_stream(1)) as (_, server):
        for offered, agreed in ((["h2", "http/1.1"], "http/1.1"), (["h2"], None), ([], None)):
            context = ssl.create_default_context(cafile=authority.ca_file)
            if offered:
                context.set_alpn_protocols(offered)
            client = await server.secure(context=context)
            assert client.selected_alpn_protocol() == agreed
            assert client.version() == "TLSv1.3"
        two = ssl.create_default_context(cafile=authority.ca_file)
        two.maximum_version = ssl.TLSVersion.TLSv1_2
        client = await server.secure(context=two)
        assert client.version() == "TLSv1.2"
        assert client.cipher()[0].startswith("ECDHE-")
        two.set_ciphers("AES128-SHA:AES256-GCM-SHA384")
        with pytest.raises(trio.BrokenResourceError):
            await server.secure(context=two)


# -- names -------------------------------------------------------------------------------------------------------------


def subject(stream: trio.SSLStream[trio.SocketStream]) -> set[str]:
    """The names in the certificate that the server showed."""
    return {value for _, value in stream.getpeercert()["subjectAltName"]}


async def test_the_certificate_is_chosen_by_name(authority: Authority) -> None:
    """A name's own, its wildcard's (one label), else the default one; ALPN with each of them."""
    one, many = authority.issue("one", "one.test"), authority.issue("many", "*.many.test")
    default = authority.issue("default", "localhost", "a.b.many.test", "other.test")
    further = (
        NamedCertificate(("one.test",), one.certificate, one.key),
        NamedCertificate(("*.many.test",), many.certificate, many.key),
    )
    tls = dataclasses.replace(default, sni=further)
    async with fronting(authority, chat_stream(1), tls=tls) as (_, server):
        for name, shown in (
            ("one.test", "one.test"),
            ("ONE.test", "one.test"),
            ("a.many.test", "*.many.test"),
            ("a.b.many.test", "localhost"),
            ("other.test", "localhost"),
        ):
            context = ssl.create_default_context(cafile=authority.ca_file)
            context.set_alpn_protocols(["http/1.1"])
            client = await server.secure(name=name, context=context)
            assert shown in subject(client), name
            assert client.selected_alpn_protocol() == "http/1.1"
            await client.send_all(ask())
            assert b"[DONE]" in await until(client, b"0\r\n\r\n")
        nameless = ssl.create_default_context(cafile=authority.ca_file)
        nameless.check_hostname = False
        raw = await server.connect()
        client = trio.SSLStream(raw, nameless)
        await client.do_handshake()
        assert "localhost" in subject(client)


def test_names_are_found_in_any_spelling(authority: Authority) -> None:
    """Case and a trailing dot make no difference, and nothing is no name."""
    pair = authority.issue("one", "one.test")
    further = NamedCertificate(("one.test",), pair.certificate, pair.key)
    found = Certificates(dataclasses.replace(authority.issue("default"), sni=(further,)))
    assert found.named("One.Test.") is not found.default
    assert found.named(None) is found.named("") is found.named("test") is found.named(".") is found.default


# -- reload ------------------------------------------------------------------------------------------------------------


async def test_reload_swaps_certificates_and_drops_no_stream(authority: Authority) -> None:
    """After SIGHUP new connections see the new certificate; a stream goes on inside the old one's session."""
    go = trio.Event()
    whole = chat_stream(3)
    script = Script((*whole.steps[:3], WaitFor(go), *whole.steps[3:]))
    async with fronting(authority, script, loader=lambda chosen: chosen) as (_, server):
        client = await server.secure()
        await client.send_all(ask())
        await until(client, b"word0")
        authority.issue("default", "localhost", "new.test")  # into the same files
        signal.raise_signal(signal.SIGHUP)
        await server.logged("reloaded the configuration")
        assert subject(await server.secure()) == {"localhost", "new.test"}
        go.set()
        assert b"[DONE]" in await until(client, b"0\r\n\r\n")
        assert subject(client) == {"localhost", "127.0.0.1"}


@pytest.mark.parametrize("fault", ["mismatch", "gone", "garbage"])
async def test_a_bad_certificate_file_changes_nothing(authority: Authority, fault: str) -> None:
    """Refused with the reason; the old certificate serves on, and what else was in the file is not taken either."""

    def loader(chosen: Settings) -> Settings:
        return dataclasses.replace(chosen, bounds=Bounds(capacity=2))

    async with fronting(authority, chat_stream(1), loader=loader) as (_, server):
        key = authority.folder / "default.key"
        if fault == "mismatch":
            authority.issue("other")
            key.write_bytes((authority.folder / "other.key").read_bytes())
        elif fault == "gone":
            key.unlink()
        else:
            key.write_text("no key")
        signal.raise_signal(signal.SIGHUP)
        await server.logged("the new configuration is refused, the old one stays: server.tls.key: ")
        assert server.gateway.settings.bounds.capacity == 4
        client = await server.secure()
        await client.send_all(ask())
        assert b"[DONE]" in await until(client, b"0\r\n\r\n")


async def test_turning_tls_on_or_off_needs_a_restart(authority: Authority) -> None:
    """A listener's scheme stays what the first line said; the rest of the file counts."""

    def loader(chosen: Settings) -> Settings:
        return dataclasses.replace(chosen, tls=None, bounds=Bounds(capacity=2))

    async with fronting(authority, chat_stream(1), loader=loader) as (_, server):
        signal.raise_signal(signal.SIGHUP)
        await server.logged("a change of tls needs a restart; the old value stays")
        assert server.gateway.settings.bounds.capacity == 2
        assert (await server.secure()).version() == "TLSv1.3"


# -- start and end -----------------------------------------------------------------------------------------------------


async def test_bad_certificates_start_nothing(authority: Authority) -> None:
    """The fault is a `ConfigError` before anything listens."""
    tls = ServerTLS(authority.issue("a").certificate, authority.issue("b").key)
    with pytest.raises(ConfigError, match=r"^server\.tls\.key: expected the key of the first certificate in "):
        await serve(Settings(tls=tls))


async def test_a_silent_latecomer_held_up_the_end(authority: Authority) -> None:
    """Who shakes hands while the gateway drains and then says nothing is closed soon; who asks gets a 503."""
    deadlines = Deadlines(linger=0.3, drain=20)
    go, whole = trio.Event(), chat_stream(1)
    slow = Script((*whole.steps[:3], WaitFor(go), *whole.steps[3:]))
    async with fronting(authority, slow, deadlines=deadlines) as (_, server):
        streaming = await server.secure()
        await streaming.send_all(ask())
        await until(streaming, b"word0")
        silent, asking = await server.connect(), await server.connect()
        signal.raise_signal(signal.SIGTERM)
        await server.logged("draining: 1 exchange ")
        late = [
            trio.SSLStream(raw, authority.client, server_hostname="localhost", https_compatible=False)
            for raw in (silent, asking)
        ]
        for one in late:
            await one.do_handshake()
        await late[1].send_all(ask())
        assert (await rest(late[1])).startswith(b"HTTP/1.1 503 ")
        assert await rest(late[0]) == b""
        go.set()
        assert b"[DONE]" in await until(streaming, b"0\r\n\r\n")
        with trio.fail_after(10):
            await server.ended.wait()
        assert server.code == 0


async def test_a_handshake_that_never_began_held_up_the_end(authority: Authority) -> None:
    """Whoever connected and said nothing is closed soon after the drain begins, and that is a clean end."""
    deadlines = Deadlines(tls_handshake=600, linger=0.2, drain=0.2)
    async with fronting(authority, chat_stream(1), deadlines=deadlines) as (_, server):
        silent = await server.connect()
        done = await server.secure()  # so the silent one is accepted, too
        signal.raise_signal(signal.SIGTERM)
        assert await read_all(silent) == b""
        with trio.fail_after(10):
            await server.ended.wait()
        assert server.code == 0
        assert await rest(done) == b""
