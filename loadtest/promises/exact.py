"""Bytes are sacred: what the upstream said reaches the client, whatever its form, its framing and its pieces."""

from __future__ import annotations

import hashlib

from loadtest import bodies
from loadtest.behaviour import Behaviour
from loadtest.promises.kit import Client, Site, Verdict

__all__ = ["exact_bytes"]


def exact_bytes(site: Site) -> list[Verdict]:
    """Every canned body in every framing and several splittings, SHA-256 against SHA-256."""
    equal, tried, wrong = 0, 0, []
    for name in bodies.CANNED:
        expected = hashlib.sha256(b"".join(bodies.canned(name))).digest()
        for framing in ("chunked", "length", "close"):
            site.say(f"bytes: {name}, {framing}")
            for split in (0,) if name == "long_line" else (0, 1, 7, 1000):
                client = Client(site.gateway)
                client.ask(Behaviour(body=name, interval=0.0, framing=framing, split=split), tag="bytes")
                payload = client.rest()
                client.close()
                tried += 1
                if hashlib.sha256(payload).digest() == expected and client.response.done:
                    equal += 1
                else:
                    wrong.append(f"{name}, {framing}, split {split}: {len(payload)} bytes")
    what = f"SHA-256 equal ({len(bodies.CANNED)} bodies, 3 framings, 4 splittings)"
    note = wrong[0] if wrong else ""
    return [Verdict("bytes", what, f"{equal} of {tried}", "all", not wrong, note, {"wrong": wrong})]
