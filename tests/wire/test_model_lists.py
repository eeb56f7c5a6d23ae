"""Lists of models: what is read of an upstream's, and what is not."""

from __future__ import annotations

import json

import pytest

from canal_trio.wire.model_lists import ENTRIES, model_list, read_model_list
from canal_trio.wire.targets import wanted_model


def test_entries_keep_all_that_they_say():
    """Whatever fields an upstream has for a model stay with it; of two of a name the first one counts."""
    first = {"id": "a", "object": "model", "max_model_len": 4096, "nested": {"x": [1]}}
    body = json.dumps({"object": "list", "data": [first, {"id": "a"}, {"id": "b/c"}]}).encode()
    assert read_model_list(body) == {"a": first, "b/c": {"id": "b/c"}}
    assert json.loads(model_list([first])) == {"object": "list", "data": [first]}


@pytest.mark.parametrize("entry", [None, 3, "a", [], {}, {"id": 3}, {"id": ""}, {"id": "a\nb"}, {"id": "x" * 257}])
def test_what_is_no_model_is_left_out(entry: object):
    """One bad entry does not spoil the list."""
    assert read_model_list(json.dumps({"data": [entry, {"id": "good"}]}).encode()) == {"good": {"id": "good"}}


@pytest.mark.parametrize(
    "body", [b"", b"<html>", b"[]", b"{}", b'{"data":3}', b'{"data":' + b"[" * 5000, b'{"data":[{"id":"\xff"}]}']
)
def test_what_is_no_list_is_none(body: bytes):
    """Anything else than a list of OpenAI's shape."""
    assert read_model_list(body) is None


def test_a_list_is_bounded():
    """No more than 4,096 entries are read."""
    body = json.dumps({"data": [{"id": str(number)} for number in range(ENTRIES + 5)]}).encode()
    assert len(read_model_list(body) or ()) == ENTRIES


@pytest.mark.parametrize(
    ("path", "wanted"),
    [
        ("/v1/models", ""),
        ("/v1/models/", ""),
        ("/v1/models/gpt-4o", "gpt-4o"),
        ("/v1/models/open%2Fx:y", "open/x:y"),
        ("/v1/models/open/x", "open/x"),
        ("/models", ""),
        ("/models/gpt-4o", "gpt-4o"),
        ("/v1/modelsx", None),
        ("/modelsx", None),
        ("/v1v1/models", None),
        ("/v1/chat", None),
    ],
)
def test_which_model_a_path_is_about(path: str, wanted: str | None):
    """One, by its name that may be escaped, or all of them."""
    assert wanted_model(path) == wanted
