"""Checks that command lines and imports in the documentation exist, and that private words are gone from it."""

from __future__ import annotations

import argparse
import re
from importlib import import_module
from pathlib import Path

import pytest

from fedspine_edge.cli.main import COMMANDS, make_parser

ROOT = Path(__file__).resolve().parents[2]
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    *sorted((ROOT / "docs").rglob("*.md")),
    ROOT / "jetson/README.md",
]
CURRENT = [page for page in PAGES if page.parent.name != "decisions"]


def command_lines(page: Path) -> list[list[str]]:
    """Return the words after `fedspine-edge` of every command in the page."""
    text = page.read_text(encoding="utf-8").replace("\\\n", " ")
    found = re.findall(r"fedspine-edge((?: +(?:\[?--?[\w-]+|[\w./*{}:=,<>-]+|\"[^\"]*\"))+)", text)
    return [words.split() for words in found]


@pytest.mark.parametrize("page", CURRENT, ids=lambda page: str(page.relative_to(ROOT)))
def test_commands_and_options_in_page_exist(page: Path) -> None:
    (commands,) = (action for action in make_parser()._actions if isinstance(action, argparse._SubParsersAction))
    unknown = []
    for words in command_lines(page):
        name = words[0]
        if name.startswith("-") or not re.fullmatch(r"[a-z]+", name):
            continue
        if name not in COMMANDS:
            unknown.append(name)
            continue
        shown = [action for action in commands.choices[name]._actions if action.help != argparse.SUPPRESS]
        options = {flag for action in shown for flag in action.option_strings}
        unknown += [f"{name} {word}" for word in words if word.startswith("--") and word.split("=")[0] not in options]
    assert unknown == []


@pytest.mark.parametrize("page", CURRENT, ids=lambda page: str(page.relative_to(ROOT)))
def test_imports_in_page_exist(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    for module, names in re.findall(r"^\s*from (fedspine_edge[\w.]*) import ([\w, ]+)", text, re.MULTILINE):
        for name in names.split(","):
            assert hasattr(import_module(module), name.strip()), f"{module}.{name}"


@pytest.mark.parametrize("page", CURRENT, ids=lambda page: str(page.relative_to(ROOT)))
def test_files_in_page_exist(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    named = re.findall(r"`((?:fedspine_edge|tests|examples|scripts|benchmarks|csrc)/[\w./-]+)`", text)
    assert [name for name in named if not (ROOT / name).exists()] == []


@pytest.mark.parametrize("page", CURRENT, ids=lambda page: str(page.relative_to(ROOT)))
def test_words_that_the_style_guide_replaces_are_gone(page: Path) -> None:
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    text = re.sub(r"`[^`\n]*`", "", text)
    words = r"\b(anew|ours|told|heard|twins?|rehears\w+|mend|mended|goes on|bands?|lanes?|envelope|nobody)\b"
    assert re.findall(words, text, re.IGNORECASE) == []
