"""Certificates of clients: who gets in, whom the record names, and what a reload changes."""

from __future__ import annotations

import dataclasses
import signal
import ssl
from pathlib import Path
from typing import Any

import pytest
import trio
import trustme
from serve_fakes import eventually, read_all
from tls_kit import Authority, Front, ask, fronting, rest, until

from canal_trio.errors import ConfigError
from canal_trio.serve.authority import subject_of
from canal_trio.serve.tls import Certificates
from canal_trio.settings import Deadlines, NamedCertificate, ServerTLS
from canal_trio.testing.scripts import Script, WaitFor, chat_stream


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    """Whom the clients trust."""
    return Authority(tmp_path)


class Members:
    """An authority for clients."""

    def __init__(self, folder: Path, name: str = "members") -> None:
        self._ca = trustme.CA()
        self._folder = folder
        self.file = str(folder / f"{name}.pem")
        self._ca.cert_pem.write_to_path(self.file)

    def member(
        self, authority: Authority, name: str = "alice", version: ssl.TLSVersion | None = None
    ) -> ssl.SSLContext:
        """A client's context, with a certificate for `name`."""
        leaf = self._ca.issue_cert(f"{name}@example.org", common_name=name)
        context = ssl.create_default_context(cafile=authority.ca_file)
        leaf.configure_cert(context)
        if version is not None:
            context.maximum_version = version
        return context


def asking(authority: Authority, members: Members, auth: str, **more: Any) -> ServerTLS:
    """The server's settings."""
    return dataclasses.replace(authority.issue("default"), client_ca=members.file, client_auth=auth, **more)


async def answered(server: Front, context: ssl.SSLContext | None = None, name: str = "localhost") -> str | None:
    """Ask as this client; whom the record names. Raises `trio.BrokenResourceError` if the client is turned away."""
    before = len(server.records)
    client = await server.secure(context=context, name=name)
    await client.send_all(ask())
    assert b"[DONE]" in await until(client, b"0\r\n\r\n")
    await eventually(lambda: len(server.records) > before)
    return server.records[-1].certificate


async def turned_away(server: Front, context: ssl.SSLContext | None = None, name: str = "localhost") -> None:
    """Not an answer: over TLS 1.3 the client learns it only when it reads."""
    before = len(server.records)

    async def attempt() -> None:
        client = await server.secure(context=context, name=name)
        await client.send_all(ask())
        await rest(client)

    with pytest.raises(trio.BrokenResourceError):
        await attempt()
    assert len(server.records) == before


VERSIONS = pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, None], ids=["1.2", "1.3"])


@VERSIONS
async def test_required(authority: Authority, tmp_path: Path, version: ssl.TLSVersion | None) -> None:
    """With one of our authority, and only with one; the record and the log name whom it names."""
    members, strangers = Members(tmp_path), Members(tmp_path, "strangers")
    async with fronting(authority, chat_stream(1), tls=asking(authority, members, "required")) as (upstream, server):
        named = await answered(server, members.member(authority, "alice", version))
        assert named is not None
        assert named.startswith("CN=alice,OU=")
        assert f" cert={named.split(' ')[0]}" in (await server.logged("cert=")).replace('"', "")
        bare = ssl.create_default_context(cafile=authority.ca_file)
        if version is not None:
            bare.maximum_version = version
        await turned_away(server, bare)
        await turned_away(server, strangers.member(authority, "mallory", version))
        assert await server.shaken("failed") == 2
        assert len(upstream.requests) == 1


@VERSIONS
async def test_optional(authority: Authority, tmp_path: Path, version: ssl.TLSVersion | None) -> None:
    """With one or without one, but not with somebody else's."""
    members, strangers = Members(tmp_path), Members(tmp_path, "strangers")
    async with fronting(authority, chat_stream(1), tls=asking(authority, members, "optional")) as (_, server):
        assert (await answered(server, members.member(authority, "bob", version)) or "").startswith("CN=bob,")
        assert await answered(server) is None
        await turned_away(server, strangers.member(authority, "mallory", version))


async def test_none(authority: Authority, tmp_path: Path) -> None:
    """Nobody is asked, whatever file is named; a certificate that is offered is not looked at."""
    members, strangers = Members(tmp_path), Members(tmp_path, "strangers")
    async with fronting(authority, chat_stream(1), tls=asking(authority, members, "none")) as (_, server):
        for context in (None, members.member(authority), strangers.member(authority)):
            assert await answered(server, context) is None


async def test_another_name_is_no_way_round(authority: Authority, tmp_path: Path) -> None:
    """Every certificate of ours asks the same of clients, the sessions of one name included (CVE-2025-23419)."""
    members = Members(tmp_path)
    pair = authority.issue("other", "other.test")
    sni = (NamedCertificate(("other.test",), pair.certificate, pair.key),)
    async with fronting(authority, chat_stream(1), tls=asking(authority, members, "required", sni=sni)) as (_, server):
        context = members.member(authority)
        assert await answered(server, context, "other.test") is not None
        for name in ("localhost", "other.test"):
            await turned_away(server, name=name)


async def test_reload_changes_whom_to_believe_and_drops_nobody(authority: Authority, tmp_path: Path) -> None:
    """A stream of a client whose authority is gone goes on; its next connection is turned away, resumed or not."""
    members, others = Members(tmp_path), Members(tmp_path, "others")
    go, whole = trio.Event(), chat_stream(2)
    script = Script((*whole.steps[:3], WaitFor(go), *whole.steps[3:]))
    tls = asking(authority, members, "required")

    def loader(chosen: Any) -> Any:
        return dataclasses.replace(chosen, tls=dataclasses.replace(tls, client_ca=others.file))

    async with fronting(authority, script, tls=tls, loader=loader) as (_, server):
        old = members.member(authority, version=ssl.TLSVersion.TLSv1_2)
        client = await server.secure(context=old)
        session = client.session
        await client.send_all(ask())
        await until(client, b"word0")
        signal.raise_signal(signal.SIGHUP)
        await server.logged("reloaded the configuration")
        raw = await server.connect()
        again = trio.SSLStream(raw, old, server_hostname="localhost", https_compatible=False)
        again.session = session
        with pytest.raises(trio.BrokenResourceError):
            await again.do_handshake()
        go.set()
        assert b"[DONE]" in await until(client, b"0\r\n\r\n")
        assert (await answered(server, others.member(authority, "carol")) or "").startswith("CN=carol,")


async def test_a_bad_authority_starts_nothing(authority: Authority, tmp_path: Path) -> None:
    """The fault is a `ConfigError` that names the setting."""
    tls = dataclasses.replace(authority.issue("default"), client_ca=str(tmp_path / "none"), client_auth="required")
    with pytest.raises(ConfigError, match=r"^server\.tls\.client_ca: cannot read '.*none': No such file"):
        Certificates(tls)


def test_subjects() -> None:
    """The most particular part first, special characters escaped; without a subject the first other name."""
    subject = ((("countryName", "DE"),), (("organizationName", "A, B + C"),), (("commonName", " x "), ("x", "#y")))
    assert subject_of({"subject": subject}) == r"CN=\ x\ +x=\#y,O=A\, B \+ C,C=DE"
    assert subject_of({"subject": (), "subjectAltName": (("DNS", "a.test"), ("DNS", "b.test"))}) == "DNS:a.test"
    assert subject_of({"subject": ()}) == ""
    assert subject_of({}) is subject_of(None) is None


async def test_a_silent_client_is_not_waited_for(authority: Authority, tmp_path: Path) -> None:
    """One that shakes hands up to the question for its certificate and stops there is closed at the deadline."""
    tls = asking(authority, Members(tmp_path), "required")
    async with fronting(authority, chat_stream(1), tls=tls, deadlines=Deadlines(tls_handshake=0.3)) as (_, server):
        incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        hello = authority.client.wrap_bio(incoming, outgoing, server_hostname="localhost")
        with pytest.raises(ssl.SSLWantReadError):
            hello.do_handshake()
        raw = await server.connect()
        await raw.send_all(outgoing.read())
        assert len(await read_all(raw)) > 1000
        assert await server.shaken("timeout") == 1
