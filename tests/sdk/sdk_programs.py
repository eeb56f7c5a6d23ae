"""Real programs in subprocesses, for the tests in this folder. Each is ended by its own handle."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Self

BIN = Path(sys.executable).parent  # the virtual environment's programs
ENVIRONMENT = dict(os.environ)  # as it was at the start
# What could bend a test from outside: proxies, keys and settings of whoever runs it.
FOREIGN = re.compile(r"(?i)(.*_proxy|(OPENAI|CANAL|LLMOCK|NODE)_.*)")


def clean_environment(**more: str) -> dict[str, str]:
    """The environment without what could bend a test."""
    return {name: value for name, value in os.environ.items() if not FOREIGN.fullmatch(name)} | more


class Program:
    """A subprocess; what it says on both its outputs is kept line by line."""

    def __init__(self, argv: Sequence[str | Path], **more: str) -> None:
        self.lines: list[str] = []
        self._news = threading.Condition()
        self._silent = False
        self.process = subprocess.Popen(
            argv,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            env=clean_environment(PYTHONUNBUFFERED="1", **more),
        )
        assert self.process.stdout is not None
        self._reader = threading.Thread(target=self._read, args=(self.process.stdout,), daemon=True)
        self._reader.start()

    def _read(self, output: IO[str]) -> None:
        with output:
            for line in output:
                with self._news:
                    self.lines.append(line.rstrip("\n"))
                    self._news.notify_all()
        with self._news:
            self._silent = True
            self._news.notify_all()

    @property
    def text(self) -> str:
        """All it said."""
        return "\n".join(self.lines)

    def wait_for(self, pattern: str, seconds: float = 30.0) -> re.Match[str]:
        """The first match of `pattern` in its lines; AssertionError with what it said if there is none in time."""
        with self._news:
            self._news.wait_for(lambda: self._silent or re.search(pattern, self.text), seconds)
            match = re.search(pattern, self.text)
        assert match, f"no {pattern!r} from {self.process.args}:\n{self.text}"
        return match

    def stop(self, seconds: float = 10.0) -> int:
        """SIGTERM, and after a while SIGKILL; its exit code."""
        self.process.terminate()
        try:
            return self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            return self.process.returncode
        finally:
            self.process.kill()
            self.process.wait()
            self._reader.join(seconds)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()


@dataclass(frozen=True)
class GatewayProcess:
    """A running `canal-trio serve`. `url` is its root, `base_url` what one gives to an SDK."""

    program: Program
    url: str

    @property
    def base_url(self) -> str:
        """The root with `/v1`."""
        return f"{self.url}/v1"


@contextmanager
def gateway_for(upstream: str, *flags: str) -> Iterator[GatewayProcess]:
    """`canal-trio serve` in front of `upstream`. In the end it has to drain, exit 0, and never have shown a
    traceback."""
    argv = [BIN / "canal-trio", "serve", "--listen", "127.0.0.1:0", "--admin", "off", "--upstream", upstream, *flags]
    with Program(argv) as program:
        url = program.wait_for(r"(?m)^listening on (http://\S+)$")[1]
        yield GatewayProcess(program, url)
        code = program.stop()
    assert "Traceback" not in program.text, program.text
    assert code == 0, program.text
