"""Layers and complaints: what wins, what is refused, and the exact words in which it is."""

from __future__ import annotations

import dataclasses
import math
import os
import pathlib
from collections.abc import Callable

import pytest
import trustme

from canal_trio.config import Flags, load, strange_variables
from canal_trio.errors import ConfigError
from canal_trio.settings import Bounds, Deadlines, Key, Model, Price, Route, Settings, Target, Upstream

HASH = "ab" * 32
MINIMAL = '[[upstream]]\nname = "a"\nbase_url = "http://127.0.0.1:1/v1"\n'
Write = Callable[[str], str]


@pytest.fixture
def write(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> Write:
    """Write a configuration into the working directory; its name is `canal.toml`."""
    monkeypatch.chdir(tmp_path)

    def _write(text: str) -> str:
        pathlib.Path("canal.toml").write_bytes(text.encode("utf-8", "surrogateescape"))
        return "canal.toml"

    return _write


def _load(file: str, environ: dict[str, str] | None = None, **flags: object) -> Settings:
    return load(Flags(config=file, **flags), environ or {})  # type: ignore[arg-type]  # names and kinds are the test's


def _complaint(file: str, environ: dict[str, str] | None = None, **flags: object) -> str:
    with pytest.raises(ConfigError) as caught:
        _load(file, environ, **flags)
    return str(caught.value)


def test_everything(write: Write, tmp_path: pathlib.Path) -> None:
    """A file that uses every table gives exactly the settings it says."""
    authority = trustme.CA()
    authority.cert_pem.write_to_path(str(tmp_path / "ca.pem"))
    (tmp_path / "secret").write_text("sk-from-file\n")
    file = write(f'''
[server]
listen = ["127.0.0.1:1", "[::1]:2"]
admin = "off"
workers = 1
log = "json"
trusted_proxies = ["10.0.0.0/8", "::1"]
pseudonym = "edge"
allow_anonymous = false

[bounds]
piece_bytes = "8KiB"
capacity = 8
body_bytes = inf
client_connections = 100
upstream_connections = 32
held_body_bytes = "1MiB"

[deadlines]
drain = "1m"
first_byte = 600
exchange = "1h"
body_rate = "1KiB"

[[upstream]]
name = "local"
base_url = "http://127.0.0.1:8000/v1"

[[upstream]]
name = "cloud"
base_url = "https://api.example.com/v1"
api_key = {{ env = "CLOUD" }}
key_header = "api-key"
list_models = true
http2 = true
proxy = "http://proxy:3128"
ca_file = "ca.pem"
retry_sent = true
on_client_eof = "finish"
connections = 4
heartbeat = "15s"

[[upstream]]
name = "third"
base_url = "http://[::1]:9"
api_key = {{ file = "secret" }}

[[model]]
name = "gpt"
upstreams = ["local", "cloud"]

[[model]]
name = "*"
upstreams = ["third"]

[[model]]
name = "my/*"
upstreams = ["local", {{ name = "cloud", model = "*-2026" }}]

[[route]]
name = "files"
path = "/v1/files*"
upstreams = ["cloud"]

[[key]]
name = "team-a"
sha256 = "{HASH.upper()}"

[[key]]
name = "team-b"
sha256 = "{"cd" * 32}"
models = ["gpt"]
routes = ["files"]
principal = "b"
expires = 1970-01-02T00:00:00+01:00

[[key]]
name = "old"
sha256 = "{"ef" * 32}"
expires = 1970-01-02
revoked = true

[[price]]
model = "gpt"
output = 10
''')
    assert _load(file, {"CLOUD": "sk-cloud"}) == Settings(
        listen=(("127.0.0.1", 1), ("::1", 2)),
        admin=None,
        log="json",
        trusted_proxies=("10.0.0.0/8", "::1/128"),
        pseudonym="edge",
        upstreams=(
            Upstream("local", "http://127.0.0.1:8000/v1"),
            Upstream(
                "cloud",
                "https://api.example.com/v1",
                api_key="sk-cloud",
                key_header="api-key",
                list_models=True,
                http2=True,
                proxy="http://proxy:3128",
                ca_file="ca.pem",
                retry_sent=True,
                on_client_eof="finish",
                connections=4,
                heartbeat=15.0,
            ),
            Upstream("third", "http://[::1]:9", api_key="sk-from-file"),
        ),
        models=(
            Model("gpt", (Target("local"), Target("cloud"))),
            Model("*", (Target("third"),)),
            Model("my/*", (Target("local"), Target("cloud", "*-2026"))),
        ),
        routes=(Route("files", "/v1/files*", (Target("cloud"),)),),
        keys=(
            Key("team-a", HASH),
            Key("team-b", "cd" * 32, ("gpt",), ("files",), "b", 82800.0),
            Key("old", "ef" * 32, expires=86400.0, revoked=True),
        ),
        prices=(Price("gpt", output=10.0),),
        bounds=Bounds(
            piece_bytes=8192,
            capacity=8,
            body_bytes=math.inf,
            client_connections=100,
            upstream_connections=32,
            held_body_bytes=2**20,
        ),
        deadlines=Deadlines(drain=60.0, first_byte=600.0, exchange=3600.0, body_rate=1024),
    )


@pytest.mark.parametrize(
    ("table", "record"), [("bounds", Bounds), ("deadlines", Deadlines)], ids=["bounds", "deadlines"]
)
def test_every_number_is_a_key(write: Write, table: str, record: type) -> None:
    """Each bound and each deadline can be set to its own default, and to one more than it."""
    for field in dataclasses.fields(record):
        value = field.default
        if value is None:
            continue
        for chosen in (value, value if math.isinf(value) else value + 1):
            file = write(f"{MINIMAL}[{table}]\n{field.name} = {chosen}\n")
            assert getattr(getattr(_load(file), table), field.name) == chosen


def test_defaults_without_a_file() -> None:
    """One flag is enough to serve."""
    assert load(Flags(upstream=("http://127.0.0.1:8000/v1",)), {}) == Settings(
        upstreams=(Upstream("127.0.0.1:8000", "http://127.0.0.1:8000/v1"),)
    )


def test_flags_beat_environment_beats_file(write: Write) -> None:
    """Each of the layers wins over those below it, key by key."""
    file = write('[server]\nlisten = "127.0.0.1:1"\nadmin = "127.0.0.1:2"\nlog = "json"\n' + MINIMAL)
    environ = {
        "CANAL_LISTEN": "127.0.0.1:11 127.0.0.1:12",
        "CANAL_ADMIN": "off",
        "CANAL_UPSTREAM": "http://e:1, http://f:1",
    }
    in_file = _load(file)
    assert (in_file.listen, in_file.admin, in_file.log) == ((("127.0.0.1", 1),), ("127.0.0.1", 2), "json")
    in_environment = _load(file, environ)
    assert in_environment.listen == (("127.0.0.1", 11), ("127.0.0.1", 12))
    assert (in_environment.admin, in_environment.log) == (None, "json")
    assert [upstream.base_url for upstream in in_environment.upstreams] == ["http://e:1", "http://f:1"]
    in_flags = _load(file, environ, listen=("[::1]:0",), upstream=("http://g:1",), admin="127.0.0.1:3", log="text")
    assert (in_flags.listen, in_flags.admin, in_flags.log) == ((("::1", 0),), ("127.0.0.1", 3), "text")
    assert [upstream.name for upstream in in_flags.upstreams] == ["g:1"]


def test_workers_in_every_layer(write: Write) -> None:
    """A number, or one per processor that this process may use; flags beat environment beats file."""
    assert _load(write(MINIMAL)).workers == 1
    file = write("[server]\nworkers = 3\n" + MINIMAL)
    assert _load(file).workers == 3
    assert _load(file, {"CANAL_WORKERS": "4"}).workers == 4
    assert _load(file, {"CANAL_WORKERS": "4"}, workers="5").workers == 5
    processors = len(os.sched_getaffinity(0))
    assert _load(file, workers="auto").workers == processors
    assert _load(write('[server]\nworkers = "auto"\n' + MINIMAL)).workers == processors


def test_the_file_may_come_from_the_environment(write: Write) -> None:
    """CANAL_CONFIG names the file, --config wins, and an empty variable counts as unset."""
    file = write(MINIMAL)
    assert load(Flags(), {"CANAL_CONFIG": file, "CANAL_LOG": " "}).upstreams[0].name == "a"
    assert load(Flags(config=file), {"CANAL_CONFIG": "/nowhere"}).upstreams[0].name == "a"


def _cases() -> list[tuple[str, str]]:
    """What is written and the whole complaint, from `complaints.txt`."""
    text = pathlib.Path(__file__).with_name("complaints.txt").read_text()
    blocks = text.partition("\n")[2].split("===\n")[:-1]
    return [(written, said.rstrip("\n")) for written, _, said in (block.partition("---\n") for block in blocks)]


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        *_cases(),
        ("a = 1\nb = '\udcff'\n", "canal.toml:2: not UTF-8: expected a configuration in TOML"),
        ("a = " + "[" * 5000, "canal.toml:1: nested too deeply: expected a configuration in TOML"),
    ],
)
def test_complaints(write: Write, text: str, complaint: str) -> None:
    """Each mistake gets one line with file, line, key, what is wrong and what was expected, and shows no secret."""
    got = _complaint(write(text), {"EMPTY": ""})
    assert got == complaint or (complaint.endswith("…") and got.startswith(complaint[:-1]))
    assert "hunter2" not in got


@pytest.mark.parametrize(
    ("flags", "environ", "complaint"),
    [
        ({"listen": ("x",)}, {}, "--listen: expected HOST:PORT, such as 127.0.0.1:8080 or [::1]:8080; got 'x'"),
        ({"listen": ("a:1", "a:1")}, {}, "--listen: an address is given twice"),
        ({"listen": (",",)}, {}, "--listen: expected HOST:PORT, got ','"),
        ({"listen": ("",)}, {}, "--listen: expected a value, got nothing"),
        ({}, {"CANAL_LISTEN": "127.0.0.1:99999"}, "CANAL_LISTEN: expected a port from 0 to 65535, got '99999'"),
        ({"admin": "on"}, {}, "--admin: expected 'off' or HOST:PORT, such as 127.0.0.1:8080 or [::1]:8080; got 'on'"),
        (
            {"admin": "127.0.0.1:8080"},
            {},
            "--admin: expected an address of its own, got '127.0.0.1:8080', which is the gateway's",
        ),
        ({"workers": "-2"}, {}, "--workers: expected 1 to 256 or 'auto', got '-2'"),
        ({}, {"CANAL_WORKERS": "many"}, "CANAL_WORKERS: expected 1 to 256 or 'auto', got 'many'"),
        ({"workers": "٣"}, {}, "--workers: expected 1 to 256 or 'auto', got '٣'"),
        ({}, {"CANAL_LOG": "yaml"}, "CANAL_LOG: expected 'text' or 'json', got 'yaml'"),
        ({"log": ""}, {}, "--log: expected a value, got nothing"),
        (
            {"upstream": ("127.0.0.1:1",)},
            {},
            "--upstream: expected a base URL as an OpenAI SDK takes it, such as http://127.0.0.1:8000/v1: "
            "'127.0.0.1:1' must begin with http:// or https://",
        ),
        (
            {},
            {"CANAL_UPSTREAM": "http://a:1,http://a:1"},
            "CANAL_UPSTREAM: 'a:1' is given twice",
        ),
        (
            {"upstream": ("http://a:1/x", "http://a:1/y")},
            {},
            "--upstream: 'a:1' would be the name of both; "
            "two upstreams of one host need names of their own, in a configuration file",
        ),
        ({}, {"CANAL_UPSTREAM": ","}, "CANAL_UPSTREAM: expected a list of URLs, got ','"),
    ],
)
def test_complaints_about_flags_and_variables(
    write: Write, flags: dict[str, object], environ: dict[str, str], complaint: str
) -> None:
    """A bad flag or variable is named as the user wrote it, with what was expected."""
    assert _complaint(write(MINIMAL), environ, **flags) == complaint


def test_every_mistake_is_told_at_once(write: Write) -> None:
    """Mistakes come in the order of the file, all in one go, and beyond twenty they are counted."""
    file = write('[server]\nlog = "x"\n[bounds]\ncapacity = 0\nwaiter = 1\n' + MINIMAL)
    lines = _complaint(file, log="y").splitlines()
    assert [line.split(": ")[0] for line in lines] == ["--log", "canal.toml:2", "canal.toml:4", "canal.toml:5"]
    file = write("".join(f"k{number} = 1\n" for number in range(40)) + MINIMAL)
    lines = _complaint(file).splitlines()
    assert len(lines) == 21
    assert lines[-1] == "… and 20 more"


def test_upstreams_replaced_from_outside(write: Write) -> None:
    """When a flag replaces the file's upstreams, a model that names one of those is told why it is gone."""
    file = write(MINIMAL + "[[model]]\nname = 'm'\nupstreams = ['a']\n")
    assert _complaint(file, upstream=("http://b:1",)) == (
        "canal.toml:6: model[0].upstreams[0]: there is no upstream named 'a': --upstream replaces those of the file"
    )


def test_a_faulty_upstream_is_still_known(write: Write) -> None:
    """A mistake in an upstream is told once, and not again for each model that names it."""
    file = write("[[upstream]]\nname = 'a'\nbase_url = 3\n[[model]]\nname = 'm'\nupstreams = ['a']\n")
    assert _complaint(file) == "canal.toml:3: upstream[0].base_url: expected a string, got a whole number"


@pytest.mark.parametrize("text", [f"[[key]]\nname = 'k'\nsha256 = '{HASH}'\n", "[server]\nallow_anonymous = true\n"])
def test_an_upstream_with_a_key_needs_keys_or_consent(write: Write, text: str) -> None:
    """With clients' keys, or with allow_anonymous, an upstream's api_key is accepted."""
    assert _load(write(MINIMAL + "api_key = 'sk-x'\n" + text)).upstreams[0].api_key == "sk-x"


def test_secrets_are_in_no_repr(write: Write, tmp_path: pathlib.Path) -> None:
    """Settings can be printed without giving a secret away."""
    (tmp_path / "secret").write_text("sk-hunter2")
    text = MINIMAL + "api_key = { file = 'secret' }\nproxy = { env = 'PROXY' }\n[server]\nallow_anonymous = true\n"
    settings = _load(write(text), {"PROXY": "http://u:hunter2@p:1"})
    assert settings.upstreams[0].api_key == "sk-hunter2"
    assert settings.upstreams[0].proxy == "http://u:hunter2@p:1"
    assert "hunter2" not in repr(settings)


def test_paths_start_at_the_file(write: Write, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Files named in a configuration are looked for beside it, wherever the program was started."""
    (tmp_path / "secret").write_text("sk-x")
    write(MINIMAL + "api_key = { file = 'secret' }\n[server]\nallow_anonymous = true\n")
    monkeypatch.chdir("/")
    assert _load(str(tmp_path / "canal.toml")).upstreams[0].api_key == "sk-x"


@pytest.mark.parametrize(
    ("name", "complaint"),
    [
        ("nowhere.toml", "nowhere.toml: cannot read the configuration: No such file or directory"),
        (".", ".: cannot read the configuration: Is a directory"),
        ("a\0b", "a\0b: cannot read the configuration: embedded null byte"),
        ("/dev/zero", "/dev/zero: larger than 4194304 bytes: expected a configuration in TOML"),
    ],
)
def test_files_that_cannot_be_read(write: Write, name: str, complaint: str) -> None:
    """A configuration that is missing, a folder, or endless is named with the reason."""
    write("")
    assert _complaint(name) == complaint


def test_windows_line_ends(write: Write) -> None:
    """CRLF changes neither the meaning nor the line numbers."""
    text = (MINIMAL + "[server]\nlog = 'x'\n").replace("\n", "\r\n")
    assert _complaint(write(text)) == "canal.toml:5: server.log: expected 'text' or 'json', got 'x'"


def test_a_file_that_begins_with_a_byte_order_mark(write: Write) -> None:
    """Some editors write one: it is no part of the first line."""
    settings = load(Flags(write("\ufeff" + MINIMAL)), {})
    assert settings.upstreams[0].name == "a"


def test_remarks_on_variables() -> None:
    """A misspelt variable is remarked on; one that only shares the prefix is not."""
    environ = {"CANAL_UPSTREAMS": "x", "CANAL_SERVICE_HOST": "1.2.3.4", "CANAL_PORT": "tcp://1", "CANAL_LOG": "text"}
    assert strange_variables(environ) == [
        "the environment variable 'CANAL_UPSTREAMS' is not read; did you mean 'CANAL_UPSTREAM'?"
    ]
