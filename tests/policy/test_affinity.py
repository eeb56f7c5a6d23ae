"""What a conversation is recognised by."""

from __future__ import annotations

import json
import tracemalloc

import pytest
from hypothesis import given
from hypothesis import strategies as st

from canal_trio.policy.affinity import MESSAGES, prompt_key

SYSTEM = {"role": "system", "content": "You are helpful."}
FIRST = {"role": "user", "content": "What is a canal?"}
LATER = [{"role": "assistant", "content": "A ditch."}, {"role": "user", "content": "And a lock?"}]


def key(**fields: object) -> bytes | None:
    """Of a body with these fields."""
    return prompt_key(json.dumps({"model": "m", "stream": True, **fields}).encode())


@pytest.mark.parametrize("field", ["messages", "input"])
def test_a_conversation_keeps_its_key(field: str) -> None:
    """Every request of a conversation has the key of its first; another conversation has another."""
    first = key(**{field: [SYSTEM, FIRST]})
    assert first is not None
    assert first == key(**{field: [SYSTEM, FIRST, *LATER]})
    assert first != key(**{field: [SYSTEM, {**FIRST, "content": "What is a lock?"}]})
    assert first != key(**{field: [{**SYSTEM, "content": "You are not."}, FIRST]})


def test_a_text_counts_by_its_beginning() -> None:
    """The first KiB of a prompt, or of an input that is a text."""
    assert key(prompt="a" * 2000) == key(prompt="a" * 3000)
    assert key(input="a") != key(input="b")
    assert key(input=["a", "b"]) == key(input=["a", "c"])
    assert key(messages=[]) == b""


def test_an_array_of_millions_took_a_gigabyte() -> None:
    """The first messages are looked at, and nothing is made of the others."""
    body = b'{"messages":[%b]}' % b",".join([b'{"role":"system"}'] * 200_000)
    tracemalloc.start()
    try:
        assert prompt_key(body) == b"\n".join([b'{"role":"system"}'] * MESSAGES)
        assert tracemalloc.get_traced_memory()[1] < 2 * len(body) + 100_000
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    "body", [b"", b"[]", b"{", b'{"model": "m"}', b'{"messages": null}', b'{"messages": [{]}', b"\xff"]
)
def test_no_prompt_no_key(body: bytes) -> None:
    """What is not a request with a prompt has none, and breaks nothing."""
    assert prompt_key(body) is None


@pytest.mark.parametrize("value", [5, {"a": 1}, [{"role": 7}], [None]])
def test_strange_prompts(value: object) -> None:
    """The upstream will say what it thinks of them."""
    key(messages=value)


@given(st.binary(max_size=200))
def test_any_bytes(body: bytes) -> None:
    """Nothing is raised, whatever a client sends."""
    prompt_key(body)
