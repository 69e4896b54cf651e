"""Options that several commands share, and renamed options and commands."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fedspine_edge.config import DataSettings

BACKENDS = ("auto", "onnxruntime", "tensorrt", "tensorrt_rtx")
TASKS = ("classification", "token_classification", "causal_lm")

RENAMED_COMMANDS = {
    "export": (
        "assemble",
        "`fedspine-edge export` is now called `fedspine-edge assemble`. In a future release, `export` will export a "
        "model to ONNX or GGUF.",
    )
}
"""Current name of each renamed command, and the warning about its old name."""


class HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Formatter that appends the default of an option as "(default: 8)"."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        text = action.help
        default = action.default
        if text is None or "(default" in text or default is None or default is False or default in ("", []):
            return text
        return text if default == argparse.SUPPRESS else f"{text} (default: %(default)s)"


class _RenamedOption(argparse.Action):
    """Hidden option that stores its value like the current one and prints a warning."""

    def __init__(self, *arguments: Any, current: argparse.Action, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._current = current

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: str | Sequence[Any] | None,
        option_string: str | None = None,
    ) -> None:
        warn(f"{option_string} is now called {self._current.option_strings[0]}.")
        self._current(parser, namespace, values, option_string)


def accept_old_name(parser: argparse.ArgumentParser, old: str, current: argparse.Action) -> None:
    """Accept the option `old` for one release with a warning. It is not shown in the help.

    Args:
        parser: Parser of the command.
        old: Old name of the option, such as `--rounds`.
        current: Option that it was renamed to, as returned by `add_argument`.
    """
    parser.add_argument(
        old,
        action=_RenamedOption,
        current=current,
        dest=current.dest,
        nargs=current.nargs,
        type=current.type or str,
        choices=current.choices,
        default=argparse.SUPPRESS,
        help=argparse.SUPPRESS,
    )


def warn(text: str) -> None:
    """Print a warning about an old name to standard error."""
    print(f"warning: {text} The old name will stop working in the next release.", file=sys.stderr)


def add_column_options(parser: argparse.ArgumentParser) -> None:
    """Add `--text`, `--text-pair` and `--label`."""
    parser.add_argument("--text", metavar="COLUMN", default="text", help="column of the texts, word lists or prompts")
    parser.add_argument(
        "--text-pair", metavar="COLUMN", default="", help="column of the second texts, or of the answers to the prompts"
    )
    parser.add_argument("--label", metavar="COLUMN", default="label", help="column of the labels; unused by causal_lm")


def data_settings(path: str, arguments: argparse.Namespace) -> DataSettings:
    """Return the settings for the file at `path` with the columns in `arguments`."""
    from fedspine_edge.config import DataSettings

    return DataSettings(path=path, text=arguments.text, text_pair=arguments.text_pair, label=arguments.label)


def add_json_option(parser: argparse.ArgumentParser, text: str = "print the result as one JSON object") -> None:
    """Add `--json`."""
    parser.add_argument("--json", action="store_true", help=text)


def add_backend_option(parser: argparse.ArgumentParser, text: str = "runtime to use") -> None:
    """Add `--backend`."""
    parser.add_argument("--backend", choices=BACKENDS, default="auto", help=text)
