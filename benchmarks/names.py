"""The names of rows that goals and chart look for; apart, so that these need none of the peers."""

# Tasks.
BARE = "asyncio.create_task"
BARE_EAGER = "asyncio.create_task, eager"
TASK_GROUP = "asyncio.TaskGroup"
MANAGER = "otel_tasks manager"
GROUP = "otel_tasks group"

# Cancelling.
LOOP = "asyncio: cancel() each"
EVENTS = "asyncio.Event.set() each"
LINKS = "a task for each link"
WIDE = "CancelEvent, wide"
DEEP = "CancelEvent, deep"

# Middleware.
NONE = "no middleware"
OURS = "otel_tasks"
# With the rule of a gateway.
RULE = "otel_tasks, POST too"
WATCHER = "a watcher task per request"
# The handler awaits the disconnect itself, without a middleware.
LISTENER = "a handler that awaits the disconnect"
ANYIO = "an anyio task group per request"
BASE_HTTP = "BaseHTTPMiddleware that does nothing"
POLLING = "BaseHTTPMiddleware that polls"
SIDES = (NONE, OURS, WATCHER, ANYIO, BASE_HTTP, POLLING)
