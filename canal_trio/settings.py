"""Every number and choice of the product, as frozen records with their defaults (design, sections 4, 8 and 9).

Nothing here reads files or the environment; `canal_trio.config` builds these records from TOML, environment and flags,
and a reload swaps the whole `Settings` value. Sizes are bytes, times are seconds.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

__all__ = [
    "Balance",
    "Bounds",
    "Deadlines",
    "Drain",
    "Health",
    "Key",
    "Ledger",
    "Limit",
    "LimitStore",
    "Model",
    "NamedCertificate",
    "Price",
    "Retries",
    "Route",
    "ServerTLS",
    "Settings",
    "Target",
    "Upstream",
    "address_text",
]

KIB = 1024
MIB = 1024 * KIB


@dataclass(frozen=True, slots=True)
class Bounds:
    """What may be held at once. Each is reached by a test."""

    piece_bytes: int = 16 * KIB  # largest piece on the channel path
    capacity: int = 4  # pieces a flow's channel holds
    handover_bytes: int = 32 * KIB  # largest read that is handed over on the spot, so its remainder
    client_unsent_bytes: int = 16 * KIB  # TCP_NOTSENT_LOWAT on the client's socket
    upstream_receive_bytes: int = 256 * KIB  # SO_RCVBUF of upstream sockets
    head_bytes: int = 32 * KIB
    head_fields: int = 100
    target_bytes: int = 8 * KIB
    pipelined_bytes: int = 64 * KIB  # read ahead where the hang-up cannot be seen otherwise
    body_bytes: float = math.inf  # largest request body relayed; beyond: 413
    held_body_bytes: int = 32 * MIB  # body held for routing or replay, per exchange; beyond: 413 / no replay
    held_total_bytes: int = 256 * MIB  # the same, all exchanges together; beyond: 503
    upstream_connections: float = math.inf  # per upstream
    exchanges: float = math.inf  # at work at once; beyond: wait, then 503
    waiters: int = 1024  # per upstream, waiting for a lease; as many for a place among `exchanges`
    memory_bytes: int | None = None  # of bodies and flows, beyond: 503. None: half of the machine's, or of its cgroup's
    tls_handshakes: int = 512  # of clients, at once; the rest wait in line
    client_connections: int | None = None  # None: from the descriptor limit
    usage_event_bytes: int = 16 * KIB  # longest event that the usage edit holds; a longer one passes unjudged
    listener_connections: float = math.inf  # the same, for each address that is listened on
    address_connections: float = math.inf  # of one client address (IPv6: /64), but for trusted proxies; beyond: 503
    informational_heads: int = 16  # 1xx heads per response, beyond: malformed
    admin_connections: int = 64
    model_list_bytes: int = MIB  # of an upstream's own list of models; beyond: it is not listed
    log_lines: int = 4096  # lines that wait for a slow log, beyond: dropped and counted


@dataclass(frozen=True, slots=True)
class Deadlines:
    """How long anything may take. A timer runs only while it is that side's turn."""

    tls_handshake: float = 10.0
    request_head: float = 15.0  # from its first byte, never extended
    keep_alive: float = 75.0
    body_idle: float = 30.0
    body_rate: float = 500.0  # bytes per second, on average after the first `body_idle` seconds
    lease: float = 10.0  # waiting for a connection, or for a place among `exchanges`
    connect: float = 5.0
    connect_tls: float = 5.0  # added to `connect`
    first_byte: float = 300.0
    upstream_idle: float = 120.0  # between upstream bytes
    tunnel_idle: float = 300.0  # no byte in either direction after an upgrade
    client_write: float = 30.0  # the client's kernel took no byte
    exchange: float = math.inf
    drain: float = 30.0
    linger: float = 2.0
    after_done: float = 1.0  # the upstream's body has to end this long after its terminal event
    worker_answer: float = 30.0  # a worker that its supervisor hears nothing of for this long is killed and replaced
    model_list: float = 5.0  # fetching an upstream's own list of models
    model_list_keep: float = 60.0  # it is fetched again after this
    upstream_keep_alive: float = 60.0  # an idle upstream connection is not reused after this


@dataclass(frozen=True, slots=True)
class Balance:
    """How one upstream is chosen among those of a model. The table `[balance]`, and keys of a `[[model]]`."""

    strategy: str = "in_order"  # or round_robin, fewest_streams, fastest, hash
    hash_by: str = "principal"  # or prompt, or header:NAME
    hold_first_event: bool = False  # a first event that is an error is no answer while there is another upstream
    memory: float = 10.0  # seconds in which `fastest` forgets most of what it has seen


@dataclass(frozen=True, slots=True)
class Health:
    """When an upstream is avoided, and how it comes back. Counted in each worker, by what its exchanges meet."""

    failures: int = 5  # in a row
    error_rate: float = 0.5  # of at least `error_count` exchanges that ended within `error_window`
    error_count: int = 20
    error_window: float = 30.0
    eject: float = 10.0  # seconds; doubled each time in a row,
    eject_most: float = 300.0  # up to this
    most_ejected: float = 0.5  # of a model's upstreams, rounded down: a single one is never avoided
    trials: int = 1  # exchanges at once that find out whether it is well again
    slow_start: float = 30.0  # seconds in which its weight rises to what it was
    set_aside: float = 1.0  # after a 429 or 503 that does not say for how long
    set_aside_most: float = 60.0  # whatever it says
    check_interval: float = 10.0  # active checks: of upstreams that have a `check` path
    check_timeout: float = 5.0
    check_failures: int = 2  # in a row: down. One that succeeds: up


@dataclass(frozen=True, slots=True)
class Retries:
    """How often another upstream is asked, before the first byte of an answer was relayed."""

    attempts: int = 3  # per exchange, at most
    share: float = 0.2  # of a model's exchanges: so much more load, at most
    floor: float = 1.0  # per second, however few exchanges there are
    burst: float = 20.0  # unused ones that are kept for later
    backoff: float = 0.025  # seconds before the second attempt, doubled each time; a random part of it is waited
    backoff_most: float = 1.0


@dataclass(frozen=True, slots=True)
class Upstream:
    """One place that answers. `base_url` is what one would give to an OpenAI SDK."""

    name: str
    base_url: str
    api_key: str | None = field(default=None, repr=False)
    key_header: str = "authorization"  # where `api_key` goes: also "api-key" or "x-api-key", without "Bearer"
    list_models: bool = False  # what it lists itself is listed by the gateway, too
    http2: bool = False
    proxy: str | None = field(default=None, repr=False)  # http://host:port or socks5://host:port, perhaps a password
    ca_file: str | None = None  # instead of the system's trust store
    retry_sent: bool = False
    on_client_eof: str = "abort"  # or "finish"
    connections: float | None = None  # instead of Bounds.upstream_connections
    early_head_after: float | None = None  # seconds after which a stream's head is sent, whatever may come of it
    heartbeat: float | None = None  # seconds of silence after which ": ping\n" is sent
    weight: float = 1.0  # its part of the load, against the others'
    tier: int = 0  # an upstream is asked only when none of a lower tier can be
    check: str | None = None  # the path of an active check, asked of the root of the upstream; None: not checked


@dataclass(frozen=True, slots=True)
class Target:
    """An upstream that serves a model or a route. `name` is the upstream's.

    `model` is this upstream's own name for the model; None: it has the name that the client said. A `*` in it stands
    for what the model's `*` matched.
    """

    name: str
    model: str | None = None
    weight: float | None = None  # here, instead of the upstream's own
    tier: int | None = None


@dataclass(frozen=True, slots=True)
class Drain:
    """When a client leaves, its upstream's answer is taken to the end and dropped, within these limits.

    `at_once` 0: it never is, the upstream is cancelled.
    """

    seconds: float = 60.0
    tokens: float = math.inf  # events, in fact: what is known while it streams
    at_once: int = 64  # exchanges, in each worker


@dataclass(frozen=True, slots=True)
class Model:
    """A model's name and the upstreams that serve it, in order of preference. One `*` in a name stands for any text."""

    name: str
    upstreams: tuple[Target, ...]
    balance: Balance | None = None  # instead of Settings.balance
    on_disconnect: Drain | None = None  # None: the upstream is cancelled


@dataclass(frozen=True, slots=True)
class Route:
    """A path and the upstreams that serve it, whatever model its requests may name. It may end with a `*`."""

    name: str
    path: str
    upstreams: tuple[Target, ...]
    balance: Balance | None = None  # instead of Settings.balance
    on_disconnect: Drain | None = None  # None: the upstream is cancelled


@dataclass(frozen=True, slots=True)
class Key:
    """A client's key, by its SHA-256 in lower-case hexadecimal digits, and what it opens.

    `models` and `routes` are names, one `*` in each stands for any text. `routes` None: all of them if it opens all
    models, else none. `principal` is whose key it is (None: it has the key's name), so that one principal can have
    several. `expires` is Unix time in seconds.
    """

    name: str
    sha256: str
    models: tuple[str, ...] = ("*",)
    routes: tuple[str, ...] | None = None
    principal: str | None = None
    expires: float | None = None
    revoked: bool = False
    on_disconnect: Drain | None = None  # instead of the model's or the route's


@dataclass(frozen=True, slots=True)
class Price:
    """What a model costs, per million tokens, in whatever currency all prices are in. `model` may end in `*`."""

    model: str
    input: float = 0.0
    output: float = 0.0
    cached_input: float | None = None  # None: as `input`
    reasoning: float | None = None  # None: as `output`
    request: float = 0.0  # for each exchange
    upstream: str | None = None  # None: at any


@dataclass(frozen=True, slots=True)
class Ledger:
    """Where every admitted exchange leaves its row: one of `file` (SQLite) and `postgres` (a URL), behind a journal."""

    file: str | None = None
    postgres: str | None = field(default=None, repr=False)
    journal: str = "journal"  # a folder of this machine's
    journal_bytes: int = 256 * MIB  # not yet in the store, all workers together; beyond: 503
    instance: str = "canal"  # our name in the rows


@dataclass(frozen=True, slots=True)
class Limit:
    """How much there may be, for one principal, one model, both together, or (both None) in total.

    A `*` stands for each one by itself that has no limit of its own. None: no limit. Money is in the prices' currency.
    """

    principal: str | None = None
    model: str | None = None
    requests: float | None = None  # per minute
    tokens: float | None = None  # per minute, prompt and completion together
    streams: int | None = None  # exchanges at once
    spend_day: float | None = None
    spend_month: float | None = None
    burst: float = 60.0  # seconds' worth of a rate that may be used at once


@dataclass(frozen=True, slots=True)
class LimitStore:
    """Where limits are counted: in this machine's memory, or (`redis`) where several machines see it."""

    state: str | None = None  # the file in which memory keeps what was spent
    redis: str | None = field(default=None, repr=False)  # redis://, rediss:// or unix:// URL, perhaps with a password
    fail: str = "local"  # while Redis is away: "open" lets everything in, "closed" nothing, "local" counts by itself
    timeout: float = 0.25  # for one answer of Redis
    prefix: str = "canal"  # of our keys in Redis
    output_tokens: int = 1000  # set aside for a request that names no maximum


@dataclass(frozen=True, slots=True)
class NamedCertificate:
    """A further certificate, for clients that ask for one of `names` (SNI); `*.` at the front stands for one label."""

    names: tuple[str, ...]  # lower case, without the trailing dot
    certificate: str
    key: str


@dataclass(frozen=True, slots=True)
class ServerTLS:
    """Terminate TLS on the gateway's listeners. Each certificate is a PEM file with its chain, each key another one."""

    certificate: str
    key: str
    sni: tuple[NamedCertificate, ...] = ()
    client_ca: str | None = None  # a PEM file: whose certificates of clients are believed, under any name
    client_auth: str = "none"  # or "optional", "required"


@dataclass(frozen=True, slots=True)
class Settings:
    """The whole configuration of one gateway; immutable, swapped as one on reload."""

    listen: tuple[tuple[str, int], ...] = (("127.0.0.1", 8080),)
    admin: tuple[str, int] | None = ("127.0.0.1", 9090)
    workers: int = 1
    log: str = "text"  # or "json"
    tls: ServerTLS | None = None
    count_tokens: bool = False  # read what answers use, for log and metrics; a ledger does it anyway
    trusted_proxies: tuple[str, ...] = ()  # networks whose Forwarded and X-Forwarded-* are believed
    pseudonym: str = "canal"  # our name in Via
    allow_anonymous: bool = False
    upstreams: tuple[Upstream, ...] = ()
    models: tuple[Model, ...] = ()
    routes: tuple[Route, ...] = ()
    keys: tuple[Key, ...] = ()
    prices: tuple[Price, ...] = ()
    ledger: Ledger | None = None
    limits: tuple[Limit, ...] = ()
    limit_store: LimitStore = field(default_factory=LimitStore)
    bounds: Bounds = field(default_factory=Bounds)
    deadlines: Deadlines = field(default_factory=Deadlines)
    balance: Balance = field(default_factory=Balance)
    health: Health = field(default_factory=Health)
    retries: Retries = field(default_factory=Retries)

    @property
    def accounting(self) -> bool:
        """What answers use is read from their bytes."""
        return self.count_tokens or self.ledger is not None


def address_text(address: tuple[str, int]) -> str:
    """`HOST:PORT`, an IPv6 address in brackets."""
    host, port = address
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
