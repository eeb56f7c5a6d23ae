"""What an answer may have used, where nobody said it. A guess, and always marked as one.

A prompt has about four bytes for each token, its JSON included; a stream has about one event for each token of the
completion. Pure.
"""

from __future__ import annotations

from canal_trio.errors import Phase
from canal_trio.hooks import Usage

__all__ = ["BYTES_PER_TOKEN", "estimated"]

BYTES_PER_TOKEN = 4

_SENT = frozenset({Phase.FIRST_BYTE, Phase.FIRST_EVENT, Phase.STREAM, Phase.DELIVER})


def estimated(
    *, request_bytes: int, events: int, streamed: bool, generates: bool, whole: bool, phase: Phase, status: int | None
) -> Usage | None:
    """The guess; None where nothing was generated, or where a whole answer says nothing of it.

    `generates`: the request is one for a generation. `whole`: the answer came to its end. `phase` is how far it came,
    `status` what the client was told, if anything.
    """
    prompt = -(-request_bytes // BYTES_PER_TOKEN)
    if streamed:
        return Usage(prompt, events)
    refused = status is not None and status >= 400
    if whole or refused or not generates or phase not in _SENT:
        return None
    return Usage(prompt)  # it was under way; how far it had come was never seen
