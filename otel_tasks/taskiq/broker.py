"""managed: runs the tasks of a Taskiq broker as managed tasks, by changing the instance, not its class.

Taskiq's receiver executes ``broker.find_task(name).original_func``, between the ``pre_execute`` and the
``post_execute`` of the broker's middlewares, all in one asyncio task, and then calls the ``ack`` that
``broker.listen()`` has delivered. So four hooks are enough:

- a middleware, which stamps each message that is sent, and creates an ``Execution`` for each one received;
- ``find_task``, whose function runs the user's function in that execution;
- ``listen``, whose ``ack`` asks the execution;
- startup and shutdown of the broker, in the middleware, which start and stop the fleet.

Rejected: a custom receiver, because users would have to add it to their command line; and a subclass of the
broker, because schedulers, result backends, and the user's code hold the object.
"""

from __future__ import annotations

import asyncio
import contextlib
import copy
import weakref
from typing import TYPE_CHECKING, Any, TypeVar

from taskiq import AckableMessage, AsyncBroker, TaskiqMiddleware
from taskiq.brokers.shared_broker import AsyncSharedBroker
from taskiq.receiver.receiver import logger as receiver_log
from taskiq.utils import maybe_awaitable

from otel_tasks import CancelCause, CancelKind
from otel_tasks._core.checks import checked_name, checked_seconds
from otel_tasks._core.options import FROM_MANAGER, FromManager
from otel_tasks.exceptions import WrongLoopError
from otel_tasks.fleet import Fleet
from otel_tasks.fleet.cancellations import target_in
from otel_tasks.fleet.entries import CancelEntry
from otel_tasks.taskiq.calls import Calls
from otel_tasks.taskiq.deliveries import Ack, Delivery, ack_of_delivery
from otel_tasks.taskiq.errors import RemoteResultError, is_not_about_an_end
from otel_tasks.taskiq.execution import Execution, current_execution
from otel_tasks.taskiq.functions import covered_function
from otel_tasks.taskiq.priorities import checked_priorities
from otel_tasks.taskiq.sending import stamp_message
from otel_tasks.taskiq.stopping import SignalWatch
from otel_tasks.taskiq.streams import Redelivery, redelivery_for
from otel_tasks.taskiq.worker import Worker

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Awaitable, Callable

    from taskiq import AsyncTaskiqDecoratedTask, TaskiqMessage, TaskiqResult
    from taskiq.abc.result_backend import AsyncResultBackend

    from otel_tasks.fleet.bus import Entry
    from otel_tasks.fleet.link import Link
    from otel_tasks.taskiq.priorities import BrokerPriorities

B = TypeVar("B", bound=AsyncBroker)

# Seconds in which executions end when the broker shuts down.
_END_WITHIN = 2.0


def managed(
    broker: B,
    fleet: Fleet,
    *,
    group: str = "taskiq",
    priorities: BrokerPriorities | None = None,
    grace: float | FromManager = FROM_MANAGER,
) -> B:
    """Run the tasks of a broker as managed tasks on its workers, and let ``remote`` call them.

    Call it where you create the broker, in the module that workers and services import. Declare tasks before
    or after the call. ``await broker.startup()`` starts the fleet in this process, and ``shutdown()`` stops
    it; ``taskiq worker`` calls both.

    Args:
        broker: The broker. It stays the same object, with one more middleware.
        fleet: The fleet that carries cancellations, leases, and progress.
        group: The labeled group of tasks whose message names none.
        priorities: The labels by which the broker orders its messages, for each priority: see
            ``rabbitmq_priorities`` and ``stream_priorities``. None leaves their order to the broker.
        grace: Seconds that a worker's tasks have to finish after SIGTERM or SIGINT, before they are
            cancelled. The default is that of the fleet's manager.

    Returns:
        The broker.

    Raises:
        TypeError: ``broker`` is not a Taskiq broker that sends messages itself, ``fleet`` is not a ``Fleet``,
            or an option has the wrong type.
        ValueError: The broker is already managed, ``group`` is not a valid name, ``grace`` is negative, or
            ``fleet`` is an observer.

    Example:
        >>> fleet = Fleet("redis://127.0.0.1:6379/0", namespace="shop")
        >>> broker = managed(AioPikaBroker("amqp://127.0.0.1"), fleet)
    """
    if not isinstance(broker, AsyncBroker):
        raise TypeError(
            f"managed() takes a Taskiq broker, got {broker!r}: write managed(AioPikaBroker(url), fleet)"
        )
    if isinstance(broker, AsyncSharedBroker):
        raise TypeError(
            "managed() takes the broker that sends, and a shared broker sends through its default broker: "
            "write async_shared_broker.default_broker(managed(broker, fleet))"
        )
    if not isinstance(fleet, Fleet):
        raise TypeError(
            f'managed() takes a Fleet, got {fleet!r}: write managed(broker, Fleet(url, namespace="shop"))'
        )
    if fleet.is_observer:
        raise ValueError("managed() needs a fleet with this process as a node: leave observer=True out")
    if managed_broker_of(broker) is not None:
        raise ValueError("this broker is already managed: call managed() once, where you create the broker")
    if not isinstance(grace, FromManager):
        checked_seconds("grace", grace)
    options = checked_name("group", group, "leave it out for 'taskiq'"), checked_priorities(priorities), grace
    ManagedBroker(broker, fleet, *options).cover()
    return broker


class ManagedBroker:
    """The state of one managed broker.

    Args:
        broker: The broker.
        fleet: Its fleet.
        group: The label of tasks that bring no group.
        priorities: The labels of each priority.
        grace: Seconds in which tasks may finish when the worker stops.

    Attributes:
        fleet: Its fleet.
        priorities: The labels of each priority.
        calls: The remote tasks that this process waits for.
        worker: The executions of this process.
        acknowledges: True once the broker has delivered a message that can be acknowledged.
        is_started: True between startup and shutdown of the broker.
    """

    def __init__(
        self,
        broker: AsyncBroker,
        fleet: Fleet,
        group: str,
        priorities: BrokerPriorities,
        grace: float | FromManager,
    ) -> None:
        # Weak, because this object is the value of an entry whose key is the broker.
        self._broker = weakref.ref(broker)
        self.fleet = fleet
        self.priorities = priorities
        self.acknowledges = False
        self.is_started = False
        self._group = group
        self._grace = grace
        self._loop: asyncio.AbstractEventLoop | None = None
        self._link: Link | None = None
        self._make_parts()
        self._redelivery: Redelivery | None = None
        self._middleware = FleetMiddleware(self)
        self._find_task: Callable[[str], AsyncTaskiqDecoratedTask[Any, Any] | None] = broker.find_task
        self._listen: Callable[[], AsyncGenerator[bytes | AckableMessage, None]] = broker.listen
        self._covered: dict[str, tuple[object, AsyncTaskiqDecoratedTask[Any, Any]]] = {}

    def _make_parts(self) -> None:
        """Make what belongs to one event loop."""
        self.worker = Worker(self.fleet, self._group)
        self.calls = Calls(self.fleet, lambda: self.result_backend)
        self._signals = SignalWatch(self.fleet, self.worker, self._grace)

    @property
    def broker(self) -> AsyncBroker:
        """The broker."""
        broker = self._broker()
        if broker is None:
            raise RuntimeError("the broker is gone")
        return broker

    @property
    def result_backend(self) -> AsyncResultBackend[Any]:
        """The broker's current result backend."""
        return self.broker.result_backend

    def cover(self) -> None:
        """Put the middleware and the two methods on the broker, and a filter on the receiver's logger."""
        broker = self.broker
        broker.add_middlewares(self._middleware)
        vars(broker)["find_task"] = self.find_task
        vars(broker)["listen"] = self.listen
        _managed[broker] = self
        # A filter that is there already is not added again.
        receiver_log.addFilter(is_not_about_an_end)

    # -- the methods of the broker --------------------------------------------------------------

    def find_task(self, task_name: str) -> AsyncTaskiqDecoratedTask[Any, Any] | None:
        """Return the task of this name, with a function that runs the user's function as a managed task."""
        task = self._find_task(task_name)
        if task is None:
            return None
        known = self._covered.get(task_name)
        if known is not None and known[0] is task.original_func:
            return known[1]
        covered = copy.copy(task)
        covered.original_func = covered_function(task.original_func)
        self._covered[task_name] = (task.original_func, covered)
        return covered

    async def listen(self) -> AsyncGenerator[bytes | AckableMessage, None]:
        """Deliver the messages of the broker; the execution decides whether one is acknowledged."""
        async with contextlib.aclosing(self._listen()) as messages:
            async for message in messages:
                if not isinstance(message, AckableMessage):
                    yield message
                    continue
                self.acknowledges = True
                ack = Ack(self._acknowledge, message.ack, message.data)
                yield Delivery.model_construct(data=message.data, ack=ack)

    async def _acknowledge(self, ack: Callable[[], Awaitable[None] | None], data: bytes) -> None:
        execution = current_execution.get()
        if execution is not None:
            await execution.acknowledge(ack)
            return
        if self.fleet.is_started:
            # The receiver drops the message.
            await self._refuse(data)
        await maybe_awaitable(ack())

    async def _refuse(self, data: bytes) -> None:
        """Fail the call of a task that this worker does not have: nothing else would end it."""
        try:
            message = self.broker.formatter.loads(message=data)
        except Exception:
            # The receiver has logged it.
            return
        name = message.task_name
        error = RemoteResultError(f"a worker has no task {name!r}: import its module there")
        await Execution(self, message).refuse(error)

    # -- start and stop -------------------------------------------------------------------------

    async def start(self) -> None:
        """Start the fleet in this process, and the parts that workers and services need.

        Cancellation: the fleet is not started.
        """
        loop = asyncio.get_running_loop()
        if self.is_started and self.fleet.is_started and self._loop is loop:
            return
        broker = self.broker
        # The last one, so that the stamp has the span that another middleware has started. A new list:
        # Taskiq is iterating over the old one.
        broker.middlewares = [each for each in broker.middlewares if each is not self._middleware]
        broker.middlewares.append(self._middleware)
        await self.fleet.start()
        if self._loop not in (None, loop):
            # That loop is closed: otherwise, the fleet would have refused this one.
            self._make_parts()
        self._loop = loop
        link = self.fleet.link
        # The fleet may go on between two starts of the broker.
        if self._link is not link:
            self._link = link
            self.calls.subscribe(link)
            link.subscribe(CancelEntry, self._on_cancel)
            link.on_state(self.worker.wake)
        self.calls.start()
        self.worker.stopping = None
        self.is_started = True
        if broker.is_worker_process:
            self._signals.install()
            self._redelivery = redelivery_for(broker)
            if self._redelivery is not None:
                self._redelivery.start()

    async def stop(self) -> None:
        """End the executions that still run, and stop the fleet in this process.

        Raises:
            WrongLoopError: The broker is started in another event loop.

        Cancellation: the fleet is stopped without waiting.
        """
        if not self.is_started:
            return
        if self._loop is not None and self._loop is not asyncio.get_running_loop():
            if not self._loop.is_closed():
                raise WrongLoopError("the broker is started in another event loop: shut it down there")
            # Nothing is left to stop: its connections are gone with their loop.
            self.is_started = False
            return
        self.is_started = False
        try:
            if self._redelivery is not None:
                await self._redelivery.stop()
            await self._signals.finish()
            cause = CancelCause.make(CancelKind.SHUTDOWN, "the broker is shutting down")
            await self.worker.end(cause, _END_WITHIN)
            await self.calls.stop()
        finally:
            await self.fleet.stop()

    def _on_cancel(self, entry: CancelEntry, _: Entry) -> None:
        self.worker.wake_reached(target_in(entry))


class FleetMiddleware(TaskiqMiddleware):
    """Stamps the messages that a broker sends, and creates executions for those that it receives."""

    def __init__(self, managed_broker: ManagedBroker) -> None:
        super().__init__()
        self._managed = managed_broker

    async def startup(self) -> None:
        """Start the fleet."""
        await self._managed.start()

    async def shutdown(self) -> None:
        """Stop the fleet."""
        await self._managed.stop()

    def pre_send(self, message: TaskiqMessage) -> TaskiqMessage:
        """Stamp a message."""
        stamp_message(message, self._managed.fleet, self._managed.priorities)
        return message

    def pre_execute(self, message: TaskiqMessage) -> TaskiqMessage:
        """Create the execution of a received message; none without a started fleet."""
        if not self._managed.fleet.is_started:
            current_execution.set(None)
            return message
        execution = Execution(self._managed, message, ack_of_delivery())
        current_execution.set(execution)
        task = asyncio.current_task()
        if task is not None:
            task.add_done_callback(execution.handled)
        return message

    def on_error(self, message: TaskiqMessage, result: TaskiqResult[Any], exception: BaseException) -> None:
        """Prepare the result for the middlewares that follow: this one is the first."""
        execution = _execution_of(message)
        if execution is not None:
            execution.failed(result)

    def post_execute(self, message: TaskiqMessage, result: TaskiqResult[Any]) -> None:
        """Note the result."""
        execution = _execution_of(message)
        if execution is not None:
            execution.executed(result)

    def post_save(self, message: TaskiqMessage, result: TaskiqResult[Any]) -> None:
        """Record that the result is saved."""
        execution = _execution_of(message)
        if execution is not None:
            execution.saved()


_managed: weakref.WeakKeyDictionary[AsyncBroker, ManagedBroker] = weakref.WeakKeyDictionary()


def managed_broker_of(broker: AsyncBroker) -> ManagedBroker | None:
    """Return the state of a managed broker; None if the broker is not managed."""
    return _managed.get(broker)


def _execution_of(message: TaskiqMessage) -> Execution | None:
    execution = current_execution.get()
    return execution if execution is not None and execution.task_id == message.task_id else None
