"""Redis behind TLS: its certificate is checked, and whose it is."""

from __future__ import annotations

import contextlib
import pathlib
import ssl
from functools import partial

import pytest
import trio
import trustme

from canal_trio.quota.memory import MemoryStore
from canal_trio.quota.redis import RedisStore
from canal_trio.quota.table import Table, table_bytes
from canal_trio.settings import LimitStore


@pytest.mark.parametrize(("name", "greeted"), [("localhost", True), ("other.example", False)])
async def test_a_certificate_for_another_name_is_refused(tmp_path: pathlib.Path, name: str, greeted: bool) -> None:
    """What is not proven to be the Redis that was meant hears neither password nor question."""
    authority = trustme.CA()
    authority.cert_pem.write_to_path(str(tmp_path / "ca.pem"))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert(name).configure_cert(context)
    heard = b""

    async def serve(stream: trio.SSLStream[trio.SocketStream]) -> None:
        nonlocal heard
        with trio.CancelScope(deadline=trio.current_time() + 5):
            with contextlib.suppress(trio.BrokenResourceError):
                heard = await stream.receive_some(1000)
            await trio.aclose_forcefully(stream)

    async with trio.open_nursery() as nursery:
        door = partial(trio.serve_ssl_over_tcp, serve, 0, context, host="127.0.0.1")
        listeners = await nursery.start(door)
        port = listeners[0].transport_listener.socket.getsockname()[1]
        url = f"rediss://:hunter2@localhost:{port}/0?ssl_ca_certs={tmp_path / 'ca.pem'}"
        store = RedisStore(LimitStore(redis=url), MemoryStore(Table(bytearray(table_bytes(32, 1)))))
        with trio.fail_after(20):
            await nursery.start(store.run)
        assert store.away
        assert (b"hunter2" in heard) is greeted
        nursery.cancel_scope.cancel()
