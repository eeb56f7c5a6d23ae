"""`on_disconnect`: a word, or a table with limits, at a model, a route or a key."""

from __future__ import annotations

import math
import pathlib
from collections.abc import Callable

import pytest

from canal_trio.config import Flags, load
from canal_trio.errors import ConfigError
from canal_trio.settings import Drain, Settings

MINIMAL = '[[upstream]]\nname = "a"\nbase_url = "http://127.0.0.1:1/v1"\n'


@pytest.fixture
def config(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Settings]:
    """Loads a minimal configuration with this behind it."""
    monkeypatch.chdir(tmp_path)

    def _load(text: str) -> Settings:
        pathlib.Path("canal.toml").write_text(MINIMAL + text)
        return load(Flags(config="canal.toml"), {})

    return _load


@pytest.mark.parametrize(
    ("text", "limits"),
    [
        ("", None),
        ("on_disconnect = 'cancel'\n", Drain(at_once=0)),
        ("on_disconnect = 'drain'\n", Drain(60.0, math.inf, 64)),
        ("on_disconnect = { seconds = '2m', tokens = 100, at_once = 3 }\n", Drain(120.0, 100, 3)),
        ("on_disconnect = {}\n", Drain()),
    ],
)
def test_what_it_says(config: Callable[[str], Settings], text: str, limits: Drain | None) -> None:
    """The same for models, routes and keys."""
    settings = config(
        f"[[model]]\nname = 'm'\nupstreams = ['a']\n{text}"
        f"[[route]]\nname = 'r'\npath = '/v1/x'\nupstreams = ['a']\n{text}"
        f"[[key]]\nname = 'k'\nsha256 = '{'ab' * 32}'\n{text}"
    )
    assert {settings.models[0].on_disconnect, settings.routes[0].on_disconnect} == {limits}
    assert settings.keys[0].on_disconnect == limits


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("'dran'", "canal.toml:7: model[0].on_disconnect: expected 'cancel', 'drain' or { seconds = 60 }, got 'dran'"),
        ("7", "canal.toml:7: model[0].on_disconnect: expected a string or a table, got a whole number"),
        ("{ second = 3 }", "unknown key; did you mean 'seconds'?"),
        ("{ seconds = 0 }", "on_disconnect.seconds: expected more than 0 seconds, got 0"),
        ("{ tokens = 0 }", "on_disconnect.tokens: expected at least 1"),
        ("{ at_once = 0 }", "on_disconnect.at_once: expected at least 1"),
    ],
)
def test_complaints(config: Callable[[str], Settings], text: str, complaint: str) -> None:
    """Each fault has its place, and says what was expected."""
    with pytest.raises(ConfigError) as caught:
        config(f"[[model]]\nname = 'm'\nupstreams = ['a']\non_disconnect = {text}\n")
    assert complaint in str(caught.value)


def test_an_early_head(config: Callable[[str], Settings]) -> None:
    """`early_head_after` is a time, as `heartbeat` is, and off unless it is said."""
    assert config("").upstreams[0].early_head_after is None
    upstream = config("early_head_after = '20s'\nheartbeat = 15\n").upstreams[0]
    assert (upstream.early_head_after, upstream.heartbeat) == (20.0, 15.0)
    with pytest.raises(ConfigError, match=r"early_head_after: expected more than 0 seconds, got 0"):
        config("early_head_after = 0\n")
