"""The API of a slow model, as far as a proxy needs it; it notes when its client leaves."""

from __future__ import annotations

import asyncio
import contextlib
import json
import threading
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

TOKENS = 100
PAUSE = 0.05
"""Seconds between two tokens: a whole answer takes 5 s."""

LATE_FIRST_TOKEN = 5.0
"""Seconds to the first token of the model `late`."""


@dataclass
class Call:
    """One request: how it went."""

    path: str
    began: float
    tokens: int = 0
    ended: float | None = None
    completed: bool = False


class Upstream:
    """The API on a free port, served in a thread of its own while the ``with`` block runs."""

    def __init__(self) -> None:
        self.calls: list[Call] = []
        self.port = 0
        self._thread = threading.Thread(target=lambda: asyncio.run(self._serve()), daemon=True)
        self._ready = threading.Event()
        self._loop: asyncio.AbstractEventLoop
        self._done: asyncio.Event

    def __enter__(self) -> Upstream:
        self._thread.start()
        assert self._ready.wait(10)
        return self

    def __exit__(self, *_: object) -> None:
        self._loop.call_soon_threadsafe(self._done.set)
        self._thread.join(10)

    async def _serve(self) -> None:
        self._loop, self._done = asyncio.get_running_loop(), asyncio.Event()
        server = await asyncio.start_server(self._serve_call, "127.0.0.1", 0)
        self.port = server.sockets[0].getsockname()[1]
        self._ready.set()
        await self._done.wait()
        server.close()

    async def _serve_call(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
            path, body = await _read_request(reader)
            call = Call(path, time.monotonic())
            self.calls.append(call)
            answering = asyncio.create_task(_answer(path, body, writer, call))
            leaving = asyncio.create_task(reader.read(1))
            await asyncio.wait([answering, leaving], return_when=asyncio.FIRST_COMPLETED)
            call.ended = time.monotonic()
            call.completed = answering.done() and answering.exception() is None
            for task in (answering, leaving):
                task.cancel()
            await asyncio.gather(answering, leaving, return_exceptions=True)
        writer.close()


async def _read_request(reader: asyncio.StreamReader) -> tuple[str, dict[str, Any]]:
    head = (await reader.readuntil(b"\r\n\r\n")).decode()
    line, *lines = head.split("\r\n")
    headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    body = await reader.readexactly(int(headers.get("content-length", "0")))
    return line.split(" ")[1], json.loads(body or b"{}")


async def _answer(path: str, body: dict[str, Any], writer: asyncio.StreamWriter, call: Call) -> None:
    model, is_response = body["model"], path.endswith("/responses")
    generated = _generate(model, call)
    if body.get("stream"):
        # As providers do: the response starts with its first token.
        is_first = True
        async for token in generated:
            if is_first:
                _start(writer, "text/event-stream")
                if is_response:
                    created = {**_whole("", model, path), "status": "in_progress", "output": []}
                    writer.write(
                        _event({"type": "response.created", "sequence_number": 0, "response": created})
                    )
                is_first = False
            writer.write(_event(_delta(token, model, call.tokens, is_response=is_response)))
            await writer.drain()
        writer.write(_event(_last_delta(model, is_response=is_response)) + b"data: [DONE]\n\n")
    else:
        text = "".join([token async for token in generated])
        _start(writer, "application/json")
        writer.write(json.dumps(_whole(text, model, path)).encode())
    await writer.drain()


async def _generate(model: str, call: Call) -> AsyncIterator[str]:
    await asyncio.sleep({"late": LATE_FIRST_TOKEN, "quick": 0}.get(model, PAUSE))
    for number in range(3 if model == "quick" else TOKENS):
        call.tokens += 1
        yield f"token{number} "
        await asyncio.sleep(0 if model == "quick" else PAUSE)


def _start(writer: asyncio.StreamWriter, media_type: str) -> None:
    writer.write(f"HTTP/1.1 200 OK\r\nContent-Type: {media_type}\r\nConnection: close\r\n\r\n".encode())


def _event(data: dict[str, Any]) -> bytes:
    return f"data: {json.dumps(data)}\n\n".encode()


def _delta(token: str, model: str, number: int, *, is_response: bool) -> dict[str, Any]:
    if is_response:
        place = {"item_id": "message", "output_index": 0, "content_index": 0, "sequence_number": number}
        return {"type": "response.output_text.delta", "delta": token, "logprobs": [], **place}
    return _chunk(model, {"role": "assistant", "content": token}, None)


def _last_delta(model: str, *, is_response: bool) -> dict[str, Any]:
    if is_response:
        return {
            "type": "response.completed",
            "sequence_number": TOKENS + 1,
            "response": _whole("", model, "/responses"),
        }
    return _chunk(model, {}, "stop")


def _chunk(model: str, delta: dict[str, str], finish_reason: str | None) -> dict[str, Any]:
    choice = {"index": 0, "delta": delta, "finish_reason": finish_reason}
    return {
        "id": "chat",
        "object": "chat.completion.chunk",
        "created": 1,
        "model": model,
        "choices": [choice],
    }


def _whole(text: str, model: str, path: str) -> dict[str, Any]:
    if path.endswith("/responses"):
        content = {"type": "output_text", "text": text, "annotations": []}
        message = {"type": "message", "id": "message", "role": "assistant", "status": "completed"}
        return {
            "id": "response",
            "object": "response",
            "created_at": 1,
            "status": "completed",
            "model": model,
            "output": [{**message, "content": [content]}],
            "parallel_tool_calls": True,
            "tool_choice": "auto",
            "tools": [],
        }
    usage = {"prompt_tokens": 1, "completion_tokens": 3, "total_tokens": 4}
    if path.endswith("/embeddings"):
        data = [{"object": "embedding", "index": 0, "embedding": [0.5, 0.25]}]
        return {"object": "list", "model": model, "data": data, "usage": usage}
    message = {"role": "assistant", "content": text}
    choice = {"index": 0, "message": message, "finish_reason": "stop"}
    whole = {"id": "chat", "object": "chat.completion", "created": 1, "model": model, "choices": [choice]}
    return {**whole, "usage": usage}
