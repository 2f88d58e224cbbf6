"""Tools for testing code that runs on this library, which its own tests use too.

``run()`` runs a coroutine on a ``VirtualClockLoop``, where sleeping costs no time, and where a test that
waits forever fails with the names of the waiting tasks. ``FakeConnection`` plays an ASGI server for one
request or WebSocket, with the quirks of real servers. ``SpanRecorder`` keeps the spans and metrics of a test
in memory and checks that each span has ended exactly once.

Only ``SpanRecorder`` needs the OpenTelemetry SDK, and imports it when you make one.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import selectors
import threading
import time
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Coroutine, Iterable, Iterator, Mapping, MutableMapping
    from concurrent.futures import Executor
    from typing import Self

    from opentelemetry.sdk.metrics import MeterProvider
    from opentelemetry.sdk.trace import ReadableSpan, Span, TracerProvider

    Message = MutableMapping[str, Any]
    Receive = Callable[[], Awaitable[Message]]
    Send = Callable[[Message], Awaitable[None]]
    App = Callable[[MutableMapping[str, Any], Receive, Send], Awaitable[None]]

__all__ = [
    "DeadlockError",
    "FakeConnection",
    "SpanRecorder",
    "VirtualClockLoop",
    "assert_no_tasks_left",
    "run",
]

T = TypeVar("T")


# --- the clock ---------------------------------------------------------------------------------------


class DeadlockError(RuntimeError):
    """Every task waits, and nothing can wake one of them."""


def run(coro: Coroutine[Any, Any, T], *, timeout: float = 3600.0) -> T:
    """Run ``coro`` to its end on a fresh ``VirtualClockLoop``, as ``asyncio.run`` does on a real one.

    Args:
        coro: The coroutine to run. Tasks it leaves behind are cancelled and awaited.
        timeout: Virtual seconds the whole run may take. It bounds tasks that wake up again and again; a task
            that waits forever is found immediately. ``float("inf")`` means no limit.

    Returns:
        The result of ``coro``.

    Raises:
        DeadlockError: All tasks wait, no timer is set, and no thread or socket can wake one.
        TimeoutError: The virtual clock would pass ``timeout``.
        RuntimeError: A loop already runs in this thread.

    **Cancellation**: Ctrl-C cancels ``coro``, as in ``asyncio.run``.

    Example:
        >>> run(asyncio.sleep(600, result="at once"))
        'at once'
    """
    with asyncio.Runner(loop_factory=lambda: VirtualClockLoop(timeout=timeout)) as runner:
        return runner.run(coro)


class VirtualClockLoop(asyncio.SelectorEventLoop):
    """An event loop whose ``time()`` jumps to the next timer when nothing else can run.

    While a thread works for the loop (``run_in_executor``, ``run_in_thread``, anyio's worker threads), time
    passes at its real pace, because the thread's result is unknown. Sockets are polled at each turn, but not
    waited for while a timer is set.

    Args:
        timeout: Virtual seconds after which the loop gives up with ``TimeoutError``.
    """

    def __init__(self, *, timeout: float = float("inf")) -> None:
        self._now = self._start = 1000.0
        self._time_limit = timeout
        self._threads_out = 0
        super().__init__(_JumpingSelector(self))

    def time(self) -> float:
        """The virtual time in seconds; it starts at 1000 (a real one is never near 0)."""
        return self._now

    def run_in_executor(  # type: ignore[override]  # typeshed's TypeVarTuple form cannot be forwarded
        self, executor: Executor | None, func: Callable[..., T], *args: Any
    ) -> asyncio.Future[T]:
        """As the base class; the loop waits for the thread instead of jumping over its work."""
        future = super().run_in_executor(executor, func, *args)
        self._threads_out += 1
        future.add_done_callback(self._thread_is_back)
        return future

    async def shutdown_default_executor(
        self,
        timeout: float | None = None,  # the base class's signature since 3.12
    ) -> None:
        """As the base class, which ends its threads in one more thread."""
        self._threads_out += 1
        try:
            await super().shutdown_default_executor()
        finally:
            self._threads_out -= 1

    def _thread_is_back(self, future: asyncio.Future[Any]) -> None:
        self._threads_out -= 1

    def _a_thread_works(self) -> bool:
        return self._threads_out > 0 or any(map(self._is_busy, threading.enumerate()))

    def _is_busy(self, thread: threading.Thread) -> bool:
        # `works_for`: of `run_in_thread`, until this loop knows that it is back.
        return self._is_busy_anyio_worker(thread) or getattr(thread, "works_for", None) is self

    def _is_busy_anyio_worker(self, thread: threading.Thread) -> bool:
        # anyio (hence Starlette's ``def`` handlers) does not use run_in_executor. Its worker puts itself
        # into ``idle_workers`` from the loop's thread when it is done: nothing is lost between the two.
        idle: Iterable[object] | None = getattr(thread, "idle_workers", None)
        return idle is not None and getattr(thread, "loop", None) is self and thread not in idle

    def _jump(self, seconds: float) -> None:
        self._now += seconds
        if self._now - self._start > self._time_limit:
            tasks = _describe(asyncio.all_tasks(self))
            # Once only: the tasks that are cancelled after this may need a timer to unwind.
            self._time_limit, limit = float("inf"), self._time_limit
            raise TimeoutError(f"the virtual clock passed the limit of {limit} s; unfinished tasks:\n{tasks}")


class _JumpingSelector(selectors.DefaultSelector):
    """Asks the real selector without waiting, then moves the loop's clock instead of sleeping."""

    REAL_PATIENCE = 30.0
    """Real seconds that a thread or a socket may take to wake a loop that has nothing else to do."""

    def __init__(self, loop: VirtualClockLoop) -> None:
        super().__init__()
        self._loop = loop

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        events = super().select(0)
        if events or (timeout is not None and timeout <= 0):
            return events
        if self._loop._a_thread_works():
            return self._select_really(timeout)
        # Between the two looks a thread may have told the loop and ended.
        events = super().select(0)
        if events:
            return events
        if timeout is not None:
            self._loop._jump(timeout)
            return events
        if self._has_sockets():
            return self._select_really(None)
        raise _deadlock(self._loop)

    def _select_really(self, timeout: float | None) -> list[tuple[selectors.SelectorKey, int]]:
        begin = time.monotonic()
        events = super().select(self.REAL_PATIENCE if timeout is None else timeout)
        passed = time.monotonic() - begin
        if timeout is None and not events:
            raise _deadlock(self._loop)
        # Never past the next timer: the time a timer was set for is the time at which it runs.
        self._loop._jump(passed if timeout is None else min(passed, timeout))
        return events

    def _has_sockets(self) -> bool:
        # One is the loop's own: the pipe through which other threads wake it.
        return len(self.get_map()) > 1


def _deadlock(loop: asyncio.AbstractEventLoop) -> DeadlockError:
    return DeadlockError(
        f"deadlock: every task waits and no timer is set:\n{_describe(asyncio.all_tasks(loop))}"
    )


def _describe(tasks: Iterable[asyncio.Task[Any]]) -> str:
    return "\n".join(sorted(f"  {task.get_name()}: {_where(task)}" for task in tasks)) or "  (none)"


def _where(task: asyncio.Task[Any]) -> str:
    """The calls from the task's own coroutine down to the one that waits, and the line where it does."""
    names: list[str] = []
    line = "not started"
    waits: Any = task.get_coro()
    while (frame := getattr(waits, "cr_frame", None)) is not None:
        names.append(frame.f_code.co_qualname)
        line = f"{frame.f_code.co_filename}:{frame.f_lineno}"
        waits = waits.cr_await
    return f"{' > '.join(names)} at {line}"


async def assert_no_tasks_left(*, turns: int = 10) -> None:
    """Fail if an asyncio task other than the caller's is alive.

    Args:
        turns: Turns of the loop that ending tasks may still take.

    Raises:
        AssertionError: With the name of each task and the line where it waits.

    **Cancellation**: passed on; nothing was changed.
    """
    for _ in range(turns):
        if not _others():
            return
        await asyncio.sleep(0)
    if left := _others():
        raise AssertionError(f"{len(left)} task(s) left:\n{_describe(left)}")


def _others() -> set[asyncio.Task[Any]]:
    return {task for task in asyncio.all_tasks() if task is not asyncio.current_task()}


# --- the ASGI server -----------------------------------------------------------------------------------


class FakeConnection:
    """One request (or WebSocket) of an ASGI 3 server that behaves like uvicorn by default.

    Pass ``scope``, ``receive``, and ``send`` to an application, or let ``run()`` do it, and play the client
    with ``feed()`` and ``disconnect()``. ``sent`` has everything that the application sends; ``sent_late``
    has what it sends after the client has left.

    Args:
        method: The HTTP method.
        path: The raw path.
        headers: Name and value of each header.
        body: The request's body: one chunk, several (one message each), or ``None`` if ``feed()`` will send
            it.
        spec_version: ``scope["asgi"]["spec_version"]``.
        type: ``"http"`` or ``"websocket"``.
        says_disconnect_once: After the one ``http.disconnect``, ``receive()`` never returns (hypercorn,
            daphne).
        send_raises_after_disconnect: ``send()`` raises OSError once the client has left (uvloop).
        send_hangs_after_disconnect: ``send()`` never returns once the client has left (hypercorn, HTTP/2).
        receive_is_not_a_coroutine: ``receive()`` is a plain function returning a future (granian).
        spurious_empty_request: An empty ``http.request`` comes after the body's end (uvicorn, two
            readers).
        disconnect_inside_final_send: The pending ``receive()`` is answered before the final ``send()``
            returns (granian).

    Example:
        >>> async def app(scope, receive, send):
        ...     await send({"type": "http.response.start", "status": 204})
        ...     await send({"type": "http.response.body"})
        >>> connection = FakeConnection(method="GET", path="/")
        >>> run(connection.run(app))
        >>> connection.status
        204
    """

    def __init__(
        self,
        *,
        method: str = "GET",
        path: str = "/",
        headers: Mapping[str, str] | None = None,
        body: bytes | Iterable[bytes] | None = b"",
        spec_version: str = "2.4",
        type: str = "http",
        says_disconnect_once: bool = False,
        send_raises_after_disconnect: bool = False,
        send_hangs_after_disconnect: bool = False,
        receive_is_not_a_coroutine: bool = False,
        spurious_empty_request: bool = False,
        disconnect_inside_final_send: bool = False,
    ) -> None:
        self.scope = _scope(type, method, path, headers or {}, spec_version)
        self.sent: list[Message] = []
        self.sent_late: list[Message] = []
        self.received = 0
        """The number of messages that the application has received."""
        self.readers = 0
        self.max_readers = 0
        """The highest number of ``receive()`` calls that waited at the same time."""
        self.disconnected = False
        self.says_disconnect_once = says_disconnect_once
        self.send_raises_after_disconnect = send_raises_after_disconnect
        self.send_hangs_after_disconnect = send_hangs_after_disconnect
        self.spurious_empty_request = spurious_empty_request
        self.disconnect_inside_final_send = disconnect_inside_final_send
        self.receive: Receive = self._receive_as_future if receive_is_not_a_coroutine else self._receive
        self._incoming: Iterator[Message] = iter(())
        self._fed: list[Message] = []
        self._wake = asyncio.Event()
        self._resumed = asyncio.Event()
        self._resumed.set()
        self._close_code = 1005
        self._told = False
        self._completed = False
        if type == "websocket":
            self._fed.append({"type": "websocket.connect"})
        elif body is not None:
            self._incoming = _body_messages([body] if isinstance(body, bytes) else body)

    @classmethod
    def websocket(cls, path: str = "/", **options: Any) -> Self:
        """A WebSocket's connection; its first message is ``websocket.connect``."""
        return cls(path=path, type="websocket", **options)

    async def run(self, app: App) -> None:
        """Call ``app`` in the caller's task; most servers have a task per request.

        **Cancellation**: passed on to ``app``, as by a server that shuts down.
        """
        await app(self.scope, self.receive, self.send)

    # The client's side.

    def feed(self, data: bytes | str = b"", *, more: bool = True) -> None:
        """Send a piece of the body (``more=False``: the last), or a WebSocket message."""
        if self.scope["type"] == "websocket":
            kind = "text" if isinstance(data, str) else "bytes"
            self._fed.append({"type": "websocket.receive", kind: data})
        else:
            self._fed.append({"type": "http.request", "body": data, "more_body": more})
        self._wake.set()

    def disconnect(self, code: int = 1001) -> None:
        """Hang up. A WebSocket's application gets ``code``."""
        self.disconnected = True
        self._close_code = code
        self._wake.set()
        self._resumed.set()

    def pause(self) -> None:
        """Stop reading: the application's ``send()`` waits until ``resume()`` or ``disconnect()``."""
        self._resumed.clear()

    def resume(self) -> None:
        """Read on after ``pause()``."""
        self._resumed.set()

    # The response.

    @property
    def complete(self) -> bool:
        """Whether the whole response was sent (or the WebSocket closed) before the client left."""
        return self._completed

    @property
    def status(self) -> int | None:
        """The status sent, or None."""
        return next((m["status"] for m in self.sent if m["type"] == "http.response.start"), None)

    @property
    def headers(self) -> dict[str, str]:
        """The response's headers, lower case."""
        start = next((m for m in self.sent if m["type"] == "http.response.start"), {"headers": ()})
        return {name.decode().lower(): value.decode() for name, value in start.get("headers", ())}

    @property
    def body(self) -> bytes:
        """The response's body so far."""
        return b"".join(m.get("body", b"") for m in self.sent if m["type"] == "http.response.body")

    # The application's side.

    async def send(self, message: Message) -> None:
        """The server's ``send``: waits while paused; after a disconnect drops, raises or hangs."""
        if not self.disconnected:
            await self._resumed.wait()
        self.sent.append(message)
        if self.disconnected:
            await self._send_late(message)
            return
        if _is_final(message, self.sent):
            self._completed = True
            self._wake.set()
            if self.disconnect_inside_final_send:
                await _turns(3)

    async def _send_late(self, message: Message) -> None:
        self.sent_late.append(message)
        if self.send_raises_after_disconnect:
            raise OSError("the client has closed the connection")
        if self.send_hangs_after_disconnect:
            await asyncio.get_running_loop().create_future()

    async def _receive(self) -> Message:
        self.readers += 1
        self.max_readers = max(self.max_readers, self.readers)
        try:
            message = await self._next_message()
        finally:
            self.readers -= 1
        self.received += 1
        return message

    def _receive_as_future(self) -> Awaitable[Message]:
        return asyncio.ensure_future(self._receive())

    async def _next_message(self) -> Message:
        while (message := self._ready_message()) is None:
            self._wake.clear()
            await self._wake.wait()
        return message

    def _ready_message(self) -> Message | None:
        if self.disconnected or self._completed:
            return self._disconnect_message()
        if self._fed:
            return self._fed.pop(0)
        if (message := next(self._incoming, None)) is not None:
            return message
        if self.spurious_empty_request and self.scope["type"] == "http":
            self.spurious_empty_request = False
            return {"type": "http.request", "body": b"", "more_body": False}
        return None

    def _disconnect_message(self) -> Message | None:
        if self._told and self.says_disconnect_once:
            return None
        self._told = True
        if self.scope["type"] == "websocket":
            return {"type": "websocket.disconnect", "code": self._close_code, "reason": None}
        return {"type": "http.disconnect"}


def _scope(
    type: str, method: str, path: str, headers: Mapping[str, str], spec_version: str
) -> dict[str, Any]:
    scope: dict[str, Any] = {
        "type": type,
        "asgi": {"version": "3.0", "spec_version": spec_version},
        "http_version": "1.1",
        "scheme": "http",
        "path": path,
        "raw_path": path.encode(),
        "query_string": b"",
        "root_path": "",
        "headers": [(name.lower().encode(), value.encode()) for name, value in headers.items()],
        "client": ("127.0.0.1", 50000),
        "server": ("127.0.0.1", 80),
        "state": {},
    }
    if type == "websocket":
        return scope | {"scheme": "ws", "subprotocols": []}
    return scope | {"method": method}


def _body_messages(chunks: Iterable[bytes]) -> Iterator[Message]:
    """One message per chunk, made on demand: a body of any size costs nothing before."""
    rest = iter(chunks)
    chunk = next(rest, b"")
    for following in rest:
        yield {"type": "http.request", "body": chunk, "more_body": True}
        chunk = following
    yield {"type": "http.request", "body": chunk, "more_body": False}


def _is_final(message: Message, sent: list[Message]) -> bool:
    match message["type"]:
        case "http.response.body":
            return not message.get("more_body", False) and not sent[0].get("trailers", False)
        case "http.response.trailers":
            return not message.get("more_trailers", False)
        case "http.response.pathsend" | "websocket.close":
            return True
        case _:
            return False


async def _turns(count: int) -> None:
    for _ in range(count):
        await asyncio.sleep(0)


# --- the spans -----------------------------------------------------------------------------------------


class SpanRecorder:
    """Records the spans and metrics of a test in memory, with its own providers and ids that count up from 1.

    While it is open, it records what OpenTelemetry logs: that shows a span that ended twice. Use it as a
    context manager, or call ``close()``.

    Attributes:
        provider: The SDK's TracerProvider, to inject.
        meter_provider: The SDK's MeterProvider, to inject.
        complaints: What the loggers below ``opentelemetry`` logged at WARNING and above.

    Raises:
        ImportError: ``opentelemetry-sdk`` is not installed.

    Example:
        >>> with SpanRecorder() as spans:
        ...     with spans.provider.get_tracer("example").start_as_current_span("work"):
        ...         pass
        ...     spans.span("work").status.status_code.name
        'UNSET'
    """

    def __init__(self) -> None:
        self.complaints: list[str] = []
        self._started: dict[int, Span] = {}
        self._finished: list[ReadableSpan] = []
        self._ended: dict[int, int] = {}
        self.provider, self.meter_provider, self._reader = _providers(self)
        self._handler = _Collector(self.complaints)
        logging.getLogger("opentelemetry").addHandler(self._handler)

    provider: TracerProvider
    meter_provider: MeterProvider

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def close(self) -> None:
        """Shut the providers down and stop listening to OpenTelemetry's loggers."""
        logging.getLogger("opentelemetry").removeHandler(self._handler)
        self.provider.shutdown()
        self.meter_provider.shutdown()

    @property
    def finished(self) -> tuple[ReadableSpan, ...]:
        """The spans that have ended, in that order."""
        return tuple(self._finished)

    @property
    def open(self) -> tuple[Span, ...]:
        """The spans that have started and not ended, oldest first."""
        return tuple(span for key, span in self._started.items() if key not in self._ended)

    @property
    def names(self) -> list[str]:
        """The names of ``finished``."""
        return [span.name for span in self._finished]

    def span(self, name: str) -> ReadableSpan:
        """The one finished span called ``name``.

        Raises:
            LookupError: There is none, or more than one; the message lists all spans.
        """
        found = self.spans(name)
        if len(found) != 1:
            open_names = [span.name for span in self.open]
            raise LookupError(
                f"{len(found)} finished spans are named {name!r}; finished: {self.names}, open: {open_names}"
            )
        return found[0]

    def spans(self, name: str) -> list[ReadableSpan]:
        """The finished spans called ``name``."""
        return [span for span in self._finished if span.name == name]

    def children(self, parent: ReadableSpan) -> list[ReadableSpan]:
        """The finished spans whose parent is ``parent``."""
        return [span for span in self._finished if _parent_id(span) == _span_id(parent)]

    def metrics(self) -> dict[str, list[Any]]:
        """Collect the data points now, and return them by metric name."""
        data = self._reader.get_metrics_data()
        if data is None:
            return {}
        scopes = itertools.chain.from_iterable(resource.scope_metrics for resource in data.resource_metrics)
        return {metric.name: list(metric.data.data_points) for scope in scopes for metric in scope.metrics}

    def check(self) -> None:
        """Fail unless every span has ended exactly once and OpenTelemetry has logged no warning.

        Raises:
            AssertionError: With the names of the spans, or the logged lines.
        """
        twice = [self._started[key].name for key, count in self._ended.items() if count > 1]
        faults = {
            "spans never ended": [span.name for span in self.open],
            "spans ended more than once": twice,
            "opentelemetry logged": self.complaints,
        }
        if found := [f"{what}: {names}" for what, names in faults.items() if names]:
            raise AssertionError("; ".join(found))

    def clear(self) -> None:
        """Forget all ended spans, and the logged lines."""
        for key in self._ended:
            self._started.pop(key, None)
        self._ended.clear()
        self._finished.clear()
        self.complaints.clear()

    def _on_start(self, span: Span) -> None:
        self._started[_span_id(span)] = span

    def _on_end(self, span: ReadableSpan) -> None:
        key = _span_id(span)
        self._ended[key] = self._ended.get(key, 0) + 1
        self._finished.append(span)


class _Collector(logging.Handler):
    def __init__(self, messages: list[str]) -> None:
        super().__init__(logging.WARNING)
        self._messages = messages

    def emit(self, record: logging.LogRecord) -> None:
        self._messages.append(f"{record.name}: {record.getMessage()}")


def _span_id(span: ReadableSpan) -> int:
    context = span.context
    return context.span_id if context is not None else 0


def _parent_id(span: ReadableSpan) -> int | None:
    return span.parent.span_id if span.parent is not None else None


def _providers(recorder: SpanRecorder) -> tuple[TracerProvider, MeterProvider, Any]:
    try:
        from opentelemetry.sdk.metrics import MeterProvider
        from opentelemetry.sdk.metrics.export import InMemoryMetricReader
        from opentelemetry.sdk.trace import SpanProcessor, TracerProvider
        from opentelemetry.sdk.trace.id_generator import IdGenerator
    except ImportError as error:
        raise ImportError(
            "SpanRecorder needs the OpenTelemetry SDK: pip install 'otel-tasks[otlp]'"
        ) from error

    class CountingIds(IdGenerator):
        def __init__(self) -> None:
            self._span_ids = itertools.count(1)
            self._trace_ids = itertools.count(1)

        def generate_span_id(self) -> int:
            return next(self._span_ids)

        def generate_trace_id(self) -> int:
            return next(self._trace_ids)

    class Recording(SpanProcessor):
        def on_start(self, span: Span, parent_context: object = None) -> None:
            recorder._on_start(span)

        def on_end(self, span: ReadableSpan) -> None:
            recorder._on_end(span)

    provider = TracerProvider(id_generator=CountingIds(), shutdown_on_exit=False)
    provider.add_span_processor(Recording())
    reader = InMemoryMetricReader()
    return provider, MeterProvider([reader], shutdown_on_exit=False), reader
