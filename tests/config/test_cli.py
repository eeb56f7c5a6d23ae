"""The command line: exit codes, clear words, and no traceback."""

from __future__ import annotations

import hashlib
import pathlib
import subprocess
import sys

import pytest

import canal_trio
from canal_trio import cli
from canal_trio.config import Flags, load
from canal_trio.errors import CanalError
from canal_trio.policy.routing import Router

UPSTREAM = '[[upstream]]\nname = "a"\nbase_url = "http://127.0.0.1:1/v1"\n'


@pytest.fixture(autouse=True)
def _no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("CANAL_CONFIG", "CANAL_LISTEN", "CANAL_UPSTREAM", "CANAL_WORKERS", "CANAL_ADMIN", "CANAL_LOG"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.delenv("CANAL_TRACEBACK", raising=False)


def _run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    """Exit code, output and errors of one command."""
    with pytest.raises(SystemExit) as caught:
        cli.main(arguments)
    out, err = capsys.readouterr()
    code = caught.value.code
    assert isinstance(code, int)
    assert "Traceback" not in err
    return code, out, err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--bogus"], "No such option '--bogus'"),
        (["bogus"], "No such command 'bogus'"),
        (["serve", "--bogus"], "No such option '--bogus'"),
        (["serve", "--config"], "Option '--config' requires an argument"),
        (["serve", "extra"], "Got unexpected extra argument (extra)"),
        (["check"], "Missing argument 'FILE'"),
        (["keys", "new"], "Missing argument 'NAME'"),
        (["keys", "new", ""], "Invalid value for NAME: expected a name of 1 to 128 printable characters, got ''"),
        (["serve"], "there is none to relay to; give --upstream URL"),
        (["serve", "--upstream", "nonsense"], "--upstream: expected a base URL"),
        (["serve", "--upstream", "http://a", "--listen", "nonsense"], "--listen: expected HOST:PORT"),
        (["serve", "--upstream", "http://a", "--admin", "nonsense"], "--admin: expected 'off' or HOST:PORT"),
        (["serve", "--upstream", "http://a", "--log", "nonsense"], "--log: expected 'text' or 'json'"),
        (["serve", "--upstream", "http://a", "--workers", "0"], "--workers: expected 1 to 256 or 'auto', got '0'"),
        (["serve", "--config", "/nowhere"], "/nowhere: cannot read the configuration: No such file or directory"),
    ],
)
def test_bad_usage_is_2(capsys: pytest.CaptureFixture[str], arguments: list[str], words: str) -> None:
    """Every malformed flag, argument or file exits with 2 and words that name it, and prints nothing on stdout."""
    code, out, err = _run(capsys, *arguments)
    assert code == 2
    assert words in err
    assert out == ""


def test_a_bad_variable_is_2(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """A malformed environment variable is named as such."""
    monkeypatch.setenv("CANAL_LISTEN", "everywhere")
    code, _, err = _run(capsys, "serve", "--upstream", "http://127.0.0.1:1")
    assert code == 2
    assert err == "CANAL_LISTEN: expected HOST:PORT, such as 127.0.0.1:8080 or [::1]:8080; got 'everywhere'\n"


def test_check(capsys: pytest.CaptureFixture[str], tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """check says ok with 0, or every mistake with file:line and 2."""
    file = tmp_path / "canal.toml"
    file.write_text(UPSTREAM)
    assert _run(capsys, "check", str(file)) == (0, f"{file}: ok: 1 upstream, 0 models, 0 keys\n", "")
    monkeypatch.setenv("CANAL_LISTENS", "x")
    assert "warning: the environment variable 'CANAL_LISTENS' is not read" in _run(capsys, "check", str(file))[2]
    file.write_text(UPSTREAM + "[server]\nlisten = 7\nlgo = 'x'\n")
    code, out, err = _run(capsys, "check", str(file))
    assert (code, out) == (2, "")
    assert [line.split(": ")[:2] for line in err.splitlines()[-2:]] == [
        [f"{file}:5", "server.listen"],
        [f"{file}:6", "server.lgo"],
    ]


@pytest.mark.parametrize("name", ["team-a", 'odd "name" \\ é'])
def test_a_new_key_works(capsys: pytest.CaptureFixture[str], tmp_path: pathlib.Path, name: str) -> None:
    """The printed TOML lets in exactly the printed key, under the given name; the key itself is not in the TOML."""
    code, out, _ = _run(capsys, "keys", "new", name)
    assert code == 0
    key, _, toml = out.partition("\n")
    assert key.startswith("sk-canal-")
    assert key not in toml
    file = tmp_path / "canal.toml"
    file.write_text(UPSTREAM + toml)
    settings = load(Flags(config=str(file)), {})
    assert settings.keys[0].name == name
    assert settings.keys[0].sha256 == hashlib.sha256(key.encode()).hexdigest()
    assert Router(settings).keyed
    assert _run(capsys, "keys", "new", name)[1] != out


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    """--version names the program and its version."""
    assert _run(capsys, "--version") == (0, f"canal-trio, version {canal_trio.__version__}\n", "")


def test_help_names_the_commands(capsys: pytest.CaptureFixture[str]) -> None:
    """--help lists every command, and serve --help every flag."""
    out = _run(capsys, "--help")[1]
    assert all(command in out for command in ("serve", "demo", "check", "keys"))
    out = _run(capsys, "serve", "-h")[1]
    assert all(flag in out for flag in ("--config", "--listen", "--upstream", "--workers", "--admin", "--log"))


def _plant(monkeypatch: pytest.MonkeyPatch, fault: BaseException) -> None:
    def fail(*_: object, **__: object) -> None:
        raise fault

    monkeypatch.setattr(cli, "load", fail)


def test_the_unexpected_is_1(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """A bug is one line with type and place, one with the way to a traceback, and exit code 1."""
    _plant(monkeypatch, ExceptionGroup("several", [KeyError("x"), ValueError("y")]))
    code, _, err = _run(capsys, "check", "x")
    assert code == 1
    assert err.splitlines() == [
        "canal-trio: unexpected: KeyError: 'x', and 1 more",
        "canal-trio: this is a bug; set CANAL_TRACEBACK=1 to see where it comes from",
    ]


def test_the_traceback_on_request(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """CANAL_TRACEBACK=1 shows it."""
    monkeypatch.setenv("CANAL_TRACEBACK", "1")
    _plant(monkeypatch, KeyError("x"))
    with pytest.raises(SystemExit):
        cli.main(["check", "x"])
    assert "Traceback (most recent call last)" in capsys.readouterr().err


def test_failures_of_ours_are_1(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """A failure we know is its own words, also out of a nursery; an interrupt is told as one."""
    _plant(monkeypatch, CanalError("no luck"))
    assert _run(capsys, "check", "x")[::2] == (1, "canal-trio: no luck\n")
    _plant(monkeypatch, ExceptionGroup("nursery", [ExceptionGroup("inner", [CanalError("no luck")])]))
    assert _run(capsys, "check", "x")[::2] == (1, "canal-trio: no luck\n")
    _plant(monkeypatch, KeyboardInterrupt())
    assert _run(capsys, "check", "x")[::2] == (1, "\ncanal-trio: interrupted\n")  # below the terminal's ^C


def test_a_reader_that_leaves_is_no_traceback(tmp_path: pathlib.Path) -> None:
    """`canal-trio … | head -0` ends quietly."""
    script = f"{sys.executable} -m canal_trio --help | true; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["/bin/bash", "-c", script], capture_output=True, text=True, timeout=60, check=False)
    assert done.stderr == ""
    assert done.returncode in (0, 1)


def test_a_full_disk_was_called_a_bug() -> None:
    """Output that finds no room is the disk's fault, and said so."""
    with open("/dev/full", "w") as full:
        argv = [sys.executable, "-m", "canal_trio", "schema"]
        done = subprocess.run(argv, stdout=full, stderr=subprocess.PIPE, text=True, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (
        1,
        "canal-trio: the output cannot be written: No space left on device\n",
    )


def test_the_library_does_not_import_the_command_line() -> None:
    """Importing the library, the relay or the serving floor pulls in neither click nor the command line."""
    code = (
        "import sys, canal_trio, canal_trio.relay, canal_trio.serve, canal_trio.observe\n"
        "assert not {'click', 'canal_trio.cli', 'canal_trio.config'} & set(sys.modules), sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert done.stderr == ""
