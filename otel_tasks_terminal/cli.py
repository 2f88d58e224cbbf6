"""The command ``otel-tasks``: its arguments, and how it ends."""

from __future__ import annotations

import argparse
import os
import re
import sys
from contextlib import ExitStack
from typing import TYPE_CHECKING, NoReturn

from otel_tasks_terminal import commands
from otel_tasks_terminal.client import DEFAULT_URL, Address, Client
from otel_tasks_terminal.errors import CommandError, ExitCode, usage
from otel_tasks_terminal.pen import terminal_size

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from otel_tasks_terminal.source import Source

EPILOG = """\
environment:
  OTEL_TASKS_URL        the address of the live view, the default of --url
  OTEL_TASKS_TOKEN      the bearer token, the default of --token
  OTEL_TASKS_USER       name:password, for a view that wants these instead
  OTEL_TASKS_FLEET      the server of a fleet, the default of --fleet
  OTEL_TASKS_NAMESPACE  the name of the fleet, the default of --namespace
  SSL_CERT_FILE         certificates to trust, for https://
  NO_COLOR              no colors

exit codes:
  0  done                        4  refused: token or password, not allowed, read-only
  1  nothing done: no such task  5  not a live view, or a later version of it
  2  wrong arguments             6  cancel: requested, and the task still runs
  3  no answer: try again later  74  the output cannot be written
                                 130, 141, 143  Ctrl-C, closed pipe, SIGTERM
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; return its exit code."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            # `otel-tasks ls >&-`: what would be written is dropped, for as long as the process lives.
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115  # never closed
    try:
        try:
            return _run(argv)
        finally:
            # Here and not at the exit of the interpreter, which would show a traceback of a closed pipe.
            sys.stdout.flush()
    except CommandError as error:
        print(f"otel-tasks: {error}", file=sys.stderr)
        return error.code
    except KeyboardInterrupt:
        return ExitCode.INTERRUPTED
    except BrokenPipeError:
        # `otel-tasks ls | head`: what is left in the buffer must not fail again.
        _drop_output()
        return ExitCode.BROKEN_PIPE
    except OSError as error:
        # A full disk. What the network does is a CommandError.
        print(f"otel-tasks: cannot write the output: {error.strerror or error}", file=sys.stderr)
        _drop_output()
        return ExitCode.OUTPUT


def _drop_output() -> None:
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _run(argv: Sequence[str] | None) -> int:
    options = parser().parse_args(argv)
    command: Callable[[argparse.Namespace, Callable[[], Source]], int] = options.command
    with ExitStack() as opened:

        def connect() -> Source:
            source = source_of(options)
            # Not `enter_context`: on Python 3.15, it imports `inspect`, which is slow.
            opened.callback(source.close)
            return source

        return command(options, connect)


def source_of(options: argparse.Namespace) -> Source:
    """Make the source that the command line names, or the environment."""
    fleet, namespace = _fleet_of(options), getattr(options, "namespace", None)
    if fleet is None:
        if namespace:
            raise usage("--namespace needs --fleet")
        return client_of(options)
    from otel_tasks_terminal.fleet import fleet_source  # --url starts without

    namespace = namespace or os.environ.get("OTEL_TASKS_NAMESPACE") or None
    return fleet_source(fleet, namespace, timeout=getattr(options, "timeout", 10.0))


def _fleet_of(options: argparse.Namespace) -> str | None:
    """The server of the fleet; None if a live view is asked. An option wins over a variable."""
    url, fleet = getattr(options, "url", None), getattr(options, "fleet", None)
    if fleet and (url or getattr(options, "token", None)):
        raise usage("--fleet asks the nodes directly: leave --url and --token out")
    if url or fleet:
        return fleet or None
    fleet = os.environ.get("OTEL_TASKS_FLEET") or None
    if fleet and os.environ.get("OTEL_TASKS_URL"):
        raise usage("OTEL_TASKS_URL and OTEL_TASKS_FLEET are both set: choose with --url or --fleet")
    return fleet


def client_of(options: argparse.Namespace) -> Client:
    """Make a client with the address and the token of the command line or the environment."""
    url = getattr(options, "url", None) or os.environ.get("OTEL_TASKS_URL") or DEFAULT_URL
    token = getattr(options, "token", None) or os.environ.get("OTEL_TASKS_TOKEN") or None
    if token is not None and not re.fullmatch(r"[!-~]+", token):
        raise usage("the token has spaces or other characters that a header must not have")
    user = os.environ.get("OTEL_TASKS_USER") or None
    if user is not None and ":" not in user:
        raise usage("OTEL_TASKS_USER must be a name and a password: name:password")
    return Client(Address.parse(url), token, user=user, timeout=getattr(options, "timeout", 10.0))


def parser() -> argparse.ArgumentParser:
    """Describe the arguments."""
    common = _common()
    main_parser = _Parser(
        prog="otel-tasks",
        description="See what runs in a service that mounts live_view(), or in a fleet, and cancel it.",
        epilog=EPILOG,
        formatter_class=_Formatter,
        parents=[common],
        allow_abbrev=False,
    )
    main_parser.add_argument("--version", action=_Version, help="show the version and exit")
    subparsers = main_parser.add_subparsers(metavar="COMMAND", required=True)

    def command(name: str, run: object, summary: str) -> argparse.ArgumentParser:
        added = subparsers.add_parser(
            name,
            help=summary,
            description=summary,
            parents=[common],
            allow_abbrev=False,
            formatter_class=_Formatter,
        )
        added.set_defaults(command=run)
        return added

    _list_arguments(command("ls", commands.ls, "list tasks"))
    _tree_arguments(command("tree", commands.tree, "show groups, and the tasks in them by name"))
    _id_argument(command("show", commands.show, "show everything about one task"))
    _cancel_arguments(command("cancel", commands.cancel, "cancel one task"))
    _watch_arguments(command("watch", commands.watch, "show the overview, and keep it up to date"))
    added = command(
        "top", commands.top, "the same with keys to look around and to cancel; needs otel-tasks[top]"
    )
    _node_argument(added)
    return main_parser


def _common() -> _Parser:
    """The options that may stand before and after the command."""
    common = _Parser(add_help=False, argument_default=argparse.SUPPRESS, formatter_class=_Formatter)
    common.add_argument("--url", metavar="URL", help=f"the address of the live view (default: {DEFAULT_URL})")
    common.add_argument(
        "--token",
        help="the bearer token. Other users of this machine can see it here, but not in OTEL_TASKS_TOKEN",
    )
    common.add_argument(
        "--fleet",
        metavar="URL",
        help="the Redis server of a fleet, instead of --url; needs otel-tasks[fleet]. Other users of this "
        "machine can see a password here, but not in OTEL_TASKS_FLEET",
    )
    common.add_argument("--namespace", metavar="NAME", help="the fleet (default: the only one of its server)")
    common.add_argument(
        "--timeout",
        type=_positive_seconds,
        metavar="SECONDS",
        help="how long to wait for an answer (default: 10)",
    )
    common.add_argument("--json", action="store_true", help="print what the service answers, as JSON")
    common.add_argument("--ascii", action="store_true", help="print only ASCII characters")
    return common


def _list_arguments(added: argparse.ArgumentParser) -> None:
    added.add_argument(
        "words", nargs="*", metavar="WORD", help="in the name, id, group, trace id, or line (pool.py:88)"
    )
    added.add_argument("--status", choices=("pending", "queued", "running", "cancelling"))
    added.add_argument(
        "--min-age",
        type=_seconds,
        metavar="AGE",
        help="only tasks that are older: 30, 5m, 2h; cancelling for longer",
    )
    added.add_argument("--where", metavar="FILE:LINE", help="only tasks that wait at this line")
    added.add_argument("--group", metavar="ID", help="only tasks of this group, and of those below it")
    _node_argument(added)
    added.add_argument("--key", help="only tasks of this row of the tree, a group or a class")
    added.add_argument("--ended", action="store_true", help="tasks that have ended, the newest first")
    added.add_argument(
        "--sort", choices=("age", "newest", "name", "status"), help="age: the oldest first (default)"
    )
    added.add_argument(
        "--limit", type=_positive, default=200, metavar="N", help="print at most N tasks (default: 200)"
    )
    added.add_argument("-q", "--quiet", action="store_true", help="print only the ids")


def _node_argument(added: argparse.ArgumentParser) -> None:
    added.add_argument("--node", metavar="NAME", help="with a fleet: only this node, host, or HOST/PID")


def _tree_arguments(added: argparse.ArgumentParser) -> None:
    added.add_argument("--sort", choices=("status", "age", "name", "count"), default="status")
    added.add_argument("--tasks", action="store_true", help="show the oldest tasks below each name, too")
    _node_argument(added)


def _id_argument(added: argparse.ArgumentParser) -> None:
    added.add_argument("id", metavar="ID", help="the id of a task, its path, or its name")
    _node_argument(added)


def _cancel_arguments(added: argparse.ArgumentParser) -> None:
    _id_argument(added)
    added.add_argument("--reason", metavar="TEXT", help="for the service's log and the trace")
    added.add_argument("-y", "--yes", action="store_true", help="do not ask")


def _watch_arguments(added: argparse.ArgumentParser) -> None:
    added.add_argument("--sort", choices=("status", "age", "name", "count"), default="status")
    added.add_argument("--count", type=_positive, metavar="N", help="exit after N updates")
    _node_argument(added)


def _seconds(text: str) -> float:
    found = re.fullmatch(r"(\d{1,9}(?:\.\d{1,3})?)\s*([smhd]?)", text)
    if not found:
        raise argparse.ArgumentTypeError(f"{text!r} is not a duration: write 30, 5m, 2h, or 1d")
    return float(found[1]) * {"": 1, "s": 1, "m": 60, "h": 3600, "d": 86400}[found[2]]


def _positive_seconds(text: str) -> float:
    seconds = _seconds(text)
    if not seconds:
        raise argparse.ArgumentTypeError(f"{text!r} is not a duration above 0: write 30, 5m, 2h, or 1d")
    return seconds


def _positive(text: str) -> int:
    if not re.fullmatch(r"\d{1,6}", text) or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of 1 or more")
    return int(text)


class _Parser(argparse.ArgumentParser):
    """Says in one line what is wrong with the arguments, as the other errors do."""

    def error(self, message: str) -> NoReturn:
        self.exit(
            ExitCode.USAGE, f"{self.prog}: {message.removeprefix('argument ')}; see {self.prog} --help\n"
        )


class _Formatter(argparse.RawDescriptionHelpFormatter):
    """Measures the terminal itself: argparse makes a formatter at the start, which imports ``shutil``."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, width=terminal_size(sys.stdout)[0] - 2)


class _Version(argparse.Action):
    """Looks the version up only when it is asked for: that takes longer than the rest of the start."""

    def __init__(
        self, option_strings: Sequence[str], dest: str, help: str | None = None
    ) -> None:  # argparse's name
        super().__init__(option_strings, dest, nargs=0, help=help)

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> NoReturn:
        from importlib.metadata import version

        print(f"otel-tasks {version('otel-tasks')}")
        parser.exit()
