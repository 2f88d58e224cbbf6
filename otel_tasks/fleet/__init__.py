"""Beyond one process: cancel, see, and trace across hosts and workers; needs ``otel-tasks[fleet]``."""
