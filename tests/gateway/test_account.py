"""The account of an answer: what passes it unseen is what it would not have touched, nor taken note of."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from hypothesis import given, settings
from hypothesis import strategies as st

from canal_trio.gateway.account import Account, account_for
from canal_trio.hooks import Usage
from canal_trio.messages import Headers, ResponseHead
from canal_trio.wire.facts import response_facts

EVENTS = [
    b'data: {"choices":[{"delta":{"content":"x"}}]}\n\n',
    b'data: {"choices":[{"delta":{}}],"usage":null}\n\n',
    b'data: {"choices":[{"delta":{}}],"usage": null}\n\n',
    b'data: {"usage":null,"x":{"usage":{}},"usage":{"prompt_tokens":3}}\n\n',
    b'data: {"choices":[],"usage":{"prompt_tokens":7,"completion_tokens":2}}\n\n',
    b'data: {"choices":[],"usage" : {"prompt_tokens":8}}\r\n\r\n',
    b": ping\n\n",
    b"\n",
    b"data: [DONE]\n\n",
]
FRAME = b'"usage":{"prompt_tokens":99}\n'  # what stands around a piece is none of it


def told(account: Account, pieces: Sequence[bytes], *, unseen: bool) -> tuple[bytes, Usage | None, int]:
    """What goes on, what was used, and how many pieces passed unseen (if they may)."""
    out, passed = b"", 0
    for piece in pieces:
        framed = FRAME + piece + FRAME
        if unseen and account.passes(framed, len(FRAME), len(FRAME) + len(piece)):
            out += piece
            passed += 1
        else:
            out += account.feed(piece)
    return out + account.flush(), account.usage, passed


@settings(deadline=None, max_examples=300)
@given(st.lists(st.sampled_from(EVENTS), max_size=8), st.lists(st.integers(0, 300), max_size=4), st.booleans())
def test_what_passes_unseen_would_not_have_been_touched(events: list[bytes], cuts: list[int], asked: bool):
    """However a stream is split, and whoever asked for its usage, it is the same as if each piece had been fed."""
    data = b"".join(events)
    ends = {0, len(data), *(min(cut, len(data)) for cut in cuts), *itertools.accumulate(map(len, events))}
    pieces = [data[a:b] for a, b in itertools.pairwise(sorted(ends))]
    facts = response_facts(ResponseHead(200, Headers([(b"Content-Type", b"text/event-stream")])))
    one, other = account_for(facts, asked, 4096), account_for(facts, asked, 4096)
    assert one is not None
    assert other is not None
    assert told(one, pieces, unseen=True)[:2] == told(other, pieces, unseen=False)[:2]


def test_a_usual_stream_passes_unseen():
    """Each event of it but the one that tells; of a JSON body nothing does."""
    stream = response_facts(ResponseHead(200, Headers([(b"Content-Type", b"text/event-stream")])))
    for asked in (False, True):
        account = account_for(stream, asked, 4096)
        assert account is not None
        assert told(account, [*EVENTS[:3], EVENTS[4], EVENTS[-1]], unseen=True)[1:] == (Usage(7, 2), 4)
    body = account_for(response_facts(ResponseHead(200, Headers([(b"Content-Type", b"application/json")]))), True, 4096)
    assert body is not None
    assert told(body, [b'{"usage":{"prompt_tokens":1,"completion_tokens":2}}'], unseen=True)[1:] == (Usage(1, 2), 0)
