"""How many tokens an exchange will use, guessed before it begins; and has used, where nobody said. Pure.

The prompt is taken to have a token for every four bytes of the request's body, without what is in it as base64 (images,
audio, files: a fixed number each). The answer is taken to be as long as it may be. Guesses are there to be settled.
"""

from __future__ import annotations

from typing import TypeAlias

from canal_trio.hooks import Wanted

__all__ = ["Estimate", "estimate", "guess_used"]

_BYTES_PER_TOKEN = 4
_ROUNDS_UP = _BYTES_PER_TOKEN - 1
_ATTACHMENT_TOKENS = 1000
_MOST = 10**9  # of what a client may claim
_SMALL = 8192  # bytes; not worth the search
_MOST_ATTACHMENTS = 1000
# What stands in front of one, and of its text if that is a string of its own: a data URL, or `input_audio`'s data.
_ATTACHMENTS = ((b";base64,", b""), (b'"data"', b'"'))

Estimate: TypeAlias = tuple[int, int]
"""Tokens of the prompt and of the answer."""


def estimate(body: bytes | None, wanted: Wanted | None, unsaid: int) -> Estimate:
    """Of a request with this `body`; None: it has none that can be read, and nothing is guessed.

    `unsaid` stands for a maximum that is not `wanted`: 0 where no text is generated at all.
    """
    if not body:
        return 0, 0
    size = len(body)
    if size >= _SMALL:
        size = _plain_bytes(body)
    prompt = (size + _ROUNDS_UP) // _BYTES_PER_TOKEN
    if wanted is None:
        return prompt, unsaid
    most, answers = wanted
    completion = unsaid if most is None else min(max(0, most), _MOST)
    if answers is not None:
        completion *= min(max(1, answers), _MOST)
    return prompt, int(min(completion, _MOST))


def _plain_bytes(body: bytes) -> int:
    """The length of a body that is not small, with a fixed number of bytes for each of its attachments."""
    size = len(body)
    found = 0
    for marker, opening in _ATTACHMENTS:
        at = body.find(marker)
        while at >= 0 and found < _MOST_ATTACHMENTS:
            begin = body.find(opening, at + len(marker)) + 1 if opening else at + len(marker)
            end = body.find(b'"', begin)
            if begin == 0 or end < 0:
                break
            if end - begin >= _SMALL:
                found += 1
                size += _ATTACHMENT_TOKENS * _BYTES_PER_TOKEN - (end - begin)
            at = body.find(marker, end)
    return size


def guess_used(expected: Estimate, *, delivered_bytes: int, events: int, answered: bool) -> Estimate:
    """What was used, when no usage was told: nothing if nothing was `answered` (attempted and not refused); else the
    prompt as expected, and of the answer a token for each event, or for every four bytes."""
    if not answered:
        return 0, 0
    return expected[0], events or (delivered_bytes + _ROUNDS_UP) // _BYTES_PER_TOKEN

