"""The cost of the library, compared with its peers and with no library.

``make bench`` runs all parts, ``make bench ONLY=spawn`` one. Each figure compares sides that took turns in
one process, by CPU time; see ``measure``. Goals are those of the design, and stand in ``goals``.

- ``spawn``, ``eager``: create, run and end a task, without an SDK.
- ``span``: the same with one span for each task.
- ``memory``: bytes for a live task.
- ``scale``: the cost of one task more, with 1k to 1M live ones.
- ``cancel``: cancel many tasks; set a tree of cancel events.
- ``middleware``: CPU time of a request on uvicorn's own protocol; requests per second over loopback.
- ``disconnect``: from the client's close to the end of the last task: the one part that measures wall time.
- ``cost``: not a timer but counts, for the tests: see ``tests/test_cost.py``.
- ``report``, ``chart``: tables in Markdown, and ``docs/images/benchmarks.svg``.
"""
