"""Progress of a task or a group: how far it is, how fast, and when it will end."""

from otel_tasks._core.progress import GroupProgress, Progress, ProgressWatch, TaskProgress

__all__ = ["GroupProgress", "Progress", "ProgressWatch", "TaskProgress"]
