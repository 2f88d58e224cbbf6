"""Remote tasks: call tasks on Taskiq's workers like local coroutines; needs ``otel-tasks[taskiq]``.

``managed`` runs the tasks of a broker as managed tasks on its workers. ``remote`` calls one of them as a
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
