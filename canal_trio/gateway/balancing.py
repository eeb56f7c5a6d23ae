"""Which upstream an exchange asks, and what its attempts say about them: the books of policy, and who keeps them.

A `Standing` per upstream lives as long as the gateway, whatever is reloaded; what a model needs on top (whose turn it
is, how many retries are left) is a `Group`, made when the model is first asked for. `now` and chance come from here, so
that policy needs none. Invariant: an upstream that stands alone and well costs an exchange a look-up and two calls.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import final

import trio

from canal_trio.errors import Failure, Kind, Phase, Side
from canal_trio.gateway.exchange import Exchange
from canal_trio.policy.affinity import prompt_key
from canal_trio.policy.balance import Balancer, Member
from canal_trio.policy.exchange import blames_upstream
from canal_trio.policy.health import Standing, Verdict
from canal_trio.policy.retries import RetryBudget
from canal_trio.policy.routing import Plan, key_in
from canal_trio.settings import Balance, Model, Route, Settings, Upstream

__all__ = ["Balancing", "Group", "Standings", "UpstreamStatistics", "find_key", "timing", "verdict_of"]


_COME_BACK = 60.0  # seconds: what clients are told at most
_ANYTHING = Plan(())  # what needs none of the upstreams in particular


@dataclass(frozen=True, slots=True)
class UpstreamStatistics:
    """How an upstream stands now, and its counts since the gateway began."""

    state: str  # a value of policy.health.State
    in_flight: int  # attempts
    first_token: float  # seconds, as `fastest` sees it; 0 if it has not been measured
    ejections: int
    retries: int  # attempts here because another upstream had failed


@final
class Group:
    """The upstreams of one model, of one route, or all of them."""

    __slots__ = (
        "_first", "_several", "_standing", "balancer", "budget", "by_key", "options", "standings", "timed"
    )  # fmt: skip

    def __init__(self, balancer: Balancer, budget: RetryBudget) -> None:
        self.balancer = balancer
        self.budget = budget
        self.options = balancer.options
        members = balancer.members
        self.standings = tuple(member.standing for member in members)
        several = len(members) > 1
        self._several = several
        # Which is asked first while its standing is calm.
        self._first = 0 if balancer.usual is None else balancer.usual
        self._standing = None if balancer.usual is None else self.standings[balancer.usual]
        self.by_key = several and self.options.strategy == "hash"
        self.timed = several and self.options.strategy == "fastest"

    def first(self, key: bytes | None) -> int | None:
        """Which to ask first; None: every one is avoided. Counts an exchange."""
        if self._several:
            self.budget.exchange()
        if self._standing is not None and self._standing.calm:
            return self._first
        return self.balancer.pick(trio.current_time(), random.random(), key=key)

    def nobody(self) -> Failure:
        """The answer when every one is avoided."""
        wait = min(self.balancer.wait(trio.current_time()), _COME_BACK)
        detail = "All that could answer have failed lately."
        return Failure(Side.GATEWAY, Phase.ROUTE, Kind.UNAVAILABLE, detail, retry_after=wait or None)

    def another(self, tried: Sequence[int], key: bytes | None, *, free: bool) -> int | None:
        """Which to ask next; None: there is none, or the budget is spent. `free`: nothing was asked of the last one."""
        now = trio.current_time()
        index = self.balancer.pick(now, random.random(), tried=tried, key=key)
        if index is None or not (free or self.budget.take(now)):
            return None
        self.standings[index].retries += 1
        return index


@final
class Standings:
    """How each upstream stands, for all that configurations come and go. One that has moved begins anew, and one with
    another key is tried again."""

    def __init__(self) -> None:
        self._all: dict[tuple[str, str], Standing] = {}
        self._ways: dict[str, tuple[object, ...]] = {}  # how each is reached

    def configure(self, settings: Settings) -> dict[str, Standing]:
        """Those of the upstreams in `settings`, by name; others are forgotten."""
        found: dict[tuple[str, str], Standing] = {}
        for upstream in settings.upstreams:
            place = (upstream.name, upstream.base_url)
            standing = self._all.get(place) or Standing(upstream.name, settings.health)
            standing.use(settings.health)
            if upstream.check is None:
                standing.unchecked()
            if self._ways.get(upstream.name) not in (None, _way(upstream)):
                standing.reconsider()
            found[place] = standing
        self._all = found
        self._ways = {upstream.name: _way(upstream) for upstream in settings.upstreams}
        return {name: standing for (name, _), standing in found.items()}


def _way(upstream: Upstream) -> tuple[object, ...]:
    return upstream.api_key, upstream.key_header, upstream.http2, upstream.proxy, upstream.ca_file


@final
class Balancing:
    """The groups of one configuration, which are as many as its models that were asked for."""

    def __init__(self, settings: Settings, standings: dict[str, Standing], refused: int = 0) -> None:
        self.standings = standings
        self._refused = refused  # under earlier configurations
        self._settings = settings
        self._groups: dict[int, Group] = {}  # by the entry's identity: its hash is that of all its fields

    def group(self, plan: Plan) -> Group:
        """The upstreams that `plan` leads to, in its order. Not a checkpoint."""
        group = self._groups.get(id(plan.entry))
        return self._make(plan.entry) if group is None else group

    def _make(self, entry: Model | Route | None) -> Group:
        settings = self._settings
        upstreams = {upstream.name: upstream for upstream in settings.upstreams}
        members: list[Member] = []
        if entry is None:
            members = [self._member(upstream) for upstream in settings.upstreams]
        else:
            for target in entry.upstreams:
                members.append(self._member(upstreams[target.name], target.weight, target.tier))
        options = settings.balance if entry is None or entry.balance is None else entry.balance
        balancer = Balancer(members, options, most_ejected=settings.health.most_ejected, start=random.random())
        group = self._groups[id(entry)] = Group(balancer, RetryBudget(settings.retries, trio.current_time()))
        return group

    def _member(self, upstream: Upstream, weight: float | None = None, tier: int | None = None) -> Member:
        return Member(
            self.standings[upstream.name],
            upstream.weight if weight is None else weight,
            upstream.tier if tier is None else tier,
        )

    def ready(self) -> bool:
        """Is there an upstream that would be asked, if a request came now that any of them can serve?"""
        return self.group(_ANYTHING).balancer.available(trio.current_time())

    def statistics(self) -> dict[str, UpstreamStatistics]:
        """By the upstreams' names."""
        now = trio.current_time()
        return {
            name: UpstreamStatistics(
                state=standing.state(now).value,
                in_flight=standing.in_flight,
                first_token=standing.expected(now, self._settings.balance.memory),
                ejections=standing.ejections,
                retries=standing.retries,
            )
            for name, standing in self.standings.items()
        }

    def refused(self) -> int:
        """Retries that no budget was left for, ever."""
        return self._refused + sum(group.budget.refused for group in self._groups.values())


def _names_prompt(exchange: Exchange) -> bool:
    """Its body is JSON, so that it may have a prompt."""
    if exchange.facts is None or exchange.body is None or exchange.upgrade is not None:
        return False
    return exchange.facts.json


def timing(exchange: Exchange, standing: Standing, options: Balance) -> Callable[[float], None]:
    """Tells `standing` how long the first token took, if a stream begins: a whole answer is another measure."""
    begun = trio.current_time()

    def seen(now: float) -> None:
        if exchange.scanner is not None:
            standing.took(now - begun, now, options.memory)

    return seen


async def find_key(exchange: Exchange, hash_by: str, most: int) -> bytes | Failure | None:
    """What `hash` goes by. A prompt has to be here as a whole: the failure if it is more than may be held.

    `most`: bytes of a body that are looked into. A checkpoint only if it waits for the body.
    """
    head = exchange.head
    assert head is not None
    if hash_by == "prompt" and _names_prompt(exchange) and exchange.body is not None:
        exchange.phase = Phase.UPLOAD
        failure = await exchange.body.hold_all()
        if failure is not None:
            return failure
    kind, _, name = hash_by.partition(":")
    if kind == "header":
        return head.headers.get(name.lower().encode("ascii"))
    if kind == "prompt":
        content = exchange.body.beginning(most) if exchange.body is not None else None
        return prompt_key(content) if content else None
    if exchange.principal is not None:
        return exchange.principal.name.encode()
    return key_in(head.headers) or exchange.client.encode("utf-8", "replace")


def verdict_of(exchange: Exchange, failure: Failure | None, status: int | None, upstream: Upstream) -> Verdict:
    """What an attempt says about `upstream`: its `failure`, unless the exchange had one before, and its `status`.

    Busy (429) is neither good nor bad: it is set aside for that. Our own key refused is bad: nobody gets anything. What
    the upstream did wrong counts although the client has left since.
    """
    failure = exchange.failure or failure  # when the client leaves, the attempt fails as well
    if status == 429:
        return Verdict.NEITHER
    if failure is not None and blames_upstream(failure):
        return Verdict.BAD
    if status is not None and (status >= 500 or (status == 401 and upstream.api_key is not None)):
        return Verdict.BAD
    if exchange.scanner is not None and exchange.scanner.error:
        return Verdict.BAD
    return Verdict.NEITHER if failure is not None or status is None else Verdict.GOOD
