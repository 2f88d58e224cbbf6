"""LiteLLM, unmodified, with the middleware from the environment alone: does a hang-up stop its upstream?

Prints the table of docs/howto/llm-gateways.md (run it with ``-s``).
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import socket
import subprocess
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import httpx
import pytest

from examples.otlp_receiver import receiver
from tests.blocks import ROOT
from tests.nightly.backends import free_port, wait_until
from tests.nightly.llm_upstream import TOKENS, Upstream
from tests.nightly.test_vendors import environment_of

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from examples.otlp_receiver import Received
    from tests.nightly.llm_upstream import Call

TEXT = (ROOT / "docs" / "howto" / "llm-gateways.md").read_text("utf-8")
# As on the page, but for the port.
(COMMAND,) = re.findall(r"^opentelemetry-instrument (.*) --port 4000$", TEXT, re.MULTILINE)
(PAGE_RULE,) = re.findall(r'^export OTEL_PYTHON_OTEL_TASKS_CANCEL_HANDLER="(.*)"$', TEXT, re.MULTILINE)

KEY = "sk-5a1f0c9e8d7b6a4f3e2d1c0b9a8f7e6d5c4b3a29"
# The client leaves after this, of an answer that takes 5 s.
PATIENCE = 1.2
# The upstream has to notice within this.
AT_ONCE = 0.5
STOP_DEADLINE = 30.0

CONFIGURATION = """
model_list:
  - model_name: "*"
    litellm_params: {{model: "openai/*", api_base: "http://127.0.0.1:{port}/v1", api_key: none}}
"""

MIDDLEWARE = "OTEL_PYTHON_OTEL_TASKS_FASTAPI_MIDDLEWARE"
RULE = "OTEL_PYTHON_OTEL_TASKS_CANCEL_HANDLER"
SETTINGS: dict[str, dict[str, str]] = {
    "without": {},
    "default": {MIDDLEWARE: "true"},
    "rule": {MIDDLEWARE: "true", RULE: PAGE_RULE},
    "all": {MIDDLEWARE: "true", RULE: "all"},
}
CHAT = {"messages": [{"role": "user", "content": "Count to a hundred."}]}
MODES: dict[str, dict[str, Any]] = {
    "plain": {"model": "slow"},
    "before the first token": {"model": "late", "stream": True},
    "mid-stream": {"model": "slow", "stream": True},
}
BODIES: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": CHAT,
    "/chat/completions": CHAT,
    "/v1/messages": CHAT | {"max_tokens": 1000},
    "/v1/responses": {"input": "Count to a hundred."},
}


@dataclass
class Proxy:
    """The running proxy, and what is behind it."""

    settings: str
    port: int
    upstream: Upstream
    received: Received
    log: Path


@contextlib.contextmanager
def litellm(settings: str, folder: Path) -> Iterator[Proxy]:
    """LiteLLM as its documentation starts it, below ``opentelemetry-instrument``."""
    binaries = environment_of("vendor-litellm")
    port, log = free_port(), folder / "log"
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("OTEL_", "PYTHON"))}
    with receiver() as received, Upstream() as upstream:
        (folder / "config.yaml").write_text(CONFIGURATION.format(port=upstream.port))
        environment = clean | {
            "LITELLM_MASTER_KEY": KEY,
            "PATH": f"{binaries}{os.pathsep}{os.environ['PATH']}",
            # Its list of prices comes with the package.
            "LITELLM_LOCAL_MODEL_COST_MAP": "True",
            "OTEL_SERVICE_NAME": "litellm",
            "OTEL_EXPORTER_OTLP_ENDPOINT": received.endpoint,
            "OTEL_EXPORTER_OTLP_PROTOCOL": "http/protobuf",
            "OTEL_LOGS_EXPORTER": "none",
            "OTEL_METRICS_EXPORTER": "none",
            "OTEL_BSP_SCHEDULE_DELAY": "100",
            **SETTINGS[settings],
        }
        command = [str(binaries / "opentelemetry-instrument"), *COMMAND.split()]
        command += ["--host", "127.0.0.1", "--port", str(port), "--telemetry", "False"]
        with log.open("wb") as output:
            process = subprocess.Popen(
                command, cwd=folder, env=environment, stdout=output, stderr=output, start_new_session=True
            )
        try:
            wait_until(
                lambda: "Uvicorn running on" in log.read_text("utf-8") or process.poll() is not None,
                "LiteLLM has started",
                within=120.0,
            )
            assert process.poll() is None, log.read_text("utf-8")
            yield Proxy(settings, port, upstream, received, log)
        finally:
            process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(STOP_DEADLINE)
            process.kill()
            process.wait()


@pytest.fixture(scope="module", params=SETTINGS)
def proxy(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Proxy]:
    """The proxy with one of the settings."""
    with litellm(request.param, tmp_path_factory.mktemp(request.param)) as running:
        # Its first call imports a lot.
        assert ask(running, "/v1/chat/completions", CHAT | {"model": "quick"}).status_code == 200
        yield running


def ask(proxy: Proxy, path: str, body: dict[str, Any]) -> httpx.Response:
    """Ask, and wait for the answer."""
    return httpx.post(
        f"http://127.0.0.1:{proxy.port}{path}",
        json=body,
        headers={"Authorization": f"Bearer {KEY}"},
        timeout=60,
        trust_env=False,
    )


def hang_up(proxy: Proxy, path: str, body: dict[str, Any]) -> tuple[float, Call]:
    """Ask, and leave; when the client left, and the call of the upstream, which has ended."""
    before = len(proxy.upstream.calls)
    data = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: proxy\r\nAuthorization: Bearer {KEY}\r\n"
    head += f"Content-Type: application/json\r\nContent-Length: {len(data)}\r\n\r\n"
    with socket.create_connection(("127.0.0.1", proxy.port), timeout=60) as client:
        client.sendall(head.encode() + data)
        wait_until(lambda: len(proxy.upstream.calls) > before, "the upstream has got the call")
        # From here, so that the call has the same age on each machine.
        time.sleep(PATIENCE)
    left = time.monotonic()
    call = proxy.upstream.calls[before]
    wait_until(lambda: call.ended is not None, "the upstream's call has ended")
    return left, call


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("path", BODIES)
def test_hang_up_stops_the_upstream(proxy: Proxy, path: str, mode: str) -> None:
    """With a rule, the upstream's call ends within half a second of the hang-up, in all three modes."""
    left, call = hang_up(proxy, path, BODIES[path] | MODES[mode])
    assert call.ended is not None
    print(f"\n{path} {mode}, {proxy.settings}: {call.ended - call.began:.2f} s, {call.tokens} tokens")
    if proxy.settings in ("rule", "all"):
        assert call.ended - left < AT_ONCE
        assert not call.completed
    elif mode == "plain":
        # What the page says of a proxy without a rule. If this fails, LiteLLM has become better.
        assert call.tokens == TOKENS


def test_answers_are_the_proxys_own(proxy: Proxy) -> None:
    """Plain, streamed, wrong, and unknown requests get what they get without the middleware."""
    quick = CHAT | {"model": "quick"}
    assert ask(proxy, "/v1/chat/completions", quick).json()["choices"][0]["message"]["content"]
    assert "data: [DONE]" in ask(proxy, "/v1/chat/completions", quick | {"stream": True}).text
    assert ask(proxy, "/v1/embeddings", {"model": "quick", "input": "text"}).status_code == 200
    assert ask(proxy, "/v1/chat/completions", {"model": "quick"}).status_code == 400
    assert ask(proxy, "/nowhere", {}).status_code == 404
    for path in ("/health/liveliness", "/health/readiness", "/ui/", "/v1/models", "/openapi.json"):
        url = f"http://127.0.0.1:{proxy.port}{path}"
        headers = {"Authorization": f"Bearer {KEY}"}
        assert httpx.get(url, headers=headers, timeout=60, trust_env=False).status_code == 200, path


def test_nothing_is_logged(proxy: Proxy) -> None:
    """No hang-up leaves a traceback or a warning of asyncio's."""
    before = len(proxy.log.read_text("utf-8"))
    for mode in MODES.values():
        hang_up(proxy, "/v1/chat/completions", CHAT | mode)
    log = proxy.log.read_text("utf-8")[before:]
    assert not re.search(r"Traceback|never awaited|never retrieved|destroyed but|ERROR", log), log


def test_trace_says_what_became_of_the_call(proxy: Proxy) -> None:
    """The server's span has the outcome, and what became of the handler."""
    if proxy.settings == "without":
        pytest.skip("without the middleware no span has it")
    expected = "ran_on" if proxy.settings == "default" else "cancelled"
    # No other test hangs up on this route.
    path = "/v1/embeddings"
    hang_up(proxy, path, {"model": "slow", "input": "text"})

    def ended() -> bool:
        handlers = [
            span.attributes.get("otel_tasks.request.handler")
            for span in proxy.received.spans()
            if span.name == f"POST {path}"
        ]
        return expected in handlers

    wait_until(ended, f"the span says {expected}")
