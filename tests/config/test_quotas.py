"""Prices and limits in the configuration file: what is written is what is meant."""

from __future__ import annotations

import pathlib

import pytest

from canal_trio.config import Flags, load
from canal_trio.errors import ConfigError
from canal_trio.settings import Limit, LimitStore, Price, Settings

TEXT = f"""
[[upstream]]
name = "a"
base_url = "http://127.0.0.1:1/v1"

[[model]]
name = "gpt-*"
upstreams = ["a"]

[[key]]
name = "team-a-2026"
principal = "team-a"
sha256 = "{"ab" * 32}"

[[price]]
model = "gpt-4o*"
upstream = "a"
input = 2.5
output = 10
cached_input = 1.25
reasoning = 12
request = 0.01

[limits]
state = "limits.json"
redis = {{ env = "REDIS" }}
fail = "closed"
timeout = "100ms"
prefix = "gw"
output_tokens = 500

[[limit]]
requests_per_minute = 1000

[[limit]]
principal = "team-a"
model = "gpt-4o"
requests_per_minute = 0.5
tokens_per_minute = 100000
streams = 20
spend_per_day = 5.50
spend_per_month = 100
burst = "10s"

[[limit]]
principal = "*"
streams = 2
"""


def _load(folder: pathlib.Path, text: str, redis: str = "redis://:hunter2@127.0.0.1:6379/0") -> Settings:
    (folder / "canal.toml").write_text(text)
    return load(Flags(config=str(folder / "canal.toml")), {"REDIS": redis})


def test_prices_and_limits_as_written(tmp_path: pathlib.Path) -> None:
    """Every key of the three tables arrives; a path is relative to the file; a password is not shown."""
    settings = _load(tmp_path, TEXT)
    assert settings.prices == (Price("gpt-4o*", 2.5, 10.0, 1.25, 12.0, 0.01, "a"),)
    assert settings.limits == (
        Limit(requests=1000),
        Limit("team-a", "gpt-4o", 0.5, 100_000, 20, 5.5, 100, 10.0),
        Limit(principal="*", streams=2),
    )
    assert settings.limit_store == LimitStore(
        state=str(tmp_path / "limits.json"),
        redis="redis://:hunter2@127.0.0.1:6379/0",
        fail="closed",
        timeout=0.1,
        prefix="gw",
        output_tokens=500,
    )
    assert "hunter2" not in repr(settings)


@pytest.mark.parametrize(
    ("redis", "complaint"),
    [
        ("redis://[::1", "and this is no such URL"),
        ("redis:///0", "and this is no such URL; what is special in a password is percent-encoded"),
        ("redis://:hunter/2@cache/0", "and this is no such URL"),
        ("redis://cache/first", "and this is no such URL"),
        ("http://cache", "got the scheme 'http'"),
        ("unix:///run/redis.sock", ""),
        ("rediss://cache.example.org", ""),
    ],
)
def test_addresses_of_redis(tmp_path: pathlib.Path, redis: str, complaint: str) -> None:
    """TCP, TLS and a Unix socket; what is no such address is refused."""
    if not complaint:
        assert _load(tmp_path, TEXT, redis).limit_store.redis == redis
        return
    with pytest.raises(ConfigError) as caught:
        _load(tmp_path, TEXT, redis)
    assert complaint in str(caught.value)
    assert "hunter" not in str(caught.value)


def test_check_was_content_with_a_state_that_serve_refuses(tmp_path: pathlib.Path):
    """The file that keeps what was spent needs a folder, and is none."""
    for state, complaint in (("no/spent.json", "there is no folder '"), (".", "expected a file, and '")):
        with pytest.raises(ConfigError, match=f"limits.state: {complaint}"):
            _load(tmp_path, TEXT.replace("limits.json", state))


def test_a_principal_with_several_keys_has_one_limit(tmp_path: pathlib.Path) -> None:
    """A limit names whose key it is, so that a new key is no new budget; the key's own name is told apart."""
    with pytest.raises(ConfigError) as caught:
        _load(tmp_path, TEXT.replace('principal = "team-a"\nmodel', 'principal = "team-a-2026"\nmodel'))
    assert "there is no principal named 'team-a-2026'; did you mean 'team-a'?" in str(caught.value)
