"""Ten thousand keys and a thousand models: read, swapped and asked, while a stream goes on."""

from __future__ import annotations

import gc
import hashlib
import pathlib
import sys
from functools import partial

import pytest
from kit import chat, running_gateway

from canal_trio.config import Flags, load
from canal_trio.serve.reload import in_a_thread
from canal_trio.testing.scripts import stream
from canal_trio.testing.upstreams import ScriptedUpstream

KEYS, MODELS = 10_000, 1_000
EVENTS = (*(b'data: {"n":%d}\n\n' % number for number in range(60)), b"data: [DONE]\n\n")


def written(url: str, secret: str) -> str:
    """A configuration in which `secret` is one key among thousands."""
    tables = [f'[[upstream]]\nname = "u"\nbase_url = "{url}"\n']
    tables += [
        f'[[model]]\nname = "m{number}"\nupstreams = [{{ name = "u", model = "own-{number}" }}]\n'
        for number in range(MODELS)
    ]
    for number in range(KEYS):
        digest = hashlib.sha256((secret if number == 7777 else f"{secret}-{number}").encode()).hexdigest()
        tables.append(f'[[key]]\nname = "k{number}"\nsha256 = "{digest}"\nmodels = ["m{number % MODELS}"]\n')
    return "\n".join(tables)


@pytest.mark.slow
async def test_a_reload_of_ten_thousand_keys_loses_no_stream(tmp_path: pathlib.Path) -> None:
    """The stream that runs meanwhile is whole, the next request goes by the new keys."""
    file = tmp_path / "canal.toml"
    loading = partial(load, Flags(config=str(file)), {})
    async with ScriptedUpstream(stream(EVENTS, gap=0.01)) as upstream:
        file.write_text(written(upstream.url, "sk-old"))
        async with running_gateway(loading()) as gateway:
            client = await gateway.connect()
            await client.send(chat("api-key: sk-old", model="m777"))
            await upstream.until(lambda: bool(upstream.requests))
            file.write_text(written(upstream.url, "sk-new"))
            before = sys.getswitchinterval(), gc.isenabled()
            new = await in_a_thread(loading)
            await in_a_thread(gateway.gateway.prepare, new)
            router = gateway.gateway.generation.router
            gateway.gateway.reload(new)
            assert gateway.gateway.generation.router is not router
            assert (sys.getswitchinterval(), gc.isenabled()) == before
            assert (await client.response()).body == b"".join(EVENTS)
            assert upstream.requests[0].json["model"] == "own-777"
            assert (await gateway.ask(chat("api-key: sk-old", model="m777"))).status == 401
            assert (await gateway.ask(chat("api-key: sk-new", model="m778"))).status == 403
            answer = await gateway.ask(chat("api-key: sk-new", model="m777"))
            assert (answer.status, len(upstream.requests)) == (200, 2)
    gc.unfreeze()
