"""Entry point of the command line. Each command is a module of its own with `EXAMPLE`, `add_arguments` and `run`.

Exit codes: 0 success; 1 the command worked and the answer is no (doctor found a problem, verify found a difference);
2 a usage or input error, printed with a remedy; 130 interrupted; 143 terminated.
"""

from __future__ import annotations

import argparse
import importlib
import json
import logging
import os
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NoReturn

from fedspine_edge.cli.options import RENAMED_COMMANDS, HelpFormatter, warn
from fedspine_edge.errors import FedspineError, MissingDependency
from fedspine_edge.version import __version__

log = logging.getLogger("fedspine_edge.cli")

COMMAND_GROUPS = {
    "one device": {
        "tune": "fine-tune and prune a model on this machine's data, without a fleet",
        "compile": "compile a model folder to a verified bundle with an engine",
        "run": "classify, label or continue texts with a bundle",
        "bench": "measure the latency of bundles and of torch",
        "verify": "check a bundle's files and compare it with its model in torch",
        "inspect": "show the contents of a bundle",
    },
    "a fleet": {
        "broker": "run the embedded MQTT broker, without accounts and TLS, for tests and closed networks",
        "server": "coordinate a fleet over MQTT",
        "device": "take part in a fleet as one device",
        "status": "show rounds, devices, failures and the remaining time of a run",
        "report": "write the HTML report of a run",
        "explain": "explain a device's pruning ratio and rank, from the server's journal",
        "assemble": "build the finished model folder from a run and the base model",
        "doctor": "check this machine, its packages and its connection to the fleet",
    },
    "experiments": {
        "simulate": "run a fleet in virtual time in one process, reproducible bit for bit",
        "experiment": "repeat an experiment and write its results with seeds and confidence intervals",
        "demo": "run a whole fleet on this machine: broker, server, devices, export and report",
    },
}
COMMANDS = {name: summary for group in COMMAND_GROUPS.values() for name, summary in group.items()}

_RESUMABLE = ("server", "device", "simulate", "experiment", "tune")
"""Commands that continue their work when they are started again after an interruption."""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise FedspineError(f"{self.prog}: {message}", remedy=f"See: {self.prog} --help")


def make_parser() -> argparse.ArgumentParser:
    """Return the argument parser with all commands."""
    top = _Parser(
        prog="fedspine-edge",
        description="Fine-tune, prune and deploy language models on fleets of NVIDIA Jetsons.",
        epilog=_command_list(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    top.add_argument("--version", action="version", version=f"fedspine-edge {__version__}")
    top.add_argument("-v", "--verbose", action="store_true", help="log debug messages to standard error")
    commands = top.add_subparsers(
        dest="command", metavar="COMMAND", required=True, help="one of the commands below; each has --help"
    )
    for name in [*COMMANDS, *RENAMED_COMMANDS]:
        current = RENAMED_COMMANDS[name][0] if name in RENAMED_COMMANDS else name
        module = importlib.import_module(f"fedspine_edge.cli.{current}")
        summary = COMMANDS[current]
        parser = commands.add_parser(
            name,
            description=f"{summary[0].upper()}{summary[1:]}.",
            epilog=f"example:\n  {module.EXAMPLE}",
            formatter_class=HelpFormatter,
        )
        module.add_arguments(parser)
        options = {
            action.dest: max(action.option_strings, key=len)
            for action in parser._actions
            if action.option_strings and action.help != argparse.SUPPRESS
        }
        parser.set_defaults(handler=module.run, names=options)
    return top


def _command_list() -> str:
    """Return all commands with their summaries, by group."""
    lines = []
    for group, commands in COMMAND_GROUPS.items():
        lines += [f"{group}:", *(f"    {name:<10}  {summary}" for name, summary in commands.items()), ""]
    return "\n".join([*lines, "Start with: fedspine-edge demo"])


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code."""
    with _sigterm_as_interrupt():
        return _main(argv)


class _Terminated(KeyboardInterrupt):
    """SIGTERM was received."""


@contextmanager
def _sigterm_as_interrupt() -> Iterator[None]:
    """Handle SIGTERM as Ctrl-C, so that state is saved, temporary files are deleted and peers are informed.

    The default action would do none of that, and does not exist for the first process of a container.
    """

    def on_sigterm(*_: object) -> None:
        raise _Terminated

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous = signal.signal(signal.SIGTERM, on_sigterm)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


def _main(argv: Sequence[str] | None) -> int:
    arguments = argparse.Namespace(command=None, names={})
    try:
        arguments, unknown = make_parser().parse_known_args(argv)
        if arguments.command in RENAMED_COMMANDS:
            arguments.command, text = RENAMED_COMMANDS[arguments.command]
            warn(text)
        if hasattr(arguments, "texts") and not any(word.startswith("-") for word in unknown):
            arguments.texts += unknown  # argparse does not assign positional texts that follow an option
        elif unknown:
            # argparse would refer to the help of the program, which does not list the options of a command
            raise FedspineError(
                f"fedspine-edge {arguments.command}: unrecognized arguments: {' '.join(unknown)}",
                remedy=f"See: fedspine-edge {arguments.command} --help",
            )
        logging.basicConfig(
            level=logging.DEBUG if arguments.verbose else logging.INFO,
            format="%(asctime)s %(levelname)s %(name)s: %(message)s",
            stream=sys.stderr,
        )
        if arguments.command == "broker":  # runs in native code, which Python handlers do not interrupt
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
        try:
            code = arguments.handler(arguments)
        except ModuleNotFoundError as error:
            raise MissingDependency.from_import(error, purpose=f"fedspine-edge {arguments.command}") from None
    except FedspineError as error:
        _print_error(error.with_names(arguments.names))
        return 2
    except BrokenPipeError:  # the reader of the output closed the pipe, such as `fedspine-edge status RUN_DIR | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # otherwise Python fails to flush at exit
        return 1
    except OSError as error:  # a path that was not checked before, such as the folder of a plot
        log.debug("traceback:", exc_info=True)
        _print_error(f"{error}\n  Check that the path exists, its free space and its permissions.")
        return 2
    except KeyboardInterrupt as error:
        terminated = isinstance(error, _Terminated)
        after = "continues the work" if arguments.command in _RESUMABLE else "starts from the beginning"
        print(f"{'terminated' if terminated else 'interrupted'}; the same command {after}", file=sys.stderr)
        return 143 if terminated else 130
    return int(code or 0)


def _print_error(text: str) -> None:
    """Print an error to standard error. Arguments that are not UTF-8 are shown with escapes."""
    print(f"error: {text}".encode("utf-8", "backslashreplace").decode("utf-8"), file=sys.stderr)


def print_json(data: dict[str, Any]) -> None:
    """Print one JSON object to standard output."""
    print(json.dumps(data, indent=2, sort_keys=True))


if __name__ == "__main__":
    sys.exit(main())
