"""The command line: `python -m loadtest …`. Exit codes: 0 clean, 1 a promise broke or something failed, 2 bad usage."""

from __future__ import annotations

import json
import signal
import sys
import time
from collections.abc import Collection
from pathlib import Path
from typing import Any

import click

from loadtest.behaviour import BehaviourError, parse
from loadtest.peers import PEERS, Missing
from loadtest.processes import NotStarted, pinned
from loadtest.safety import Refused, target_of
from loadtest.scenario import ScenarioError, changed, load, names, stamped
from loadtest.trials.commands import COMMANDS

OUT = Path(__file__).parent / "out"


class Progress:
    """One line on stderr: it overwrites itself on a terminal; in a log one appears every ten seconds."""

    def __init__(self) -> None:
        self._terminal = sys.stderr.isatty()
        self._last = time.monotonic()

    def __call__(self, text: str) -> None:
        if self._terminal:
            click.echo(f"\r\x1b[K{text[:110]}", nl=False, err=True)
        elif time.monotonic() - self._last > 10:
            self._last = time.monotonic()
            click.echo(text, err=True)

    def end(self) -> None:
        """Clear the line."""
        if self._terminal:
            click.echo("\r\x1b[K", nl=False, err=True)


def give(result: dict[str, Any], text: str, json_to: str | None) -> None:
    """Print for people, or JSON to stdout (`-`) or a file."""
    if json_to == "-":
        click.echo(json.dumps(result))
        return
    click.echo(text)
    if json_to:
        Path(json_to).parent.mkdir(parents=True, exist_ok=True)
        Path(json_to).write_text(json.dumps(result) + "\n")


def some_of(text: str, known: Collection[str], option: str) -> list[str]:
    """The comma-separated names in `text`, all of them known."""
    names = [name.strip() for name in text.split(",") if name.strip()]
    for name in names:
        if name not in known:
            raise click.UsageError(f"{option}: {name!r} is none of {', '.join(known)}")
    return names


_JSON = click.option("--json", "json_to", metavar="FILE", help="Write the result as JSON; - for stdout.")


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
def cli() -> None:
    """Load tests for streaming gateways of OpenAI-compatible APIs."""


@cli.command()
@click.option("--peer", default="canal", show_default=True, help=f"The gateway to start: {', '.join(PEERS)}.")
@click.option("--only", default="latency,cancel,memory,endings,bytes", show_default=True, help="What to measure.")
@click.option("--quick", is_flag=True, help="Fewer repetitions.")
@_JSON
def promises(peer: str, only: str, quick: bool, json_to: str | None) -> int:
    """Measure what a gateway promises; exits 1 if a promise breaks."""
    from loadtest.promises.check import PARTS, check, shown

    parts = some_of(only, PARTS, "--only")
    progress = Progress()
    result = check(peer, parts, progress, quick=quick)
    progress.end()
    give(result, shown(result), json_to)
    return int(result["broken"] > 0)


@cli.command()
@click.option("--listen", default="127.0.0.1:9000", show_default=True, metavar="HOST:PORT", help="Port 0 picks one.")
@click.option("--behaviour", default="", metavar="KEY=VALUE;…", help="What requests get that do not say otherwise.")
@click.option("--send-buffer", default=0, help="Bytes of SO_SNDBUF; 0 leaves it to the kernel.")
@click.option("--receive-buffer", default=0, help="Bytes of SO_RCVBUF; 0 leaves it to the kernel.")
def upstream(listen: str, behaviour: str, send_buffer: int, receive_buffer: int) -> int:
    """Serve a paced OpenAI-compatible upstream; on SIGTERM or Ctrl-C print what was counted.

    A behaviour is, for instance, "tokens=100;interval=0.02;first=0.3;jitter=0.2": see docs/measuring.md.
    """
    from loadtest.upstream import Upstream, serve

    host, _, port = listen.rpartition(":")
    if not host or not port.isdigit() or int(port) > 65535:
        raise click.UsageError(f"--listen {listen}: expected HOST:PORT")
    try:
        server = Upstream(
            parse(behaviour), host.strip("[]"), int(port), send_buffer=send_buffer, receive_buffer=receive_buffer
        )
    except BehaviourError as exc:
        raise click.UsageError(f"--behaviour: {exc}") from None
    except OSError as exc:
        raise click.ClickException(f"cannot listen on {listen}: {exc}") from None
    serve(server)
    return 0


@cli.command()
@click.argument("scenario")
@click.option("--target", metavar="URL", help="Any gateway; its upstream should be `python -m loadtest upstream`.")
@click.option("--peer", metavar="NAME", help="Instead of --target: start this one, and an upstream.")
@click.option("--upstream", "upstream_url", metavar="URL", help="Our upstream behind the target, to ask what it saw.")
@click.option("--seconds", type=float, help="Instead of the scenario's.")
@click.option("--streams", type=int, help="Instead of the scenario's.")
@click.option("--rate", type=float, help="Instead of the scenario's.")
@click.option("--tls", is_flag=True, help="With --peer: TLS to the client.")
@click.option("--allow-remote", is_flag=True, help="The target may be off loopback. It must be yours.")
@_JSON
def run(
    scenario: str,
    target: str | None,
    peer: str | None,
    upstream_url: str | None,
    seconds: float | None,
    streams: int | None,
    rate: float | None,
    tls: bool,
    allow_remote: bool,
    json_to: str | None,
) -> int:
    """Put a load on a gateway: SCENARIO is a name from loadtest/scenarios, or a TOML file."""
    from loadtest import run as runs
    from loadtest.peers import running
    from loadtest.processes import asked_at, cores, upstream_process

    if (target is None) == (peer is None):
        raise click.UsageError("expected either --target URL or --peer NAME")
    try:
        wanted = changed(load(scenario), seconds=seconds, streams=streams, rate=rate)
        if target is not None:
            place = target_of(target, allow_remote=allow_remote)
    except (ScenarioError, Refused) as exc:
        raise click.UsageError(str(exc)) from None
    progress = Progress()
    if target is not None:
        result = runs.run(wanted, place, progress, asked_at(upstream_url) if upstream_url else None)
    else:
        own, others = cores()[0], cores()[-1]
        with (
            upstream_process(core=others) as served,
            running(peer or "", served.port, core=own, tls=tls, say=progress) as gateway,
            pinned(others),
        ):
            wanted = stamped(wanted, gateway.peer.stamp if gateway.peer else "field")
            result = runs.run(wanted, target_of(gateway.url), progress, served, gateway.process)
            result["peer"] = peer
    progress.end()
    give(result, runs.shown(result), json_to)
    return 0


@cli.command()
@click.option(
    "--peers", default="nginx,envoy,caddy,canal,direct", show_default=True, help=f"Some of {', '.join(PEERS)}."
)
@click.option("--base", default="nginx", show_default=True, help="Whom the others are compared with.")
@click.option("--only", default="", help="Some of the measures, instead of all.")
@click.option("--rounds", default=3, show_default=True, type=click.IntRange(1, 50))
@click.option("--quick", is_flag=True, help="One round, short windows: to see that it works.")
@click.option("--tls", is_flag=True, help="Peers terminate TLS to the client.")
@_JSON
def compare(peers: str, base: str, only: str, rounds: int, quick: bool, tls: bool, json_to: str | None) -> int:
    """Compare gateways: CPU per event and request, added latency, throughput, memory, in interleaved rounds."""
    from loadtest import compare as comparing

    wanted = some_of(only or ",".join(comparing.DEFAULT), comparing.MEASURES, "--only")
    who = some_of(peers, PEERS, "--peers")
    some_of(base, PEERS, "--base")
    progress = Progress()
    result = comparing.compare(
        who, wanted, progress, rounds=1 if quick else rounds, shorter=0.3 if quick else 1.0, tls=tls, base=base
    )
    progress.end()
    give(result, comparing.shown(result), json_to)
    return 0


@cli.command()
@click.option("--quick", is_flag=True, help="Fewer requests and connections.")
@_JSON
def edge(quick: bool, json_to: str | None) -> int:
    """Measure what a refusal costs canal-trio, and an idle client."""
    from loadtest import edge as measuring

    result = measuring.edge(quick=quick)
    give(result, measuring.shown(result), json_to)
    return 0


@cli.command()
@click.option("--rounds", default=3, show_default=True, type=click.IntRange(1, 50))
@click.option("--streams", default=10_000, show_default=True, type=click.IntRange(100, 15_000))
@click.option("--quick", is_flag=True, help="Short windows: to see that it works.")
@_JSON
def workers(rounds: int, streams: int, quick: bool, json_to: str | None) -> int:
    """Measure two workers of canal-trio against one, and ten thousand streams in two."""
    from loadtest import workers as measuring

    progress = Progress()
    result = measuring.workers(progress, rounds=rounds, many=streams, shorter=0.2 if quick else 1.0)
    progress.end()
    give(result, measuring.shown(result), json_to)
    return 0


@cli.command()
@click.argument("results", nargs=-1, type=click.Path(path_type=Path))
@click.option("--page", default=OUT / "report.html", show_default=True, type=click.Path(path_type=Path))
@click.option("--png", default=OUT / "report.png", show_default=True, type=click.Path(path_type=Path))
def report(results: tuple[Path, ...], page: Path, png: Path) -> int:
    """Make one HTML page and one PNG of RESULTS (JSON files; all in loadtest/out unless given)."""
    from loadtest import report as reports

    chosen = results or tuple(sorted(OUT.glob("*.json")))
    if not chosen:
        raise click.UsageError(f"no results in {OUT}; make some with `python -m loadtest compare --json FILE`")
    try:
        page.parent.mkdir(parents=True, exist_ok=True)
        absent = reports.build(reports.read(chosen), page, png)
    except (ValueError, OSError, reports.NoPlots) as exc:
        raise click.ClickException(str(exc)) from None
    for title in absent:
        click.echo(f"no plot of {title!r}: nobody measured it", err=True)
    click.echo(f"wrote {page} and {png}")
    return 0


@cli.command()
def scenarios() -> int:
    """List the scenarios that come with us."""
    for name in names():
        click.echo(f"{name:18} {load(name).about}")
    return 0


for _command in COMMANDS:
    cli.add_command(_command)


def main() -> None:
    """Run, and leave with the exit code. SIGTERM is an interruption, too: what was started is ended."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        code = cli.main(prog_name="python -m loadtest", standalone_mode=False)
    except click.ClickException as exc:
        exc.show()
        code = exc.exit_code
    except (Missing, NotStarted) as exc:
        click.echo(f"loadtest: {exc}", err=True)
        code = 1
    except (click.Abort, KeyboardInterrupt):
        click.echo("loadtest: interrupted", err=True)
        code = 1
    sys.exit(code if isinstance(code, int) else 0)


if __name__ == "__main__":
    main()
