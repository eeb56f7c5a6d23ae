"""Lists of models, as OpenAI's API has them: `{"object":"list","data":[{"id":…,"object":"model",…}]}`.

An upstream's list is read with what it says about each model, whatever that is, and within a bound; what is not a model
with a printable id is left out.
"""

from __future__ import annotations

from typing import Any, Final

import msgspec

__all__ = ["ModelEntry", "model_list", "read_model_list"]

ModelEntry = dict[str, Any]

ENTRIES: Final = 4096
ID_CHARACTERS: Final = 256


class _List(msgspec.Struct):
    data: list[Any]


def read_model_list(body: bytes) -> dict[str, ModelEntry] | None:
    """The entries of a list by their ids, the first 4,096 of them; None if it is none."""
    try:
        entries = msgspec.json.decode(body, type=_List).data
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return None
    found: dict[str, ModelEntry] = {}
    for entry in entries[:ENTRIES]:
        name = entry.get("id") if isinstance(entry, dict) else None
        if isinstance(name, str) and 0 < len(name) <= ID_CHARACTERS and name.isprintable():
            found.setdefault(name, entry)
    return found


def model_list(entries: list[ModelEntry]) -> bytes:
    """A list of these entries."""
    return msgspec.json.encode({"object": "list", "data": entries})
