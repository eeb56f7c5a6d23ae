"""`python -m loadtest ledger`, as small as it gets: the parts that need no gateway, and that a break is seen."""

from __future__ import annotations

from canal_trio.hooks import Usage
from loadtest.trials import ledger as trial


def test_the_rate_is_booked_to_the_last_row() -> None:
    """Every exchange that was admitted has its row, and the ticks of both kinds of seconds were counted."""
    result = trial.ledger(("rate",), 200, 1, 0, 0, 0.0, lambda _text: None)
    stalls, rows = result["verdicts"]
    assert (rows.measured, rows.kept) == ("200 of 200", True)
    assert "with the ledger · without" in stalls.what


def test_a_tap_that_is_wrong_is_seen(monkeypatch) -> None:
    """The trial of the splits can fail: a tap that forgets is told from one that does not."""

    class Forgetful:
        usage = Usage(1, 1)

        def feed(self, piece: bytes) -> None:
            """Nothing is learnt."""

    monkeypatch.setattr(trial, "StreamUsage", Forgetful)
    monkeypatch.setattr(trial, "BodyUsage", Forgetful)
    (verdict,) = trial.ledger(("splits",), 0, 0, 0, 0, 0.0, lambda _text: None)["verdicts"]
    assert verdict.kept is False
