"""`canal-trio usage`: times as people say them, and sums as a table, as CSV and as JSON."""

from __future__ import annotations

import csv
import io
import json

import pytest

from canal_trio.observe.ledger.report import moment, rendered
from canal_trio.observe.ledger.store import Sums

NOW = 1_764_100_000.0
SUMS = [
    Sums("team-a", 10, 9, 1000, 500, 20, 10, 1, 1_250_000_000, 0),
    Sums("=team\n'b", 2, 2, 8, 4, 0, 0, 0, 5, 2),
]


@pytest.mark.parametrize(
    ("text", "when"),
    [
        ("30m", NOW - 1800),
        ("24h", NOW - 86_400),
        ("7d", NOW - 7 * 86_400),
        (" 2w ", NOW - 14 * 86_400),
        ("1970-01-02", 86_400.0),
        ("1970-01-02T01:00", 90_000.0),
        ("1970-01-02T01:00+01:00", 86_400.0),
    ],
)
def test_moments(text: str, when: float) -> None:
    """A time before now, or a date in UTC."""
    assert moment(text, NOW) == when


@pytest.mark.parametrize("text", ["", "yesterday", "7", "7y", "2026-13-01", "-3d"])
def test_what_is_no_moment(text: str) -> None:
    """The error says what was expected."""
    with pytest.raises(ValueError, match="expected 24h, 7d or a date"):
        moment(text, NOW)


def test_the_table() -> None:
    """Names to the left, numbers to the right, totals below; nothing that moves the cursor."""
    lines = rendered(SUMS, "key", "table").splitlines()
    assert [line.split()[0] for line in lines] == ["key", "team-a", "=team?'b", "total"]
    assert lines[1].split()[1:] == ["10", "9", "1000", "500", "20", "10", "1", "0", "1.25"]
    assert lines[3].split()[1:] == ["12", "11", "1008", "504", "20", "10", "1", "2", "1.250000005"]
    assert len({len(line) for line in lines}) == 1


def test_csv_and_json_say_the_same() -> None:
    """Both have every number; a name that would be a spreadsheet's formula is none."""
    rows = list(csv.DictReader(io.StringIO(rendered(SUMS, "model", "csv"))))
    objects = json.loads(rendered(SUMS, "model", "json"))
    assert rows[0] == {key: str(value) for key, value in objects[0].items()}
    assert (rows[1]["model"], objects[1]["model"]) == ("'=team\n'b", "=team\n'b")
    assert objects[1]["cost"] == "0.000000005"


@pytest.mark.parametrize("name", ["=1", "+1", "-1", "@x", "\t=1", "\r=1", "\n+1\r2", " @x", "＝1"])
def test_a_formula_behind_a_blank_was_a_formula_in_the_csv(name: str) -> None:
    """Whatever a spreadsheet skips in front of a formula, a client's name is none; JSON has it as it is."""
    sums = [Sums(name, 1, 1, 1, 1, 0, 0, 0, 0, 0), Sums("-", 1, 1, 1, 1, 0, 0, 0, 0, 0)]
    rows = list(csv.DictReader(io.StringIO(rendered(sums, "model", "csv"), newline="")))
    assert [row["model"] for row in rows] == [f"'{name}".replace("\r", "\n"), "-"]
    assert [row["model"] for row in json.loads(rendered(sums, "model", "json"))] == [name, "-"]


def test_nothing_to_sum() -> None:
    """An empty ledger is a table without rows."""
    assert rendered([], "day", "json") == "[]"
    assert len(rendered([], "day", "table").splitlines()) == 2
