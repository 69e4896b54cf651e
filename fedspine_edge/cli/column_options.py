"""The flags that name the columns of a user's file, the same in every command that reads one."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fedspine_edge.config import DataSettings


def add_columns(parser: argparse.ArgumentParser) -> None:
    """Add `--text`, `--text-pair` and `--label`."""
    parser.add_argument("--text", default="text", help="column of the texts, words or prompts; default text")
    parser.add_argument("--text-pair", default="", help="column of second texts, or of the answers to the prompts")
    parser.add_argument("--label", default="label", help="column of the labels; default label; not for causal_lm")


def with_columns(path: str, arguments: argparse.Namespace) -> DataSettings:
    """The file at `path` with the columns that `arguments` name."""
    from fedspine_edge.config import DataSettings

    return DataSettings(path=path, text=arguments.text, text_pair=arguments.text_pair, label=arguments.label)
