"""The terminal of the live view: ``otel-tasks``, a client of the feed in docs/reference/live.md.

It is a package of its own because it must start fast: importing anything below ``otel_tasks`` first imports
all of it, with OpenTelemetry, which takes longer than this program's whole run. It uses the standard library
alone; only ``top`` imports Textual, from the extra ``otel-tasks[top]``.
"""
