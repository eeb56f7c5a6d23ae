"""A load as data: read from a small TOML file, checked, bounded.

Pure. Invariants: whatever a file says is either within `MOST` or refused with the key's name; every load ends by
itself. Unknown keys are errors. Several `[[part]]` tables mix, by weight.
"""

from __future__ import annotations

import difflib
import json
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from loadtest.behaviour import Behaviour, BehaviourError

__all__ = ["SCENARIOS", "Part", "Scenario", "ScenarioError", "changed", "from_table", "load", "names", "stamped"]

SCENARIOS = Path(__file__).parent / "scenarios"
MOST: dict[str, float] = {
    "seconds": 3600, "warm_up": 600, "streams": 30_000, "rate": 50_000, "most_in_flight": 30_000, "step": 5000,
    "step_seconds": 60, "weight": 1e6, "prompt": 1 << 26, "upload": 1 << 30, "read_rate": 1 << 32,
}  # fmt: skip
CHOICES = {
    "mode": ("closed", "open", "ramp"),
    "arrivals": ("poisson", "even"),
    "read": ("full", "slow", "never"),
    "leave": ("", "random", "together"),
    "leave_by": ("fin", "rst", "both"),
    "method": ("POST", "GET"),
}


class ScenarioError(ValueError):
    """A scenario nobody can run; the text names the key and what is expected."""


@dataclass(frozen=True, slots=True)
class Part:
    """One kind of exchange in a load."""

    name: str = "all"
    weight: float = 1.0
    method: str = "POST"
    path: str = "/v1/chat/completions"
    streamed: bool = True
    prompt: int = 0  # extra bytes in the message
    upload: int = 0  # bytes of an opaque body instead of a chat request
    keep_alive: bool = True
    read: str = "full"
    read_rate: int = 2000  # bytes/s of a slow reader
    leave: str = ""  # "random": at a random moment of the exchange; "together": all at half time
    leave_by: str = "both"
    upstream: Behaviour = field(default_factory=Behaviour)

    def request(self, authority: str, base: str, ident: str) -> bytes:
        """The request's bytes (an upload's head only; its body is zeros)."""
        user = self.upstream.encode(ident)
        path = base + self.path
        lines = [f"Host: {authority}", "Authorization: Bearer sk-test", "User-Agent: loadtest"]
        if not self.keep_alive:
            lines.append("Connection: close")
        body = b""
        if self.method == "GET" or self.upload:
            path += f"?user={user.replace(';', '%3B')}"
        if self.upload:
            lines += ["Content-Type: application/octet-stream", f"Content-Length: {self.upload}"]
        elif self.method == "POST":
            document = {"model": "m", "user": user, "stream": self.streamed}
            message = {"role": "user", "content": "Stream a haiku." + "x" * self.prompt}
            body = json.dumps({**document, "messages": [message]}).encode()
            lines += ["Content-Type: application/json", f"Content-Length: {len(body)}"]
        return "\r\n".join([f"{self.method} {path} HTTP/1.1", *lines, "", ""]).encode() + body


@dataclass(frozen=True, slots=True)
class Scenario:
    """A load. Times in seconds."""

    name: str = ""
    about: str = ""
    mode: str = "closed"  # closed: `streams` at a time; open: `rate` arrivals per second; ramp: more and more streams
    seconds: float = 10.0  # measured
    warm_up: float = 2.0  # before that
    streams: int = 50  # closed; ramp: where it begins
    rate: float = 20.0  # open
    arrivals: str = "poisson"
    most_in_flight: int = 2000  # open: arrivals beyond wait, and their waiting counts
    step: int = 50  # ramp: streams added per step
    step_seconds: float = 4.0
    parts: tuple[Part, ...] = (Part(),)


def load(name: str) -> Scenario:
    """A scenario by its name in `scenarios/`, or by the path of a file; raises `ScenarioError`."""
    path = Path(name) if name.endswith(".toml") else SCENARIOS / f"{name}.toml"
    try:
        table = tomllib.loads(path.read_text())
    except FileNotFoundError:
        raise ScenarioError(f"no scenario {name!r}; there are {', '.join(names())}, or give a .toml file") from None
    except (OSError, ValueError) as exc:
        raise ScenarioError(f"{path}: {exc}") from None
    try:
        return from_table(path.stem, table)
    except (ScenarioError, BehaviourError) as exc:
        raise ScenarioError(f"{path}: {exc}") from None


def changed(scenario: Scenario, **values: float | None) -> Scenario:
    """With these values instead of its own, where they are not None; raises `ScenarioError`."""
    given = {key: value for key, value in values.items() if value is not None}
    return replace(scenario, **_checked(given, Scenario, scenario.name))


def stamped(scenario: Scenario, stamp: str) -> Scenario:
    """With the time stamps where a gateway that writes events anew lets them through."""
    parts = tuple(replace(part, upstream=replace(part.upstream, stamp=stamp)) for part in scenario.parts)
    return replace(scenario, parts=parts)


def names() -> list[str]:
    """The scenarios that come with us."""
    return sorted(path.stem for path in SCENARIOS.glob("*.toml"))


def from_table(name: str, table: Mapping[str, Any]) -> Scenario:
    """A scenario from a decoded TOML table; raises `ScenarioError` or `BehaviourError`."""
    table = dict(table)
    parts = table.pop("part", [{}])
    if not isinstance(parts, list) or not parts:
        raise ScenarioError("part: expected [[part]] tables")
    made = []
    for number, entry in enumerate(parts):
        entry = dict(entry)
        behaviour = Behaviour.of(entry.pop("upstream", {}))
        values = _checked(entry, Part, f"part {number + 1}")
        made.append(replace(Part(**values), upstream=behaviour))
    return Scenario(**{**_checked(table, Scenario, "scenario"), "name": name, "parts": tuple(made)})


def _checked(table: Mapping[str, Any], kind: type[Part | Scenario], where: str) -> dict[str, Any]:
    """`table` if all its keys, types and bounds are right for `kind`."""
    default = kind()
    known = {entry.name: getattr(default, entry.name) for entry in fields(kind)}
    del known["parts" if kind is Scenario else "upstream"]
    for key, value in table.items():
        if key not in known:
            near = difflib.get_close_matches(key, known, 1)
            raise ScenarioError(f"{where}: unknown key {key!r}" + (f", did you mean {near[0]!r}?" if near else ""))
        wanted = type(known[key])
        if isinstance(value, bool) != (wanted is bool) or not isinstance(
            value, (int, float) if wanted is float else wanted
        ):
            raise ScenarioError(f"{where}: {key} is {value!r}, expected {wanted.__name__}")
        if key in MOST and not 0 <= value <= MOST[key]:
            raise ScenarioError(f"{where}: {key} is {value}, expected 0 to {MOST[key]:g}")
        if key in CHOICES and value not in CHOICES[key]:
            raise ScenarioError(f"{where}: {key} is {value!r}, expected one of {', '.join(map(repr, CHOICES[key]))}")
    return dict(table)
