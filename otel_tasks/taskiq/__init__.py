"""Remote tasks: coroutines on Taskiq's workers, cancelled from here; needs ``otel-tasks[taskiq]``.

``managed`` makes the tasks of a broker managed tasks of its workers, and ``remote`` calls one of them as a
coroutine of this process, so that groups, priorities, timeouts, causes, and spans apply to it.
"""

from otel_tasks.taskiq.broker import managed
from otel_tasks.taskiq.errors import RemoteCancelledError, RemoteResultError
from otel_tasks.taskiq.labels import labels
from otel_tasks.taskiq.priorities import rabbitmq_priorities, stream_priorities
from otel_tasks.taskiq.remote import remote

__all__ = [
    "RemoteCancelledError",
    "RemoteResultError",
    "labels",
    "managed",
    "rabbitmq_priorities",
    "remote",
    "stream_priorities",
]
