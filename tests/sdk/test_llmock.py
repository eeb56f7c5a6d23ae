"""A mock that judges its client: what it sees through the gateway must be what a careful application does."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import httpcore
import openai
import pytest
import trio
from openai_drivers import stream_chat
from sdk_programs import BIN, Program, gateway_for

pytestmark = [
    pytest.mark.real,
    # As in test_openai_python.py.
    pytest.mark.filterwarnings("ignore:Async generator '(openai|httpx2|httpcore2):ResourceWarning"),
]


@dataclass(frozen=True)
class Mock:
    """The running mock, and the gateway in front of it."""

    url: str
    base_url: str

    async def ask(self, method: str, path: str, body: Any = None) -> Any:
        """Its control interface, directly."""
        async with httpcore.AsyncConnectionPool() as pool:
            content = None if body is None else json.dumps(body).encode()
            headers = {"Content-Type": "application/json"}
            response = await pool.request(method, f"{self.url}/_llmock/{path}", content=content, headers=headers)
        assert response.status < 300, response.content
        return json.loads(response.content or b"null")

    async def plan(self, **behaviour: Any) -> None:
        """Forget what was, and misbehave like this, once."""
        await self.ask("POST", "reset")
        await self.ask("POST", "scenario", {"behaviors": [behaviour]})

    async def judge(self, *, attempts: int) -> None:
        """It saw this many attempts, and has nothing to complain about."""
        verdict = await self.ask("GET", "verdict")
        assert verdict["findings"] == []
        assert verdict["passed"]
        assert verdict["calls"] == 1
        assert verdict["attempts"] == attempts


@pytest.fixture(scope="module")
def mock() -> Iterator[Mock]:
    """llmock, and a gateway in front of it."""
    argv = [BIN / "llmock", "serve", "--host", "127.0.0.1", "--port", "0", "--stream-chunk-delay-ms", "5"]
    with Program(argv) as program:
        url = program.wait_for(r"running on (http://\S+)", 60)[1]
        with gateway_for(f"{url}/v1") as gateway:
            yield Mock(url, gateway.base_url)


async def careful(mock: Mock, text: str, *, patience: float | None = None) -> list[str]:
    """What a careful application does: it takes no answer for whole that has no finish reason, and tries again, a
    little later each time. The errors it met."""
    troubles: list[str] = []
    for attempt in range(4):
        try:
            outcome = await stream_chat(
                "trio",
                mock.base_url,
                model="gpt-4o-mini",
                messages=[{"role": "user", "content": text}],  # bodies differ: the mock takes equal ones for retries
                retries=2,
                patience=patience if attempt == 0 else None,
            )
        except json.JSONDecodeError:  # the SDK's own way to tell of a chunk that is no JSON
            troubles.append("JSONDecodeError")
        else:
            if outcome.finish == "stop" and outcome.error is None:
                return troubles
            troubles.append("gave up" if outcome.gave_up else type(outcome.error).__name__)
        await trio.sleep(0.1 * 2**attempt)
    raise AssertionError(f"never got a whole answer: {troubles}")


async def test_a_good_day(mock: Mock) -> None:
    """Without faults every request is one attempt, and complete in the mock's own journal."""
    await mock.ask("POST", "reset")
    for number in range(3):
        assert await careful(mock, f"good day {number}") == []
    journal = (await mock.ask("GET", "requests"))["requests"]
    assert [record["completed"] for record in journal] == [True] * 3
    verdict = await mock.ask("GET", "verdict")
    assert (verdict["findings"], verdict["calls"], verdict["attempts"]) == ([], 3, 3)


@pytest.mark.parametrize("after", [1, 3])
async def test_disconnect(after: int, mock: Mock) -> None:
    """A dropped connection is an exception for the application, never a short answer; its retry satisfies the mock."""
    await mock.plan(type="stream_fault", kind="disconnect", after_chunks=after)
    (trouble,) = await careful(mock, f"disconnect {after}")
    assert issubclass(getattr(openai, trouble), openai.APIError)
    await mock.judge(attempts=2)


async def test_truncate(mock: Mock) -> None:
    """A clean but early end is relayed as it is: no `[DONE]` and no finish reason is made up, so the application can
    see that something is missing."""
    await mock.plan(type="stream_fault", kind="truncate", after_chunks=3)
    assert await careful(mock, "truncate") == ["NoneType"]
    await mock.judge(attempts=2)


async def test_malformed(mock: Mock) -> None:
    """A chunk that is no JSON is relayed as it is, and the application hears of it."""
    await mock.plan(type="stream_fault", kind="malformed", after_chunks=2)
    assert await careful(mock, "malformed") == ["JSONDecodeError"]
    await mock.judge(attempts=2)


async def test_stall(mock: Mock) -> None:
    """An application that does not wait a stall out is seen to leave in the middle of it."""
    await mock.plan(type="stream_fault", kind="stall", after_chunks=2, stall_seconds=20)
    assert await careful(mock, "stall", patience=0.5) == ["gave up"]
    await mock.judge(attempts=2)
    first, second = (await mock.ask("GET", "requests"))["requests"]
    assert not first["completed"]
    assert first["stall_waited"] < 5
    assert second["completed"]


@pytest.mark.parametrize(("status", "attempts"), [(429, 2), (503, 2), (500, 2)])
async def test_failures_are_retried_once_by_the_sdk_alone(status: int, attempts: int, mock: Mock) -> None:
    """A failure with `retry-after` reaches the SDK, which waits as long as it was told; the gateway adds no attempts
    of its own."""
    await mock.plan(type="fail", status=status, retry_after=0.3)
    assert await careful(mock, f"fail {status}") == []
    await mock.judge(attempts=attempts)


async def test_what_no_retry_can_help_is_not_retried(mock: Mock) -> None:
    """A 400 is told to the application at once."""
    await mock.plan(type="fail", status=400)
    outcome = await stream_chat("trio", mock.base_url, model="gpt-4o-mini", retries=2)
    assert isinstance(outcome.error, openai.BadRequestError)
    await mock.judge(attempts=1)


async def test_a_slow_first_token(mock: Mock) -> None:
    """A long silence before the first token is nobody's fault."""
    await mock.plan(type="slow_first_token", seconds=0.5)
    assert await careful(mock, "slow") == []
    await mock.judge(attempts=1)
