"""`[balance]`, `[health]`, `[retries]`, and what models, routes and upstreams say about balance."""

from __future__ import annotations

import pathlib
from dataclasses import replace

from canal_trio.config.load import Flags, load
from canal_trio.settings import Balance, Health, Retries, Target

TEXT = """
[[upstream]]
name = "a"
base_url = "http://127.0.0.1:1/v1"
weight = 2.5
tier = 1
check = "/health?full"

[[upstream]]
name = "b"
base_url = "http://127.0.0.1:2/v1"

[[model]]
name = "plain"
upstreams = ["a", "b"]

[[model]]
name = "own"
upstreams = [{ name = "a", weight = 3, tier = 0 }, "b"]
strategy = "fastest"
hold_first_event = false

[[route]]
name = "files"
path = "/v1/files*"
upstreams = ["b"]
hash_by = "header:X-Session"

[balance]
strategy = "hash"
hash_by = "prompt"
hold_first_event = true
memory = "30s"

[health]
failures = 7
error_rate = 0.25
eject = "1m"
slow_start = 0

[retries]
attempts = 5
share = 0.1
backoff = "10ms"
"""


def test_everything_about_balance(tmp_path: pathlib.Path) -> None:
    """What is said counts, a model's own words before those for all, and the rest is as usual."""
    file = tmp_path / "canal.toml"
    file.write_text(TEXT)
    settings = load(Flags(config=str(file)), {})
    a, b = settings.upstreams
    assert (a.weight, a.tier, a.check) == (2.5, 1, "/health?full")
    assert (b.weight, b.tier, b.check) == (1.0, 0, None)
    general = Balance("hash", "prompt", hold_first_event=True, memory=30.0)
    assert settings.balance == general
    plain, own = settings.models
    assert plain.balance is None
    assert own.balance == replace(general, strategy="fastest", hold_first_event=False)
    assert own.upstreams == (Target("a", None, 3, 0), Target("b"))
    assert settings.routes[0].balance == replace(general, hash_by="header:x-session")
    assert settings.health == Health(failures=7, error_rate=0.25, eject=60.0, slow_start=0.0)
    assert settings.retries == Retries(attempts=5, share=0.1, backoff=0.01)


def test_without_a_word_it_is_as_it_was(tmp_path: pathlib.Path) -> None:
    """In order, with the usual numbers."""
    settings = load(Flags(upstream=("http://127.0.0.1:1/v1",)), {})
    assert (settings.balance, settings.health, settings.retries) == (Balance(), Health(), Retries())
    assert settings.balance.strategy == "in_order"
