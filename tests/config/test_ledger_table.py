"""`[ledger]` and `canal-trio usage`: what may be written, and what is said of everything else."""

from __future__ import annotations

import json
import pathlib
import socket
import sys
from collections.abc import Callable

import pytest
from click.testing import CliRunner

from canal_trio.cli import cli
from canal_trio.config import Flags, load
from canal_trio.errors import CanalError, ConfigError
from canal_trio.observe.ledger import open_store
from canal_trio.observe.ledger.rows import Row, Run
from canal_trio.settings import Ledger, Settings

MINIMAL = '[[upstream]]\nname = "a"\nbase_url = "http://127.0.0.1:1/v1"\n'
LINE = 5  # of the first key below [ledger]


@pytest.fixture
def config(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Settings]:
    """Loads a minimal configuration with this in its [ledger]."""
    monkeypatch.chdir(tmp_path)

    def _load(text: str) -> Settings:
        pathlib.Path("canal.toml").write_text(f"{MINIMAL}[ledger]\n{text}\n")
        return load(Flags(config="canal.toml"), {"PG": "postgresql://u:secret@db/canal"})

    return _load


def test_a_file(config: Callable[[str], Settings], tmp_path: pathlib.Path) -> None:
    """A file is enough: the journal is beside it, the instance has the machine's name, and accounting is on."""
    settings = config('file = "ledger.db"')
    assert settings.ledger == Ledger(
        file=str(tmp_path / "ledger.db"),
        journal=str(tmp_path / "ledger.db.journal"),
        instance=socket.gethostname(),
    )
    assert settings.accounting
    assert not Settings().accounting


def test_everything(config: Callable[[str], Settings], tmp_path: pathlib.Path) -> None:
    """PostgreSQL's URL is a secret, and is not shown."""
    ledger = config('postgres = { env = "PG" }\njournal = "j"\njournal_bytes = "2MiB"\ninstance = "gw-1"').ledger
    assert ledger == Ledger(
        postgres="postgresql://u:secret@db/canal", journal=str(tmp_path / "j"), journal_bytes=2**21, instance="gw-1"
    )
    assert "secret" not in repr(ledger)


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("", 'canal.toml:4: ledger: expected file = "ledger.db" (SQLite) or postgres = "postgresql://…"'),
        (
            'file = "l"\npostgres = { env = "PG" }',
            "canal.toml:6: ledger.postgres: expected either file (SQLite) or postgres, got both",
        ),
        ('file = "no/l.db"', "there is no folder"),
        ('file = "l"\njournal = "no/j"', "canal.toml:6: ledger.journal: there is no folder"),
        ('file = "l"\njournal_bytes = 5', "canal.toml:6: ledger.journal_bytes: expected at least 1048576"),
        ('file = "l"\ninstance = "a b"', "canal.toml:6: ledger.instance: expected a name of up to 128"),
        ('postgres = "mysql://x"', "canal.toml:5: ledger.postgres: expected a URL such as postgresql://"),
        ('postgres = { env = "NO" }', "the environment variable 'NO' is not set"),
        ('flie = "l"', "canal.toml:5: ledger.flie: unknown key; did you mean 'file'?"),
        ("file = 1", "canal.toml:5: ledger.file: expected a string"),
    ],
)
def test_complaints(config: Callable[[str], Settings], text: str, complaint: str) -> None:
    """Each fault has its place and says what was expected."""
    with pytest.raises(ConfigError) as caught:
        config(text)
    assert complaint in str(caught.value)


@pytest.mark.parametrize("url", ["u:gehe%im@db/c", "u:geh@eim@db/c", "u:gehe/im@db/c", "u:g@db:gehe/c", "db/c?gehe=x"])
def test_postgres_repeated_a_part_of_the_password(config: Callable[[str], Settings], url: str) -> None:
    """A URL of which PostgreSQL's client takes the password for something else is refused at once, and not repeated."""
    with pytest.raises(ConfigError, match="percent-encoded, as %40 for @") as caught:
        config(f'postgres = "postgresql://{url}"\njournal = "j"')
    assert "gehe" not in str(caught.value)
    assert config('postgres = "postgresql://u:geh%40e%25im@db:5432,db2:5433/c?sslmode=require"\njournal = "j"').ledger


def test_check_was_content_with_places_where_nothing_can_be_kept(config: Callable[[str], Settings]) -> None:
    """A folder is no file, a file is no folder, and what cannot be written to is said."""
    pathlib.Path("folder").mkdir()
    pathlib.Path("file").write_text("")
    with pytest.raises(ConfigError, match=r"ledger.file: expected a file, and '.*/folder' is none"):
        config('file = "folder"')
    with pytest.raises(ConfigError, match=r"ledger.journal: expected a folder, and '.*/file' is none"):
        config('file = "l"\njournal = "file"')
    assert config('file = "file"\njournal = "folder"').ledger


def test_a_file_that_cannot_be_written_to(
    config: Callable[[str], Settings], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Said when the configuration is read, not by a store that stays away."""
    pathlib.Path("file").write_text("")
    monkeypatch.setattr("os.access", lambda path, _mode: not path.endswith("file"))
    with pytest.raises(ConfigError, match=r"ledger.file: '.*/file' cannot be written to"):
        config('file = "file"')


def test_postgres_without_psycopg(config: Callable[[str], Settings], monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the extra is not installed the complaint is the command that installs it."""
    monkeypatch.setitem(sys.modules, "psycopg", None)
    with pytest.raises(ConfigError, match=r"pip install 'canal-trio\[postgres\]'"):
        config('postgres = { env = "PG" }')


def test_usage(config: Callable[[str], Settings]) -> None:
    """The command sums what is in the store; what it cannot read it says in one line."""
    ledger = config('file = "ledger.db"').ledger
    assert ledger is not None
    run = CliRunner().invoke
    with pytest.raises(CanalError, match="there is no ledger in"):
        run(cli, ["usage", "-c", "canal.toml"], catch_exceptions=False)
    store = open_store(ledger.file, None)
    row = Row(seq=1, started_at=86_400.0, request_id="r", key_name="k", prompt_tokens=5, cost=10**9)
    store.apply(Run("gw", "b", 0), [([], [row])])
    store.close()
    shown = run(cli, ["usage", "-c", "canal.toml", "--by", "day", "--format", "json"])
    assert shown.exit_code == 0
    (sums,) = json.loads(shown.output)
    assert (sums["day"], sums["exchanges"], sums["prompt_tokens"], sums["cost"]) == ("1970-01-02", 1, 5, "1.00")
    assert "team" not in run(cli, ["usage", "-c", "canal.toml"]).output
    late = run(cli, ["usage", "-c", "canal.toml", "--since", "24h", "--format", "csv"])
    assert len(late.output.splitlines()) == 1
    wrong = run(cli, ["usage", "-c", "canal.toml", "--until", "soon"])
    assert (wrong.exit_code, "--until" in wrong.output) == (2, True)
    pathlib.Path("canal.toml").write_text(MINIMAL)
    with pytest.raises(ConfigError, match=r"there is no \[ledger\] to read"):
        run(cli, ["usage", "-c", "canal.toml"], catch_exceptions=False)


def test_usage_does_not_want_the_secrets_of_upstreams(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who reads the ledger has no key of an upstream: the command asks for nothing but what it reads."""
    monkeypatch.chdir(tmp_path)
    text = f'{MINIMAL}api_key = {{ env = "NOT_SET_HERE" }}\n[ledger]\nfile = "ledger.db"\n'
    pathlib.Path("canal.toml").write_text(text)
    with pytest.raises(ConfigError, match="'NOT_SET_HERE' is not set"):
        load(Flags(config="canal.toml"), {})
    store = open_store("ledger.db", None)
    store.apply(Run("gw", "b", 0), [([], [Row(seq=1, started_at=0.0, request_id="r")])])
    store.close()
    assert CliRunner().invoke(cli, ["usage", "-c", "canal.toml"]).exit_code == 0
    pathlib.Path("canal.toml").write_text(text.replace("file =", "flie ="))
    with pytest.raises(ConfigError, match=r"canal.toml:6: ledger.flie: unknown key; did you mean 'file'\?"):
        CliRunner().invoke(cli, ["usage", "-c", "canal.toml"], catch_exceptions=False)


def test_usage_without_a_file_asks_for_one_by_its_flag(config: Callable[[str], Settings]) -> None:
    """Not for an upstream, which the command does not need."""
    assert config('file = "ledger.db"').ledger
    open_store("ledger.db", None).close()
    pathlib.Path("ledger.db").touch()
    run = CliRunner().invoke
    assert run(cli, ["usage"], env={"CANAL_CONFIG": "canal.toml"}, catch_exceptions=False).exit_code == 0
    without = run(cli, ["usage"], env={"CANAL_CONFIG": None})
    assert (without.exit_code, "which ledger? Give --config FILE" in without.output) == (2, True)
