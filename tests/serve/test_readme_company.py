"""The README's configuration for a company is run as it stands there, with its own commands."""

from __future__ import annotations

import csv
import io
import json
import re
import shlex
import signal
import socket
import subprocess
from pathlib import Path

import pytest
import trio
from serve_fakes import read_all
from serve_process import CLEAN, COMMAND, running

from canal_trio.testing.scripts import chat_stream
from canal_trio.testing.upstreams import ScriptedUpstream

README = (Path(__file__).parents[2] / "README.md").read_text()
SECTION = README[README.index("\n## For a company\n") : README.index("\n## The shape\n")]
CONFIG, SHELL = re.findall(r"^```(?:toml|sh)\n(.*?)^```$", SECTION, re.DOTALL | re.MULTILINE)


def command_line(word: str) -> list[str]:
    """The words of the one command that has `word` after its program."""
    (line,) = [line for line in SHELL.splitlines() if line.startswith(f"canal-trio {word} ")]
    return shlex.split(line, comments=True)[1:]


def run(folder: Path, word: str, *more: str) -> str:
    """What the README's command says on stdout."""
    argv = [*COMMAND, *command_line(word), *more]
    environ = CLEAN | {"OPENAI_API_KEY": "sk-of-ours"}
    done = subprocess.run(argv, cwd=folder, env=environ, check=True, capture_output=True, text=True, timeout=60)
    assert "warning" not in done.stderr, done.stderr
    return done.stdout


async def test_the_companys_file_does_what_the_readme_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A key is made, the GPU that is not there gives way to the cloud, which sees its own name and key, and the ledger
    tells what the team used and what that cost."""
    monkeypatch.chdir(tmp_path)
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))
        async with ScriptedUpstream(chat_stream(5, usage=True)) as cloud:
            text = CONFIG.replace("https://api.openai.com/v1", cloud.base_url)
            text = text.replace("http://10.0.0.7:8000/v1", f"http://127.0.0.1:{nobody.getsockname()[1]}/v1")
            assert text.count("127.0.0.1") == 2
            (tmp_path / "gateway.toml").write_text(text)
            key = run(tmp_path, "keys").strip()
            assert re.fullmatch(r"sk-canal-\S+", key)
            assert "ok: 2 upstreams, 1 model, 1 key" in run(tmp_path, "check")
            flags = command_line("serve")[1:]
            async with running(*flags, environ={"OPENAI_API_KEY": "sk-of-ours"}) as process:
                body = json.dumps({"model": "fast", "stream": True, "messages": []}).encode()
                client = await process.connect(await process.address())
                head = f"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {key}\r\n"
                head += f"content-type: application/json\r\ncontent-length: {len(body)}\r\nconnection: close\r\n\r\n"
                await client.send_all(head.encode() + body)
                with trio.fail_after(20):
                    answer = await read_all(client)
                assert b"[DONE]" in answer
                assert b"x-ratelimit-remaining-requests: 599" in answer
                process.signal(signal.SIGTERM)
                assert await process.ended() == 0
            (seen,) = cloud.requests
            assert seen.json["model"] == "gpt-4o-mini"
            assert seen.header("authorization") == "Bearer sk-of-ours"
    (row,) = csv.DictReader(io.StringIO(run(tmp_path, "usage", "--format", "csv")))
    assert (row["key"], row["exchanges"], row["estimated"], row["unpriced"]) == ("team-a", "1", "0", "0")
    assert float(row["cost"]) > 0
    assert (tmp_path / "spent.json").exists()
