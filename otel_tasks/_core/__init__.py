"""The implementation: tasks, groups, and managers, without a web framework."""
