"""Measures all promises of one gateway, shows them as a table, and says whether one broke."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

from loadtest.peers import running
from loadtest.processes import upstream_process
from loadtest.promises.cancel import cancel, cancel_unconnected
from loadtest.promises.endings import endings
from loadtest.promises.exact import exact_bytes
from loadtest.promises.kit import Site, Verdict
from loadtest.promises.latency import latency
from loadtest.promises.memory import memory
from loadtest.table import table

__all__ = ["PARTS", "check", "shown"]

PARTS: dict[str, Sequence[Callable[[Site], list[Verdict]]]] = {
    "latency": (latency,),
    "cancel": (cancel, cancel_unconnected),
    "memory": (memory,),
    "endings": (endings,),
    "bytes": (exact_bytes,),
}


def check(peer: str, parts: Sequence[str], say: Callable[[str], None], *, quick: bool = False) -> dict[str, Any]:
    """Start an upstream and the gateway, measure; raises `Missing` if the gateway cannot be had."""
    verdicts: list[Verdict] = []
    began = time.monotonic()
    with upstream_process() as upstream, running(peer, upstream.port, say=say) as gateway:
        site = Site(gateway, upstream, say, quick)
        for part in parts:
            for measure in PARTS[part]:
                try:
                    verdicts += measure(site)
                except (RuntimeError, OSError) as exc:  # the gateway broke off where it must not
                    verdicts.append(Verdict(part, "measured to the end", "no", "yes", False, str(exc)))
    return {
        "kind": "promises",
        "peer": peer,
        "seconds": round(time.monotonic() - began, 1),
        "broken": sum(verdict.kept is False for verdict in verdicts),
        "verdicts": [asdict(verdict) for verdict in verdicts],
    }


def shown(result: dict[str, Any]) -> str:
    """The table for people."""
    rows = []
    for verdict in result["verdicts"]:
        mark = {True: "kept", False: "BROKEN", None: "not judged"}[verdict["kept"]]
        rows.append([verdict["promise"], verdict["what"], verdict["measured"], verdict["limit"], mark, verdict["note"]])
    text = table(["promise", "what", "measured", "limit", "", "note"], rows)
    return f"{text}\n\n{result['peer']}: {result['broken']} broken, in {result['seconds']:.0f} s"
