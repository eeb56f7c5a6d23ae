"""Do the accounts agree: what the clients saw, what the link let pass, what the gateway wrote down?

Pure. The rules, each of which gives its own list of faults:
- every request has exactly one outcome, none `hung`, none `dishonest` (a finish that cannot be believed);
- every request that was sent has exactly one record; one that never got through (refused, or its client left before
  anything came back, when the kernel may have thrown its bytes away) has at most one; nobody has a record without a
  request;
- who got a complete 200 had an attempt whose response passed the link whole, or whose terminal event did, and then
  `after_done` went by, whereupon the gateway ends the message, whatever trickled meanwhile (the link notes how long
  after the event it closed: on a busy machine a cut may come late); a cut or a reset in time is no such end;
- a record's outcome fits what its client saw.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from typing import Any

from loadtest.trials.customers import Visit

__all__ = ["FITS", "agree"]

# What a record may say of a client that saw this.
FITS: dict[str, frozenset[str]] = {
    "complete": frozenset({"completed"}),
    "answered": frozenset({"upstream_failed", "rejected", "completed"}),
    "error": frozenset({"upstream_failed", "drained"}),
    "broken": frozenset({"upstream_failed", "drained", "client_stalled", "completed"}),
    "unanswered": frozenset({"upstream_failed", "rejected", "client_gone"}),
    "left": frozenset({"client_gone", "completed", "upstream_failed", "rejected"}),
}
AFTER_DONE = 1.0  # seconds; the link's clock starts before the gateway can have read


def agree(
    visits: Sequence[Visit], records: Iterable[dict[str, Any]], attempts: Iterable[dict[str, Any]] | None = None
) -> dict[str, list[str]]:
    """The faults found, by rule; each list is empty if all is well."""
    faults: dict[str, list[str]] = {
        "hung": [], "dishonest": [], "no record": [], "too many records": [], "records of nobody": [],
        "finished, but its upstream did not": [], "record does not fit": [],
    }  # fmt: skip
    written = defaultdict(list)
    for record in records:
        written[str(record["request_id"])].append(record)
    passed = defaultdict(list)
    for attempt in attempts or ():
        passed[str(attempt["ident"])].append(attempt)
    seen = Counter(visit.ident for visit in visits)
    for ident in (ident for ident, count in seen.items() if count > 1):
        faults["too many records"].append(f"{ident}: {seen[ident]} outcomes for one request")
    for visit in visits:
        text = f"{visit.ident} ({visit.kind}): {visit.outcome} {visit.status} {visit.note}"
        if visit.outcome in ("hung", "dishonest"):
            faults[visit.outcome].append(text)
        _recorded(visit, written.pop(visit.ident, []), text, faults)
        if attempts is not None and visit.outcome == "complete":
            tries = passed.get(visit.ident, [])
            if not any(one["whole"] or (one["terminal"] and one["since_done"] >= AFTER_DONE) for one in tries):
                faults["finished, but its upstream did not"].append(f"{text}; the link: {tries}")
    for ident, found in written.items():
        faults["records of nobody"].append(f"{ident}: {len(found)} ({found[0]['outcome']})")
    return faults


def _recorded(visit: Visit, found: list[dict[str, Any]], text: str, faults: dict[str, list[str]]) -> None:
    lost = not visit.answered and (visit.outcome == "left" or not visit.sent)
    if not found and not lost:
        faults["no record"].append(text)
    if len(found) > 1:
        faults["too many records"].append(f"{text}: {len(found)} records")
    for record in found:
        fits = FITS.get(visit.outcome)
        if fits is not None and record["outcome"] not in fits:
            said = f"{record['outcome']} {record['failure']} {record['flags']}"
            faults["record does not fit"].append(f"{text}; the record: {said}")
