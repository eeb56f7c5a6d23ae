"""`canal-trio keys`, `schema` and `check`: what they print, what they change, and what they leave alone."""

from __future__ import annotations

import hashlib
import json
import os
import pathlib
import shutil
import tomllib
from typing import Any

import jsonschema
import pytest

from canal_trio.cli import main
from canal_trio.config import Flags, load, schema
from canal_trio.config.advice import advice
from canal_trio.config.json_schema import ARRAYS, TABLES, json_schema
from canal_trio.config.load import read_file
from canal_trio.settings import Key

EXAMPLE = pathlib.Path(__file__).parents[2] / "docs" / "canal.example.toml"
HASHES = ["ab" * 32, "cd" * 32, "ef" * 32]
ODD = f"""# keys of ours
[[upstream]]
name = "u"
base_url = "http://127.0.0.1:1/v1"
api_key = {{ env = "NOT_SET_HERE" }}

[[key]]   # the first
  name = "a"        # not sorted
  sha256 = "{HASHES[0]}"
[[key]]
sha256 = "{HASHES[1]}"
models = ["x", "y*"]
expires = 1970-01-02
revoked = false  # for now
name = "b"
[bounds]
"""


@pytest.fixture
def file(tmp_path: pathlib.Path) -> pathlib.Path:
    """A configuration with two keys, and a secret that is not there."""
    path = tmp_path / "canal.toml"
    path.write_text(ODD)
    path.chmod(0o640)
    return path


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of a command."""
    with pytest.raises(SystemExit) as ended:
        main([str(argument) for argument in arguments])
    out, err = capsys.readouterr()
    return int(ended.value.code or 0), out, err


def test_keys_are_listed(file: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Whose, what for, how long; without the secrets that serving would need, and never a key."""
    code, out, err = run(capsys, "keys", "list", "--config", file)
    assert (code, err) == (0, "")
    assert [line.split() for line in out.splitlines()] == [
        ["NAME", "PRINCIPAL", "STATE", "EXPIRES", "SHA-256", "MODELS", "ROUTES"],
        ["a", "a", "live", "never", "abababab", "*", "*"],
        ["b", "b", "expired", "1970-01-02", "00:00", "cdcdcdcd", "x,y*", "-"],
    ]


def test_a_key_is_revoked_in_its_line(file: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One line is new or changed, all the rest of the file is what it was, its mode too."""
    code, out, err = run(capsys, "keys", "revoke", "a", "--config", file)
    assert (code, out) == (0, f"{file}: the key 'a' is revoked\n")
    assert "SIGHUP" in err
    once = ODD.replace("# not sorted\n", "# not sorted\nrevoked = true\n")
    assert file.read_text() == once
    assert run(capsys, "keys", "revoke", "b", "--config", file)[0] == 0
    assert file.read_text() == once.replace("revoked = false", "revoked = true")
    assert file.stat().st_mode & 0o777 == 0o640
    assert run(capsys, "keys", "revoke", "b", "--config", file)[1] == f"{file}: the key 'b' is revoked already\n"
    assert [line.split()[2] for line in run(capsys, "keys", "list", "-c", file)[1].splitlines()[1:]] == ["revoked"] * 2
    assert os.listdir(file.parent) == ["canal.toml"]


def test_what_cannot_be_edited_is_left_alone(file: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    """An inline table has no line of its own: it is said, and nothing is written."""
    text = f'key = [{{ name = "a", sha256 = "{HASHES[0]}" }}]\n'
    file.write_text(text)
    code, _, err = run(capsys, "keys", "revoke", "a", "--config", file)
    assert (code, "do it by hand" in err, file.read_text()) == (2, True, text)


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["revoke", "zz", "-c", "FILE"], "there is no key named 'zz'; there is a, b"),
        (["new", "a", "--into", "FILE"], "there is a key named 'a' already"),
        (["list"], "which keys? Give --config FILE"),
        (["list", "-c", "nowhere.toml"], "nowhere.toml: cannot read the configuration"),
        (["new", "c", "--principal", ""], "--principal: expected a name"),
        (["new", "c", "--expires", "soon"], "--expires"),
    ],
)
def test_complaints(
    file: pathlib.Path, capsys: pytest.CaptureFixture[str], arguments: list[str], complaint: str
) -> None:
    """Bad usage is exit code 2 with a sentence, and changes nothing."""
    code, _, err = run(capsys, "keys", *[str(file) if one == "FILE" else one for one in arguments])
    assert (code, file.read_text()) == (2, ODD)
    assert complaint in err


@pytest.mark.parametrize(("option", "name"), [("--model", "fsat"), ("--route", "flies")])
def test_a_misspelt_model_in_a_new_key_broke_the_file(
    tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str], option: str, name: str
) -> None:
    """What no gateway would start with is not put into its configuration, and no key is shown for it."""
    file = tmp_path / "canal.toml"
    shutil.copy(EXAMPLE, file)
    code, out, err = run(capsys, "keys", "new", "c", option, name, "--into", file)
    assert (code, out, file.read_text()) == (2, "", EXAMPLE.read_text())
    assert f"named '{name}'" in err
    assert "nothing was written" in err
    assert str(file) in err
    assert os.listdir(tmp_path) == ["canal.toml"]


def test_a_new_key_is_put_into_a_file(file: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The key is printed, alone; the file gets its hash and all that was said, at its end."""
    options = ("--principal", "team", "--model", "x", "--model", "y*", "--expires", "2100-01-02", "--into", file)
    code, out, err = run(capsys, "keys", "new", 'c "3"', *options)
    assert code == 0
    assert "only this once" in err
    key = out.strip()
    assert key.startswith("sk-canal-")
    text = file.read_text()
    assert text.startswith(ODD)
    assert key not in text
    digest = hashlib.sha256(key.encode()).hexdigest()
    found = load(Flags(config=str(file)), {"NOT_SET_HERE": "x"}).keys[-1]
    assert found == Key('c "3"', digest, ("x", "y*"), principal="team", expires=4102531200.0)


# -- schema ------------------------------------------------------------------------------------------------------------


def plain(value: Any) -> Any:
    """A TOML document as JSON has it."""
    return json.loads(json.dumps(value, default=str))


def complete(text: str) -> dict[str, Any]:
    """The example with what it comments out."""
    lines = [line.removeprefix("# ") if " = " in line or line.startswith("# [") else line for line in text.splitlines()]
    return tomllib.loads("\n".join(line.partition("  #")[0] for line in lines))


def test_the_schema_is_one_and_the_example_fits(capsys: pytest.CaptureFixture[str]) -> None:
    """It is a valid JSON Schema, and so is the example by it, with everything in it switched on, too."""
    printed = json.loads(run(capsys, "schema")[1])
    assert printed == json_schema()
    jsonschema.Draft202012Validator.check_schema(printed)
    judge = jsonschema.Draft202012Validator(printed)
    text = EXAMPLE.read_text()
    for document in (tomllib.loads(text), complete(text)):
        assert [error.message for error in judge.iter_errors(plain(document))] == []
    assert len(complete(text)["server"]) > 6


@pytest.mark.parametrize(
    "text",
    [
        "x = 1",
        "[server]\nworker = 2",
        "[[upstream]]\nname = 'a'",
        "[[upstream]]\nname = 'a'\nbase_url = 3",
        "[[upstream]]\nname = 'a'\nbase_url = 'x'\napi_key = { enw = 'X' }",
        "[[model]]\nname = 'm'\nupstreams = [{ nam = 'a' }]",
        "[server.tls]\ncertificate = 'a'",
        "[upstream]\nname = 'a'",
        "[[key]]\nname = 'k'\nsha256 = 'x'\nrevoked = 'no'",
    ],
)
def test_the_schema_refuses_what_the_decoder_refuses(text: str) -> None:
    """Unknown keys, missing ones and wrong kinds, down to the innermost table."""
    judge = jsonschema.Draft202012Validator(json_schema())
    assert list(judge.iter_errors(plain(tomllib.loads(text))))


def test_the_schema_has_every_table() -> None:
    """A table that is new in the file is in the schema, or this fails."""
    assert {*TABLES, *ARRAYS} == set(schema.FileTables.__struct_fields__)


def test_the_example_loads(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """It is a configuration with which a gateway starts, and nothing in it is unwise."""
    monkeypatch.setenv("OPENAI_API_KEY", "sk-x")
    code, out, err = run(capsys, "check", EXAMPLE)
    assert (code, out) == (0, f"{EXAMPLE}: ok: 2 upstreams, 3 models, 2 keys\n")
    assert err == ""


# -- advice ------------------------------------------------------------------------------------------------------------

NAME = "[[upstream]]\nname = 'u'\nbase_url = '{}'\n"
KEY = f"[[key]]\nname = 'k'\nsha256 = '{HASHES[2]}'\n"
HERE = NAME.format("http://127.0.0.1:1/v1")
FAR = NAME.format("http://far.example/v1")


@pytest.mark.parametrize(
    ("text", "remarks"),
    [
        (HERE + KEY, []),
        ("[server]\nlisten = ['0.0.0.0:8080']\n" + HERE + KEY, ["server.listen: clients' keys travel in the clear"]),
        ("[server]\nlisten = ['h.example:1']\n" + HERE, ["server.listen: there is no [[key]]"]),
        ("[server]\nadmin = '0.0.0.0:9'\n" + HERE, ["server.admin: 0.0.0.0:9 shows to everybody"]),
        ("[server]\nallow_anonymous = true\n" + HERE + "api_key = {env='A'}\n", ["server.allow_anonymous: whoever"]),
        (HERE + "api_key = 'x'\n" + KEY, ["upstream[0].api_key: a secret in the file", "FILE: it holds secrets"]),
        (FAR + "api_key = {env='A'}\n" + KEY, ["upstream[0].base_url: its key travels in the clear to 'far.example'"]),
        (FAR + KEY, ["upstream[0]: it has no api_key, and clients' keys are not passed on"]),
        (
            HERE + "[[upstream]]\nname = 'v'\nbase_url = 'http://[::1]:1'\n[[model]]\nname = 'm'\nupstreams = ['u']\n",
            ["upstream[1]: no [[model]] and no [[route]] leads to 'v'"],
        ),
        (HERE + KEY + "expires = 1970-01-09\n", ["key[0].expires: the key 'k' has expired"]),
        (HERE + KEY + "expires = 1970-01-15\n", ["key[0].expires: the key 'k' expires within two weeks"]),
        (HERE + KEY + "expires = 1970-01-09\nrevoked = true\n", []),
        (HERE + KEY + "models = []\n", ["key[0].models: the key 'k' opens no model"]),
        (HERE + KEY + "models = ['x*']\n[[model]]\nname='m'\nupstreams=['u']\n", ["key[0].models: the key 'k' opens"]),
        (
            HERE + KEY + "models = ['m']\nroutes = ['r']\n[[route]]\nname = 'r'\npath = '/v1/*'\nupstreams = ['u']\n",
            ["key[0].routes: the route 'r' takes /v1/chat/completions whatever the model"],
        ),
        (
            HERE + "[limits]\nredis = 'redis://:x@h'\n[ledger]\njournal = 'j'\npostgres = 'postgresql://u:x@h/d'\n",
            ["ledger.postgres: a secret in", "limits.redis: a secret in the file", "FILE: it holds secrets"],
        ),
        (HERE + "[limits]\nredis = 'redis://h'\n[ledger]\nfile = 'l'\n", []),
        (
            HERE + "[[model]]\nname = 'a'\nupstreams = ['u']\n[[model]]\nname = 'b*'\nupstreams = ['u']\n"
            "[[model]]\nname = 'c'\nupstreams = [{ name = 'u', model = 'd' }]\n[limits]\nstate = 's'\n"
            "[[price]]\nmodel = 'a'\n[[limit]]\nspend_per_day = 1\n",
            ["model[2]: 'd' at 'u' has no [[price]]: no budget stops it"],
        ),
        (HERE + "[[model]]\nname = 'a'\nupstreams = ['u']\n[[limit]]\nstreams = 1\n[[price]]\nmodel = 'x'\n", []),
        (HERE + "[deadlines]\nfirst_byte = 5\n", ["deadlines.first_byte: some models think"]),
        (HERE + "[deadlines]\nupstream_idle = 5\n", ["deadlines.upstream_idle: some models pause"]),
    ],
)
def test_what_is_unwise_is_told(tmp_path: pathlib.Path, text: str, remarks: list[str]) -> None:
    """Each with its place; what is wise draws no remark."""
    path = tmp_path / "canal.toml"
    path.write_text(text)
    path.chmod(0o644)
    settings = load(Flags(config=str(path)), {"A": "sk-a"})
    got = advice(settings, read_file(str(path))[0], str(path), 9 * 86400.0)
    assert len(got) == len(remarks)
    for remark, said in zip(remarks, got, strict=True):
        assert said.startswith(remark.replace("FILE", str(path)))


def test_a_failed_write_leaves_the_old_file(
    file: pathlib.Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing of a new file is left behind when it cannot take the old one's place."""
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError("full")))
    code, _, _ = run(capsys, "keys", "revoke", "a", "-c", file)
    assert code == 1
    assert file.read_text() == ODD
    assert os.listdir(file.parent) == ["canal.toml"]
