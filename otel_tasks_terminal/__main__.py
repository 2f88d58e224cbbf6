"""``python -m otel_tasks_terminal``: the command ``otel-tasks``, where its script is not on the path."""

import sys

from otel_tasks_terminal.cli import main

sys.exit(main())
