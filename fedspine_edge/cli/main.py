"""The command line: thin, every command in its own module, loaded when it is used.

Exit codes: 0 success, 1 the work was done and the answer is no (doctor found something missing, verify
disagreed), 2 a usage or input error with a remedy, 130 interrupted.
"""

from __future__ import annotations

import argparse
import importlib
import json
import logging
import os
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

from fedspine_edge.errors import FedspineError, MissingDependency
from fedspine_edge.version import __version__

log = logging.getLogger("fedspine_edge.cli")

_COMMANDS = {
    "demo": "run a whole fleet on this machine: broker, server, devices, pruning, export, report",
    "server": "coordinate a fleet over MQTT",
    "device": "take part in a fleet as one device",
    "broker": "run the embedded MQTT broker: no accounts and no TLS, for a bench or a closed network",
    "simulate": "run the same fleet in virtual time in one process, bit for bit repeatable",
    "experiment": "repeat a named experiment and write its page: figures with seeds and intervals",
    "tune": "fine-tune and prune a model on this machine's data, without a fleet",
    "export": "build the finished model folder from a fleet run and the base model",
    "compile": "turn a model folder into a verified engine bundle",
    "run": "classify, label or continue texts with a compiled bundle",
    "inspect": "say what is in a compiled bundle",
    "verify": "check a bundle's files and, given its model, compare it with torch again",
    "bench": "time bundles against each other and against torch",
    "status": "say how a fleet's run stands, while it runs or after: rounds, devices, failures, time left",
    "explain": "say why a device got its pruning ratio and rank, from the server's journal",
    "report": "write the HTML report of a fleet run",
    "doctor": "say what this machine has, what is missing and how to mend it",
}


_CONTINUES = ("server", "device", "simulate", "experiment", "tune")
"""Commands that keep what they had done when they are interrupted."""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise FedspineError(f"{self.prog}: {message}", remedy=f"See: {self.prog} --help")


def parser() -> argparse.ArgumentParser:
    """The argument parser with every command; each command's module adds its own arguments."""
    top = _Parser(
        prog="fedspine-edge",
        description="Fine-tune, prune and deploy language models on fleets of NVIDIA Jetsons.",
        epilog="Start with: fedspine-edge demo",
    )
    top.add_argument("--version", action="version", version=f"fedspine-edge {__version__}")
    top.add_argument("-v", "--verbose", action="store_true", help="log more to standard error")
    commands = top.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, summary in _COMMANDS.items():
        module = importlib.import_module(f"fedspine_edge.cli.{name}")
        one = commands.add_parser(
            name,
            help=summary,
            description=f"{summary[0].upper()}{summary[1:]}.",
            epilog=f"example:\n  {module.EXAMPLE}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        module.add_arguments(one)
        flags = {action.dest: max(action.option_strings, key=len) for action in one._actions if action.option_strings}
        one.set_defaults(handler=module.run, names=flags)
    return top


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    arguments = argparse.Namespace(command=None, names={})
    try:
        arguments, unknown = parser().parse_known_args(argv)
        if hasattr(arguments, "texts") and not any(word.startswith("-") for word in unknown):
            arguments.texts += unknown  # what argparse leaves where texts stand after an option
        elif unknown:
            # argparse itself would point to the help of the whole program, which does not list a command's own
            raise FedspineError(
                f"fedspine-edge {arguments.command}: unrecognized arguments: {' '.join(unknown)}",
                remedy=f"See: fedspine-edge {arguments.command} --help",
            )
        logging.basicConfig(
            level=logging.DEBUG if arguments.verbose else logging.INFO,
            format="%(asctime)s %(levelname)s %(name)s: %(message)s",
            stream=sys.stderr,
        )
        try:
            code = arguments.handler(arguments)
        except ModuleNotFoundError as error:
            raise MissingDependency.from_import(error, purpose=f"fedspine-edge {arguments.command}") from None
    except FedspineError as error:
        print(f"error: {error.with_names(arguments.names)}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # who read the output has read enough: `fedspine-edge status RUN_DIR | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # else Python complains when it ends
        return 1
    except OSError as error:  # a place that nobody looked at before: a plot's folder, a log's
        log.debug("where it happened:", exc_info=True)
        print(f"error: {error}\n  Check the place, its space and permissions.", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        after = "continues where this one stopped" if arguments.command in _CONTINUES else "starts from the beginning"
        print(f"interrupted; the same command {after}", file=sys.stderr)
        return 130
    return int(code or 0)


def print_json(data: dict[str, Any]) -> None:
    """Print one JSON object to standard output, for `--json`."""
    print(json.dumps(data, indent=2, sort_keys=True))


if __name__ == "__main__":
    sys.exit(main())
