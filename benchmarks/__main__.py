"""``python -m benchmarks``: run the parts, write results, tables and chart.

Each part has a process of its own, so that none begins with what another one has left in memory.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

from benchmarks import chart, report
from benchmarks.measure import Effort, Table

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results.json"

# Seconds that each may take; all together stay below sixteen minutes.
PARTS = {
    "spawn": 75.0,
    "eager": 15.0,
    "span": 60.0,
    "memory": 45.0,
    "scale": 40.0,
    "cancel": 60.0,
    "middleware": 80.0,
    "disconnect": 170.0,
    "streams": 140.0,
    "live": 80.0,
    "live_page": 40.0,
    "fleet": 120.0,
}
PEERS = (
    "aiojobs",
    "aiotools",
    "anyio",
    "fastapi",
    "httpx",
    "opentelemetry-instrumentation-asyncio",
    "opentelemetry-sdk",
    "quattro",
    "redis",
    "starlette",
    "taskiq",
    "taskiq-redis",
    "uvicorn",
    "uvloop",
)


def main() -> int:
    """Run what was asked for."""
    options = _options()
    if options.child:
        return _run_child(options)
    results = _load() if options.only or options.render else {}
    if not options.render:
        results = _measure(options, results)
    if options.quick and not options.render:
        print("\nA quick run: nothing is written, its figures are too rough.")
        return 0
    tables = [Table.from_dict(table) for table in results["tables"]]
    report.write(ROOT, tables, results["machine"])
    images = ROOT / "docs" / "images"
    (images / "benchmarks.svg").write_text(chart.draw(tables), encoding="utf-8")
    (images / "middleware.svg").write_text(chart.draw_middleware(tables), encoding="utf-8")
    return 0


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--only", action="append", choices=sorted(PARTS), help="run this part (repeatable)")
    parser.add_argument("--quick", action="store_true", help="a few rounds, to see that all works")
    parser.add_argument("--render", action="store_true", help="measure nothing: write tables and chart again")
    parser.add_argument("--eager-python", help="a Python 3.12 or newer with otel_tasks, for the part `eager`")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--out", help=argparse.SUPPRESS)
    return parser.parse_args()


def _measure(options: argparse.Namespace, results: dict[str, Any]) -> dict[str, Any]:
    chosen = options.only or list(PARTS)
    tables = {table["id"]: table for table in results.get("tables", [])}
    for part in chosen:
        began = time.monotonic()
        for table in _run_part(part, options):
            tables[table["id"]] = table
            print("\n" + report.as_text(Table.from_dict(table)))
        print(f"\n({part}: {time.monotonic() - began:.0f} s)", flush=True)
        # After each part: a run that is broken off keeps what it has.
        results["machine"] = _machine()
        results["tables"] = list(tables.values())
        _save(results, options)
    report.print_goals([Table.from_dict(table) for table in results["tables"]])
    return results


def _run_part(part: str, options: argparse.Namespace) -> list[dict[str, Any]]:
    python = sys.executable
    if part == "eager" and sys.version_info < (3, 12):
        if not options.eager_python:
            print("\neager: needs Python 3.12 or newer, and none was named: not measured.")
            return []
        python = options.eager_python
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "tables.json"
        command = [python, "-m", "benchmarks", "--child", part, "--out", str(out)]
        if options.quick:
            command.append("--quick")
        # Not an instrumentation's or exporter's setting from outside.
        environment = {name: value for name, value in os.environ.items() if not name.startswith("OTEL_")}
        done = subprocess.run(command, cwd=ROOT, env=environment, timeout=PARTS[part] * 4, check=False)
        if done.returncode or not out.exists():
            print(f"\n{part}: ended with {done.returncode}, no figures.", file=sys.stderr)
            return []
        tables: list[dict[str, Any]] = json.loads(out.read_text("utf-8"))
        return tables


def _run_child(options: argparse.Namespace) -> int:
    seconds = PARTS[options.child]
    effort = Effort(2, seconds / 20) if options.quick else Effort(60, seconds)
    tables = importlib.import_module(f"benchmarks.{options.child}").run(effort)
    Path(options.out).write_text(json.dumps([table.to_dict() for table in tables]), encoding="utf-8")
    return 0


def _machine() -> dict[str, Any]:
    return {
        "python": platform.python_version(),
        "implementation": platform.python_implementation(),
        "system": f"{platform.system()} {platform.machine()}",
        "cpus": os.cpu_count(),
        "peers": {name: version(name) for name in PEERS},
    }


def _load() -> dict[str, Any]:
    if not RESULTS.exists():
        return {}
    results: dict[str, Any] = json.loads(RESULTS.read_text("utf-8"))
    return results


def _save(results: dict[str, Any], options: argparse.Namespace) -> None:
    if not options.quick:
        RESULTS.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
