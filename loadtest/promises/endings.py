"""Honest endings: the upstream is cut at every byte, and nothing the client gets may look finished."""

from __future__ import annotations

from loadtest import bodies
from loadtest.behaviour import Behaviour
from loadtest.promises.kit import Client, Site, Verdict

__all__ = ["endings"]

_TERMINAL = b"data: [DONE]\n\n"


def _wire_length(framing: str) -> tuple[int, int]:
    """Bytes of the whole answer, and the offset where `[DONE]` is complete in it."""
    pieces = [*bodies.canned("three")]
    head = len(bodies.head(200, framing, "text/event-stream", sum(map(len, pieces))))
    body = [bodies.frame(piece) for piece in pieces] if framing == "chunked" else pieces
    total = head + sum(map(len, body))
    done = total - (2 if framing == "chunked" else 0)
    return total + (len(bodies.LAST) if framing == "chunked" else 0), done


def endings(site: Site) -> list[Verdict]:
    """Every offset, both framings that announce their end, FIN and RST."""
    finished, made_up, whole, tried, strange = [], [], 0, 0, []
    step = 5 if site.quick else 1
    for framing in ("chunked", "length"):
        total, done_at = _wire_length(framing)
        for reset in (False, True):
            site.say(f"endings: {framing}, {'RST' if reset else 'FIN'} at every byte of {total}")
            for offset in [*range(0, total, step), total]:
                client = Client(site.gateway)
                behaviour = Behaviour(body="three", interval=0, framing=framing, cut=offset, reset=reset)
                client.ask(behaviour, tag="cut")
                payload = client.rest()
                client.close()
                name = f"{framing} {'rst' if reset else 'fin'} at {offset} of {total}"
                complete = client.response.done and client.response.status == 200
                if offset == total:
                    whole += complete
                    continue
                tried += 1
                if complete:
                    finished.append(name)
                if _TERMINAL in payload and offset < done_at:
                    made_up.append(name)
                if client.response.done and client.response.status < 500 and not complete:
                    strange.append(name)
    note = f"{tried} cuts; the uncut ones finished: {whole} of 4"
    details = {"finished": finished, "made_up": made_up, "strange": strange}
    return [
        Verdict(
            "honest endings", "cut at every byte: looks finished", str(len(finished)), "0",
            not finished and not strange and whole >= 2, note, details,
        ),
        Verdict("honest endings", "…made-up [DONE]", str(len(made_up)), "0", not made_up),
    ]  # fmt: skip
