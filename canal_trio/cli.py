"""The command line: thin wrappers that read what was said, call one function, and choose the exit code.

Exit codes: 0 clean, 2 bad usage or configuration, 1 failure. No traceback reaches a user who did not ask for one: what
nobody expected is one line with the way to see more. Nothing else in the package imports this module.
"""

from __future__ import annotations

import datetime
import errno
import json
import math
import os
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from functools import partial
from typing import NoReturn

import click
import trio

from canal_trio import __version__
from canal_trio.config import Flags, load, load_keys, load_ledger, read_file, strange_variables
from canal_trio.config.values import name as checked_name
from canal_trio.errors import CanalError, ConfigError
from canal_trio.observe.log import TRACEBACK_VARIABLE, describe, leaves

__all__ = ["cli", "main"]

PROGRAM = "canal-trio"
_EPILOG = "Flags beat the environment (CANAL_LISTEN, CANAL_UPSTREAM, …), which beats the file."


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run the command line and leave the process with its exit code."""
    sys.exit(_guarded(lambda: cli.main(arguments, prog_name=PROGRAM, standalone_mode=False)))


def _guarded(command: Callable[[], object]) -> int:
    """Every way a command can end, as an exit code and lines on stderr."""
    try:
        code = command()
        sys.stdout.flush()
    except click.ClickException as exc:
        exc.show()
        return exc.exit_code
    except ConfigError as exc:
        click.echo(exc, err=True)  # its lines begin with file:line, which editors and CI understand
        return 2
    except CanalError as exc:
        _tell(str(exc))
        return 1
    except (click.Abort, KeyboardInterrupt):
        _tell("interrupted")
        return 1
    except BrokenPipeError:
        return _silenced()  # whoever read our output has gone
    except Exception as exc:
        if isinstance(exc, OSError) and exc.errno == errno.ENOSPC:
            _tell(f"the output cannot be written: {exc.strerror}")
            return _silenced()
        if (ours := _canal_errors(exc)) is not None:
            _tell("\n".join(ours))
            return 1
        if os.environ.get(TRACEBACK_VARIABLE):
            traceback.print_exc()
        _tell(f"unexpected: {describe(exc)}")
        _tell(f"this is a bug; set {TRACEBACK_VARIABLE}=1 to see where it comes from")
        return 1
    return code if isinstance(code, int) else 0


def _silenced() -> int:
    """Have Python not complain once more when it flushes our output at the end."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 1


def _canal_errors(exc: Exception) -> list[str] | None:
    """The texts of a group (a nursery's) that holds errors of ours only."""
    if isinstance(exc, ExceptionGroup):
        ours, others = exc.split(CanalError)
        if ours is not None and others is None:
            return [str(leaf) for leaf in leaves(ours)]
    return None


def _tell(text: str) -> None:
    for line in text.splitlines():
        click.echo(f"{PROGRAM}: {line}", err=True)


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name=PROGRAM)
def cli() -> None:
    """A streaming gateway for OpenAI-compatible APIs."""


@cli.command(epilog=_EPILOG, short_help="Relay requests to the upstreams.")
@click.option("--config", "-c", metavar="FILE", help="The configuration, in TOML.")
@click.option(
    "--listen", multiple=True, metavar="HOST:PORT", help="Where clients connect; repeatable. [default: 127.0.0.1:8080]"
)
@click.option(
    "--upstream",
    multiple=True,
    metavar="URL",
    help="Base URL of an upstream, such as http://127.0.0.1:8000/v1; repeatable; instead of the file's.",
)
@click.option("--workers", metavar="N|auto", help="Worker processes. [default: 1]")
@click.option("--admin", metavar="HOST:PORT|off", help="Health, metrics, streams. [default: 127.0.0.1:9090]")
@click.option("--log", metavar="text|json", help="For people or for machines. [default: text]")
def serve(
    config: str | None,
    listen: tuple[str, ...],
    upstream: tuple[str, ...],
    workers: str | None,
    admin: str | None,
    log: str | None,
) -> int:
    """Relay requests to the upstreams until SIGTERM or Ctrl-C; SIGHUP reads the configuration again."""
    loader = partial(load, Flags(config, listen, upstream, workers, admin, log), os.environ)
    settings = loader()
    for remark in strange_variables(os.environ):
        _tell(f"warning: {remark}")
    from canal_trio.serve import run, supervise  # late: `check` and `keys` need no sockets

    return (run if settings.workers == 1 else supervise)(settings, config_loader=loader)


@cli.command(hidden=True)
@click.argument("control", type=int)
def worker(control: int) -> int:
    """One of several workers, started by `serve`: obeys what comes over the descriptor CONTROL."""
    from canal_trio.serve import work  # late: as above

    return work(control)


@cli.command(short_help="Start a gateway and an upstream that streams haiku.")
@click.option("--once", is_flag=True, help="Ask for one haiku, show the stream, and leave.")
def demo(once: bool) -> int:
    """Start a gateway and a built-in upstream that streams haiku; prints a curl line to try."""
    from canal_trio.demo import run_demo  # late: only this command needs it

    return trio.run(run_demo, once)


@cli.command(short_help="Validate a configuration file.")
@click.argument("file", metavar="FILE")
def check(file: str) -> None:
    """Validate a configuration: would `serve --config FILE` start here and now? Warns of what is legal but unwise."""
    settings = load(Flags(config=file), os.environ)
    from canal_trio.config.advice import advice  # late: only this command needs it

    for remark in (*strange_variables(os.environ), *advice(settings, read_file(file)[0], file, time.time())):
        _tell(f"warning: {remark}")
    counts = (("upstream", settings.upstreams), ("model", settings.models), ("key", settings.keys))
    words = [f"{len(items)} {word}{'' if len(items) == 1 else 's'}" for word, items in counts]
    click.echo(f"{file}: ok: {', '.join(words)}")


@cli.command(short_help="What was used, from the ledger.")
@click.option("--config", "-c", metavar="FILE", envvar="CANAL_CONFIG", help="The configuration whose [ledger] is read.")
@click.option(
    "--by", type=click.Choice(["key", "model", "upstream", "outcome", "day"]), default="key", show_default=True
)
@click.option("--since", metavar="WHEN", help="24h, 7d, or a date such as 2026-11-25 (UTC).  [default: everything]")
@click.option("--until", metavar="WHEN", help="The same; what began from then on is left out.  [default: now]")
@click.option("--format", "style", type=click.Choice(["table", "csv", "json"]), default="table", show_default=True)
def usage(config: str | None, by: str, since: str | None, until: str | None, style: str) -> None:
    """Sums of what the exchanges used: how many, tokens, cost. Costs are in the currency of the [[price]]s.

    Rows that wait in a gateway's journal, because the store was away, are not in it.
    """
    from canal_trio.observe.ledger import open_store  # late: only this command needs it
    from canal_trio.observe.ledger.report import moment, rendered

    now, span = time.time(), []
    for name, text, default in (("--since", since, 0.0), ("--until", until, math.inf)):
        try:
            span.append(default if text is None else moment(text, now))
        except ValueError as exc:
            raise click.BadParameter(str(exc), param_hint=name) from None
    file = _needed(config, "ledger")
    ledger = load_ledger(Flags(config=file), os.environ)
    if ledger is None:
        raise ConfigError(f"{file}: there is no [ledger] to read")
    if ledger.file is not None and not os.path.exists(ledger.file):
        raise CanalError(f"there is no ledger in {ledger.file} yet")
    store = open_store(ledger.file, ledger.postgres)
    try:
        click.echo(rendered(store.usage(by, *span), by, style))
    finally:
        store.close()


@cli.command(short_help="A JSON Schema of the configuration, for editors.")
def schema() -> None:
    """Print a JSON Schema of the configuration file: editors complete and check with it as one types."""
    from canal_trio.config.json_schema import json_schema  # late: only this command needs it

    click.echo(json.dumps(json_schema(), indent=2, ensure_ascii=False))


@cli.group()
def keys() -> None:
    """Make, list and revoke clients' keys."""


_CONFIG = click.option("--config", "-c", metavar="FILE", envvar="CANAL_CONFIG", help="The configuration with the keys.")


def _named(name: str, parameter: str = "NAME") -> str:
    try:
        return checked_name(name)
    except ValueError as exc:
        raise click.BadParameter(str(exc), param_hint=parameter) from None


def _needed(config: str | None, what: str = "keys") -> str:
    if not config:
        raise click.UsageError(f"which {what}? Give --config FILE, or set CANAL_CONFIG")
    return config


@keys.command("new", short_help="Make a key, and the TOML to keep.")
@click.argument("name", metavar="NAME")
@click.option("--principal", metavar="WHO", help="Whose key it is, if it is not the only one.  [default: NAME]")
@click.option("--model", "models", multiple=True, metavar="MODEL", help="What it may ask for; repeatable. [default: *]")
@click.option("--route", "routes", multiple=True, metavar="ROUTE", help="A [[route]] that it may use; repeatable.")
@click.option("--expires", metavar="DATE", type=click.DateTime(["%Y-%m-%d"]), help="The first day without it (UTC).")
@click.option("--into", metavar="FILE", help="Put the TOML at the end of this configuration.")
def new_key(
    name: str,
    principal: str | None,
    models: tuple[str, ...],
    routes: tuple[str, ...],
    expires: datetime.datetime | None,
    into: str | None,
) -> None:
    """Make a key for NAME: print it once, and the TOML to keep, which holds only its SHA-256."""
    from canal_trio.config.keyfile import append_key, key_table, make_key  # late: as above

    key, digest = make_key()
    table = key_table(
        _named(name),
        digest,
        principal=None if principal is None else _named(principal, "--principal"),
        models=models or ("*",),
        routes=routes,
        expires=None if expires is None else expires.date(),
    )
    if into is not None:
        append_key(into, table, name)
    click.echo("The key, shown only this once:", err=True)
    click.echo(key)
    if into is None:
        click.echo("Keep this in the configuration file:", err=True)
        click.echo(f"\n{table}", nl=False)
    else:
        click.echo(f"Its SHA-256 is in {into}. SIGHUP makes a running gateway read it.", err=True)


@keys.command("list", short_help="Which keys there are.")
@_CONFIG
def list_keys(config: str | None) -> None:
    """Which keys the configuration has, whose they are, what they open and for how long."""
    from canal_trio.config.keyfile import key_rows  # late: as above

    rows = key_rows(load_keys(Flags(config=_needed(config))), time.time())
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        click.echo("  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip())


@keys.command("revoke", short_help="Let nobody in with a key any more.")
@click.argument("name", metavar="NAME")
@_CONFIG
def revoke(name: str, config: str | None) -> None:
    """Mark the key NAME as revoked in the configuration; everything else in the file stays as it is."""
    from canal_trio.config.keyfile import revoke_key  # late: as above

    file = _needed(config)
    done = revoke_key(file, name)
    click.echo(f"{file}: the key '{name}' is revoked{'' if done else ' already'}")
    if done:
        click.echo("SIGHUP makes a running gateway read it.", err=True)
