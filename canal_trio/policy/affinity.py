"""What a conversation is recognised by, so that it goes where its prefix is cached. Pure.

An upstream keeps the prompts that it has computed. The next request of a conversation repeats the one before and adds
to it; what stays is its beginning, up to the first thing that the user says. No more than that is made of a body: it
may be an array of millions.
"""

from __future__ import annotations

import msgspec

__all__ = ["prompt_key"]

MESSAGES = 16  # that are looked at, and make the key if none of them is the user's
_TEXT_BYTES = 1024  # of a prompt that is one text: what comes later is more likely to differ


class _Body(msgspec.Struct):
    messages: msgspec.Raw = msgspec.Raw()  # chat completions
    input: msgspec.Raw = msgspec.Raw()  # responses, embeddings
    prompt: msgspec.Raw = msgspec.Raw()  # completions


class _Message(msgspec.Struct):
    role: str | None = None


# The first of an array; what follows is passed over, and nothing is made of it.
_First = msgspec.defstruct(
    "_First", [(f"message{number}", msgspec.Raw, msgspec.Raw()) for number in range(MESSAGES)], array_like=True
)


def prompt_key(body: bytes) -> bytes | None:
    """The beginning of the prompt in a JSON request `body`; None if there is none, or the body is no such JSON.

    Of messages those up to the first of the user (at most the first 16), of a text the first KiB, each byte for byte.
    """
    try:
        found = msgspec.json.decode(body, type=_Body)
        for raw in (found.messages, found.input, found.prompt):
            if bytes(raw) not in (b"", b"null"):
                return _beginning(bytes(raw))
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        pass
    return None


def _beginning(raw: bytes) -> bytes:
    if not raw.startswith(b"["):
        return raw[:_TEXT_BYTES]
    taken: list[bytes] = []
    for item in msgspec.structs.astuple(msgspec.json.decode(raw, type=_First)):
        if not bytes(item):
            break  # there are no more
        taken.append(bytes(item))
        if not bytes(item).startswith(b"{") or msgspec.json.decode(item, type=_Message).role == "user":
            break
    return b"\n".join(taken)
