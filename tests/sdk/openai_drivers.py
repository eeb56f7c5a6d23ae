"""The official Python SDK in its three flavours, driven alike: synchronous, on asyncio, on Trio."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

import openai
import trio

FLAVOURS = ("sync", "asyncio", "trio")
MESSAGES = [{"role": "user", "content": "Stream a haiku."}]


@dataclass
class Outcome:
    """What the application saw."""

    texts: list[str] = field(default_factory=list)
    finish: str | None = None
    usage: Any = None
    error: openai.OpenAIError | None = None
    gave_up: bool = False  # cancelled by the application

    def note(self, chunk: Any) -> None:
        """Take over what a chunk says."""
        if chunk.usage:
            self.usage = chunk.usage
        for choice in chunk.choices:
            if choice.delta.content:
                self.texts.append(choice.delta.content)
            self.finish = choice.finish_reason or self.finish

    @property
    def looks_finished(self) -> bool:
        """The application has no way to know that anything is missing."""
        return self.error is None and not self.gave_up


async def call(flavour: str, base_url: str, use: Callable[[Any], Any], *, retries: int = 0, timeout: float = 20) -> Any:
    """The result of `use(client)` with a client of that flavour; `use` is a coroutine function except for "sync"."""
    options = {"base_url": base_url, "api_key": "sk-test", "max_retries": retries, "timeout": timeout}

    def in_thread() -> Any:
        with openai.OpenAI(**options) as client:
            return use(client)

    async def in_loop() -> Any:
        async with openai.AsyncOpenAI(**options) as client:
            return await use(client)

    if flavour == "sync":
        return await trio.to_thread.run_sync(in_thread)
    if flavour == "asyncio":
        return await trio.to_thread.run_sync(lambda: asyncio.run(in_loop()))
    return await in_loop()


async def stream_chat(
    flavour: str,
    base_url: str,
    *,
    model: str = "scripted",
    take: int | None = None,
    patience: float | None = None,
    retries: int = 0,
    **extra: Any,
) -> Outcome:
    """Stream a chat completion. Break out after `take` tokens; give up after `patience` seconds: by cancelling, or by
    the read timeout in the synchronous flavour, which has nothing else."""
    outcome = Outcome()
    request = {"model": model, "messages": MESSAGES, "stream": True, **extra}

    def enough() -> bool:
        return take is not None and len(outcome.texts) >= take

    def use_sync(client: openai.OpenAI) -> None:
        with client.chat.completions.create(**request) as stream:
            for chunk in stream:
                outcome.note(chunk)
                if enough():
                    break

    async def use_async(client: openai.AsyncOpenAI) -> None:
        async with await client.chat.completions.create(**request) as stream:
            async for chunk in stream:
                outcome.note(chunk)
                if enough():
                    break

    async def use_asyncio(client: openai.AsyncOpenAI) -> None:
        try:
            async with asyncio.timeout(patience):
                await use_async(client)
        except TimeoutError:
            outcome.gave_up = True

    async def use_trio(client: openai.AsyncOpenAI) -> None:
        with trio.move_on_after(float("inf") if patience is None else patience) as scope:
            await use_async(client)
        outcome.gave_up = scope.cancelled_caught

    use: dict[str, Callable[[Any], Awaitable[None] | None]] = {
        "sync": use_sync,
        "asyncio": use_asyncio,
        "trio": use_trio,
    }
    timeout = patience if flavour == "sync" and patience is not None else 20
    try:
        await call(flavour, base_url, use[flavour], retries=retries, timeout=timeout)
    except openai.OpenAIError as error:
        outcome.error = error
        outcome.gave_up = patience is not None and isinstance(error, openai.APITimeoutError)
    return outcome
