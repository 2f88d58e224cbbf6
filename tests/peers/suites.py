"""The suites of other projects that run with the middleware around every app, and what may differ.

Nothing of them is kept here: their tests come from their own source distributions, at the versions that the
dependency group `nightly` pins. Left out, because a source distribution lacks the tests or what they need:
Quart and Litestar (no tests), BlackSheep (no fixtures).
"""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True, eq=False)
class Suite:
    """One project's tests.

    Args:
        package: The name of the package, whose installed version is the one that is tested.
        through: The least number of tests in which the middleware serves a connection, by place:
            a suite that no longer meets the middleware must not pass. Its keys are the places to run.
        tests: The files and folders to run.
        left_out: Tests that are not run at all, and why.
        differences: The intended differences from the bare run: reasons by place and test id.
    """

    package: str
    through: dict[str, int]
    tests: tuple[str, ...] = ("tests",)
    left_out: dict[str, str] = field(default_factory=dict)
    differences: dict[str, dict[str, str]] = field(default_factory=dict)


SUITES = (
    Suite("starlette", through={"outside": 500, "inside": 180}),
    Suite("fastapi", through={"outside": 3000, "inside": 3000}),
    Suite("sse-starlette", through={"outside": 8, "inside": 3}),
    Suite(
        "mcp",
        through={"outside": 100, "inside": 100},
        # The others test no app, or the tools with which the project makes its documentation.
        tests=tuple(
            f"tests/{name}" for name in ("client", "interaction", "issues", "server", "shared", "transports")
        ),
    ),
    Suite("httpx", through={"outside": 10}),
    Suite("uvicorn", through={"outside": 200}),
    Suite("opentelemetry-instrumentation-asgi", through={"outside": 50}),
    Suite("opentelemetry-instrumentation-fastapi", through={"outside": 40, "inside": 40}),
)
